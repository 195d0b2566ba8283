"""Models with random weights, saved for `from_pretrained`: a small one of each family, and one of Gemma-2-2B's own size."""

from pathlib import Path

import torch

from pipeline.models.language import quiet_transformers, transformers
from pipeline.models.tiny import BOS, EOS, PAD, train_tokenizer

DEPTH, D_IN, VOCABULARY, POSITIONS = 4, 32, 320, 64
GEMMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": D_IN,
    "intermediate_size": 64,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": BOS,
}
GPT = {"vocab_size": VOCABULARY, "n_embd": D_IN, "n_layer": DEPTH, "n_head": 4, "n_positions": POSITIONS}
CONFIGS = {
    # A window shorter than the sequences of the tests, so that a layer of the wrong type would be seen.
    "gemma-2": transformers.Gemma2Config(**GEMMA, head_dim=8, sliding_window=8),
    "gemma": transformers.GemmaConfig(**GEMMA, head_dim=8),
    "llama": transformers.LlamaConfig(**GEMMA),
    "gpt-2": transformers.GPT2Config(**GPT),
    "gpt-neox": transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=D_IN,
        intermediate_size=64,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
    ),
    # The layers of this one return a tuple.
    "gpt-j": transformers.GPTJConfig(**GPT, rotary_dim=4),
}
GEMMA_2_2B = {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "max_position_embeddings": 8192,
}
"""The shapes of google/gemma-2-2b, whose depth is 26."""


def save_model(folder: Path, config: transformers.PreTrainedConfig, dtype: torch.dtype = torch.float32) -> Path:
    """A causal language model with random weights and a byte-level tokenizer; returns the folder."""
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.save_pretrained(folder)
    train_tokenizer(["some text to learn from"], 300).save_pretrained(folder)
    return folder


def save_gemma_2_2b(folder: Path, depth: int = 6) -> Path:
    """The first layers of a Gemma-2-2B with random bfloat16 weights: 2.1 GB with six layers."""
    return save_model(folder, transformers.Gemma2Config(**GEMMA_2_2B, num_hidden_layers=depth), torch.bfloat16)
