"""A language small enough to enumerate: 4 tokens, at most 4 of them a text, 3 prompts of unequal length, tiny real
transformers in float64. Every expectation over completions is a finite sum here, so laws are checked, not estimated.

Token 0 is padding *and* an ordinary token that is sampled like any other: masks come from lengths, never from ids.
"""

from __future__ import annotations

import copy
import functools
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rlhf_fdiv.models import Policy
from rlhf_fdiv.sequences import Sequences, pad, sequence_sum

PAD, EOS, VOCAB, LENGTH = 0, 3, 4, 4
PROMPTS = [[1], [2, 0, 1], [1, 2]]
TOKENIZER = SimpleNamespace(eos_token_id=EOS, pad_token_id=PAD)
TEXTS = [
    [*body, *end]
    for n in range(LENGTH + 1)
    for body in product([t for t in range(VOCAB) if t != EOS], repeat=n)
    for end in ([[EOS]] if n < LENGTH else [[]])
]
P, N = len(PROMPTS), len(TEXTS)  # 3 prompts with 1 + 3 + 9 + 27 + 81 = 121 completions each


def tiny_lm(architecture: str = "llama", seed: int = 3, dropout: float = 0.0, vocab: int = VOCAB) -> nn.Module:
    """A random causal LM with hidden size 16 and 2 layers, far enough from uniform that every law has work to do.

    `gpt2` is in float64 throughout and its positions are absolute, so that wrong ones under left padding show; `llama`
    takes its norms in float32, in the backward pass too, which bounds any agreement at about 1e-7.
    """
    torch.manual_seed(seed)
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    lm: Any
    if architecture == "llama":
        lm = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                          num_attention_heads=2, max_position_embeddings=32, initializer_range=0.2,
                                          attention_dropout=dropout, **ids))  # fmt: skip
    else:
        lm = GPT2LMHeadModel(GPT2Config(vocab_size=vocab, n_embd=16, n_layer=2, n_head=2, n_positions=32,
                                        initializer_range=0.2, resid_pdrop=dropout, embd_pdrop=dropout,
                                        attn_pdrop=dropout, **ids))  # fmt: skip
    return lm.double().eval()


def perturbed(lm: nn.Module, scale: float = 0.05, seed: int = 1) -> nn.Module:
    """A copy with Gaussian noise on every weight: a policy that is not its reference."""
    lm, generator = copy.deepcopy(lm), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in lm.parameters():
            weight.add_(scale * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    return lm


@functools.cache
def everything() -> Sequences:
    """All completions of all prompts, [P × N] rows, a prompt's in consecutive rows."""
    return Sequences.of([p for p in PROMPTS for _ in TEXTS], TEXTS * P)


def exact_log_probs(policy: Policy) -> Tensor:
    """log π(y|x) of every text, [P, N]; raises where they do not make a distribution."""
    whole = everything()
    log_pi = sequence_sum(policy(whole).log_probs, whole.mask).view(P, N)
    assert torch.allclose(log_pi.exp().sum(1), torch.ones(P, dtype=torch.float64), rtol=0, atol=1e-12)
    return log_pi


@functools.cache
def scores() -> dict[str, Tensor]:
    """A reward that is a sum over tokens, a pointwise constraint b ∈ {0, ½, 1}, zero for about a third of the texts, and
    whether a text holds token 1; [P × N] each."""
    worth = (0.1, 0.7, -0.2, 0.2)
    rows = {
        "reward": [sum(worth[token] for token in text) for text in TEXTS],
        "b": [0.0 if text[0] == 2 else 0.5 if 0 in text else 1.0 for text in TEXTS],
        "has_1": [float(1 in text) for text in TEXTS],
    }
    return {name: torch.tensor(values, dtype=torch.float64).repeat(P) for name, values in rows.items()}


def text_index(completion_ids: Tensor, mask: Tensor) -> Tensor:
    """The place in TEXTS of each sampled completion, [B]; ValueError for one that is not in the language."""
    digits = VOCAB + 1

    def code(ids: Tensor, keep: Tensor) -> Tensor:
        return ((ids + 1) * keep * digits ** torch.arange(ids.shape[1])).sum(1)

    known, order = code(*pad(TEXTS, PAD, "right")).sort()
    found = code(completion_ids.cpu(), mask.cpu())
    place = torch.searchsorted(known, found).clamp(max=N - 1)
    if not torch.equal(known[place], found):
        raise ValueError("a completion outside the language")
    return order[place]
