"""The vocabulary: a byte-level BPE trained on a corpus, in Hugging Face form."""

from __future__ import annotations

import json
from collections.abc import Iterable

END_OF_TEXT = "<|endoftext|>"


def train_vocabulary(texts: Iterable[str], *, vocab_size: int) -> dict[str, bytes]:
    """Train byte-level BPE; return the files of a tokenizer folder by name.

    One special token, `<|endoftext|>`, begins and ends every document. The result depends on the texts and the size
    alone.
    Source  Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units", section 3.2; over bytes
            as in Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**12,
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=False).encode(),
        "tokenizer_config.json": (json.dumps(settings, indent=1) + "\n").encode(),
    }
