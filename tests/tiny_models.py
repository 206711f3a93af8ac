"""Tiny models of transformers, made on the spot: folders as a user has them."""

from pathlib import Path

import torch

WORDS = "the cat sat on the mat and the dog ran to the cat"
SIZES = {"n_layers": 2, "d_model": 32, "n_heads": 4, "n_ctx": 64}


def tokenizer(folder: Path, n_words: int = 300) -> int:
    """Save a byte-level tokenizer; the number of its token ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=n_words, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False
    )
    made.train_from_iterator([WORDS] * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")
    fast.save_pretrained(folder)
    return len(fast)


def save(config: object, kind: str, folder: Path, seed: int = 0) -> Path:
    """Save a model of random weights; norms and offsets are random, too, so that leaving one out is seen."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity(50)
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def llama(folder: Path, seed: int = 0, **changes: object) -> Path:
    """RMSNorm, rotary positions, grouped queries."""
    from transformers import LlamaConfig

    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    config = LlamaConfig(
        **{"vocab_size": tokenizer(folder), "bos_token_id": 0, "eos_token_id": 0, **sizes, **heads, **changes}
    )
    return save(config, "LlamaForCausalLM", folder, seed)


def gpt2(folder: Path) -> Path:
    """LayerNorm, learned positions, tied embeddings."""
    from transformers import GPT2Config

    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
    return save(GPT2Config(vocab_size=tokenizer(folder), **sizes), "GPT2LMHeadModel", folder)


def bert(folder: Path, kind: str = "BertForMaskedLM") -> Path:
    """An encoder: each token sees all others."""
    from transformers import BertConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return save(BertConfig(vocab_size=200, max_position_embeddings=64, **sizes), kind, folder)


def gemma(folder: Path) -> Path:
    """RMSNorm that stores its scale without the 1, and capped logits."""
    from transformers import Gemma2Config

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8}
    return save(
        Gemma2Config(vocab_size=200, final_logit_softcapping=2.0, **sizes, **heads), "Gemma2ForCausalLM", folder
    )
