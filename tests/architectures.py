"""Tiny random models of the families that docs/models.md names: 2 layers, 32 wide, with the traps that each is known for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

SHARED = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "max_position_embeddings": 64,
          "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}  # fmt: skip
GLU = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {},  # absolute positions
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},  # absolute positions, counted from the mask, two rows further
    "gpt_neox": {"intermediate_size": 48, "tie_word_embeddings": False},  # Pythia: parallel blocks, a quarter rotary
    "llama": GLU,
    "mistral": GLU | {"sliding_window": 4},  # every layer sees four tokens, less than a prompt
    "qwen2": GLU | WINDOW | {"use_sliding_window": True, "max_window_layers": 1, "tie_word_embeddings": True},
    "qwen3": GLU,  # norms of queries and keys
    # embeddings tied and scaled, soft caps of scores and logits, a window
    "gemma2": GLU | WINDOW | {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3_text": GLU | WINDOW | {"query_pre_attn_scalar": 8},  # two rotary bases
}  # fmt: skip


def tiny_config(architecture: str, vocab: int, **ids: int | None) -> Any:
    return AutoConfig.for_model(architecture, vocab_size=vocab, **SHARED | SIZES[architecture] | ids)


def tiny_model(architecture: str, vocab: int, **ids: int | None) -> nn.Module:
    """With weights of seed 3, in float32 and eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return AutoModelForCausalLM.from_config(tiny_config(architecture, vocab, **ids)).eval()
