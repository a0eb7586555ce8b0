"""A language small enough to enumerate: 4 tokens, at most 4 of them a text, 3 prompts of unequal length, tiny real
transformers in float64. Every expectation over completions is a finite sum here, so laws are checked, not estimated.

Token 0 is padding *and* an ordinary token that is sampled like any other: masks come from lengths, never from ids.
"""

from __future__ import annotations

import copy
import functools
from itertools import product
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rlhf_fdiv import divergences
from rlhf_fdiv.models import Policy
from rlhf_fdiv.sequences import Sequences, pad, sequence_sum

torch.set_num_threads(1)

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
ARCHITECTURES = ("llama", "gpt2")
INF = float("inf")
every_architecture = ("architecture", ARCHITECTURES)

# every registered f, under each of the parameters that its proofs run with
_CLASSES = [divergences.divergence_class(name) for name in divergences.names()]
FS = [cls(**params) for cls in _CLASSES for params in cls.examples]
FINITE = [f for f in FS if f.f_prime_at_infinity < INF]


def tiny_lm(architecture: str = "llama", seed: int = 3, dropout: float = 0.0, vocab: int = VOCAB) -> nn.Module:
    """A random causal LM with hidden size 16 and 2 layers, far enough from uniform that every law has work to do."""
    torch.manual_seed(seed)
    if architecture == "llama":
        config = LlamaConfig(vocab_size=vocab, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                             num_attention_heads=2, max_position_embeddings=32, initializer_range=0.2,
                             attention_dropout=dropout, bos_token_id=None, eos_token_id=None, pad_token_id=None)  # fmt: skip
        lm: nn.Module = LlamaForCausalLM(config)
    else:
        config = GPT2Config(vocab_size=vocab, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.2,
                            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
                            bos_token_id=None, eos_token_id=None, pad_token_id=None)  # fmt: skip
        lm = GPT2LMHeadModel(config)
    return lm.double().eval()


def perturbed(lm: nn.Module, scale: float = 0.05, seed: int = 1) -> nn.Module:
    """A copy with Gaussian noise on every weight: a policy that is not its reference."""
    lm, generator = copy.deepcopy(lm), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in lm.parameters():
            weight += scale * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return lm


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


def sequences_of(prompts: list[list[int]], texts: list[list[int]]) -> Sequences:
    """One row a (prompt, text), padded as the library pads."""
    return Sequences(*pad(prompts, PAD, "left"), *pad(texts, PAD, "right"))


@functools.cache
def everything() -> Sequences:
    """All completions of all prompts, [P × N] rows, a prompt's in consecutive rows."""
    return sequences_of([p for p in PROMPTS for _ in TEXTS], TEXTS * P)


def exact_log_probs(policy: Policy) -> Tensor:
    """log π(y|x) of every text, [P, N]; raises where they do not make a distribution."""
    whole = everything()
    log_pi = sequence_sum(policy(whole).log_probs, whole.mask).view(P, N)
    assert torch.allclose(log_pi.exp().sum(1), torch.ones(P, dtype=torch.float64), rtol=0, atol=1e-12)
    return log_pi


@functools.cache
def language(architecture: str = "llama") -> tuple[Policy, Policy]:
    """A policy and the reference it has moved away from. Shared: clone what you change."""
    reference = tiny_lm(architecture)
    return Policy(perturbed(reference)), Policy(reference)


@functools.cache
def scores() -> dict[str, Tensor]:
    """A real reward and a pointwise constraint b ∈ {0, ½, 1}, zero for about a third of the texts; [P × N] each."""
    generator = torch.Generator().manual_seed(11)
    reward = torch.randn(P * N, generator=generator, dtype=torch.float64)
    return {"reward": reward, "b": torch.randint(0, 3, (P * N,), generator=generator).double() / 2}


def text_index(completion_ids: Tensor, mask: Tensor) -> Tensor:
    """The place in TEXTS of each sampled completion, [B]; raises for one that is not in the language."""
    digits = VOCAB + 1

    def code(ids: Tensor, keep: Tensor) -> Tensor:
        return ((ids + 1) * keep * digits ** torch.arange(ids.shape[1])).sum(1)

    known, order = code(*pad(TEXTS, PAD, "right")).sort()
    found = code(completion_ids.cpu(), mask.cpu())
    place = torch.searchsorted(known, found).clamp(max=N - 1)
    assert torch.equal(known[place], found), "a completion outside the language"
    return order[place]


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
