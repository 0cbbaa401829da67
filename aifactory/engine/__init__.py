"""Engine: token ids in, text out, in pure torch over the Hugging Face model's own forward.

    submit ─▶ queue ─▶ Scheduler ─prefill chunk─▶ slot ─decode step of all slots─▶ Answer ─▶ deltas
              engine.py  scheduler.py    cache.py          sampling.py              answer.py

`protocol.py` is what the other rooms see; it imports no torch.
"""
