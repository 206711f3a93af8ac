"""A tokenizer made on the spot: byte-level pairs, with or without tokens that it adds."""

from __future__ import annotations

from functools import cache
from typing import Any

from actstore.ingest.corpus.tokens import Vocabulary

TEXTS = ["the cat sat on the mat, the dog sat on the log", "größer als je zuvor", "שלום עולם"] * 5


@cache
def tokenizer(adds: bool = False) -> Any:
    """A fast tokenizer of 330 tokens; `adds`: <s> at the beginning and </s> at the end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    if adds:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def vocabulary(adds: bool = False) -> Vocabulary:
    return Vocabulary(tokenizer(adds), f"made{int(adds)}", 340)
