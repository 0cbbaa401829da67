"""Engine: token ids in, text, scores or embeddings out, over a Hugging Face model. Knows no Ray.

    submit ─▶ queue ─▶ Scheduler ─prompt in chunks─▶ slot ─one token of all slots─▶ Choice ─▶ Answer ─▶ deltas
              engine.py  scheduler.py  prefix.py     cache.py                       choice.py  answer.py

    what computes    the model's own forward, in pure torch; or, for Llama-like models on a CPU, packed.py ─▶ compiled.py
                     ─▶ kernels.py ─▶ products.py ─▶ vectors.py, tiles.py ─▶ matrix_unit.py, by the threads of team.py
                     and worksharing.py; adapters.py changes either for the rows that ask for it
    what chooses     edits.py, grammar.py, sampling.py, logprobs.py

`protocol.py` is what the other rooms see; it imports no torch.
"""
