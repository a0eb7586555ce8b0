"""The packaged language (rlhf_fdiv/toy.py), and what only the tests need beside it."""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from rlhf_fdiv import divergences
from rlhf_fdiv.models import Policy
from rlhf_fdiv.toy import (
    EOS,
    LENGTH,
    PAD,
    PROMPTS,
    TEXTS,
    TOKENIZER,
    VOCAB,
    N,
    P,
    everything,
    exact_log_probs,
    perturbed,
    scores,
    text_index,
    tiny_lm,
)

__all__ = [
    "ARCHITECTURES",
    "EOS",
    "FINITE",
    "FS",
    "INF",
    "LENGTH",
    "PAD",
    "PROMPTS",
    "TEXTS",
    "TOKENIZER",
    "VOCAB",
    "N",
    "P",
    "change_adapter",
    "every_architecture",
    "everything",
    "exact_log_probs",
    "gradient",
    "label",
    "language",
    "perturbed",
    "scores",
    "text_index",
    "tiny_lm",
    "trainable",
    "with_adapter",
]

torch.set_num_threads(1)

ARCHITECTURES = ("llama", "gpt2")
INF = float("inf")
every_architecture = ("architecture", ARCHITECTURES)

# every registered f, under each of the parameters that its proofs run with
_CLASSES = [divergences.divergence_class(name) for name in divergences.names()]
FS = [cls(**params) for cls in _CLASSES for params in cls.examples]
FINITE = [f for f in FS if f.f_prime_at_infinity < INF]


def with_adapter(lm: nn.Module, scale: float = 0.3, seed: int = 2) -> nn.Module:
    """A LoRA on every linear layer, its B not zero: a policy that has been trained."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", fan_in_fan_out=isinstance(lm, GPT2LMHeadModel))
    adapted = get_peft_model(copy.deepcopy(lm), config).eval()
    change_adapter(adapted, scale, seed)
    return adapted


def change_adapter(adapted: nn.Module, scale: float = 0.3, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight += scale * torch.randn(weight.shape, generator=generator).to(weight.dtype)


@functools.cache
def language(architecture: str = "llama") -> tuple[Policy, Policy]:
    """A policy and the reference it has moved away from. Shared: clone what you change."""
    reference = tiny_lm(architecture)
    return Policy(perturbed(reference)), Policy(reference)


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def gradient(loss: Tensor, module: nn.Module) -> Tensor:
    """∇loss over all trainable weights as one vector; the graph is kept."""
    parameters = trainable(module)
    grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    pairs = zip(parameters, grads, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])


def label(x: object) -> str:
    return divergences.label(x)[:34] if isinstance(x, divergences.Divergence) else str(getattr(x, "name", x))
