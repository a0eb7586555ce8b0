"""Where `regularise` leads: max_π E_π[r] − β·D_f(π‖a), solved exactly for any f on a language that can be enumerated.

    π* = a·[(f')⁻¹((r − λ(x))/β)]₊,      λ(x) from the dual  min_λ λ + β·E_a f*((r − λ)/β)

[·]₊ makes exact zeros where f' is finite at 0 (pearson_chi2, alpha > 1): a text whose (r − λ)/β lies below f'(0) gets no
mass at all. For reverse KL, and no other f, π* is the target a·exp(r/β)/Z of `match`..
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fdiv.divergences import Divergence, exact, label


class Optimum(NamedTuple):
    """log π* [..., V], −inf where π* is exactly zero; λ(x) and the value E_π*[r] − β·D_f(π*‖a), [...] each."""

    log_pi: Tensor
    lambda_: Tensor
    value: Tensor


@torch.no_grad()
def regularised_optimum(f: Divergence, log_a: Tensor, reward: Tensor, beta: float) -> Optimum:
    """The best of all π that are zero where a is; log a and r over all texts, [..., V] each, in float64 inside.

    The unknown is not λ but s₊ = log π*/a of the best texts, (r₊ − λ)/β = f'(s₊): near a finite f'(∞), λ would have to
    carry digits that float64 has not. The mass Σ a·t grows with s₊ and reaches 1 between t₊ = 1 and π*(best texts) = 1.
    Raises NotImplementedError for an f without (f')⁻¹ (tv), ValueError where its f' is flat or an input is none.
    """
    log_a, reward = torch.broadcast_tensors(log_a.double(), reward.double())
    support = log_a > -math.inf
    if not beta > 0 or not bool(reward[support].isfinite().all()):
        raise ValueError(f"regularise needs β > 0 and a finite reward wherever a > 0; β is {beta}")
    if not bool((torch.logsumexp(log_a, -1).abs() <= 1e-4).all()):
        raise ValueError("regularise needs log a of every text: these probabilities do not sum to 1")
    log_a = log_a.log_softmax(-1)
    best = reward.masked_fill(~support, -math.inf).amax(-1, keepdim=True)
    gap = torch.where(support, best - reward, 0.0)
    gap = torch.where(gap <= 1e-11 * gap.amax(-1, keepdim=True), 0.0, gap)  # a tie but for the digits of f'(s₊)

    def log_ratio(top: Tensor) -> Tensor:
        """log π/a of every text, given that of the best ones."""
        return torch.where(gap == 0, top, f.f_prime_inverse(f.f_prime(top) - gap / beta))

    high = -torch.logsumexp(log_a.masked_fill(gap > 0, -math.inf), -1, keepdim=True).clamp(max=0)
    low = torch.zeros_like(high)
    for _ in range(64):
        middle = (low + high) / 2
        short = torch.logsumexp(log_a + log_ratio(middle), -1, keepdim=True) < 0
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    log_pi = (log_a + log_ratio(high)).log_softmax(-1)
    best, slope = best.squeeze(-1), beta * f.f_prime(high).squeeze(-1)
    # rounded up: below best − β·f'(∞), which λ may meet to all its digits, the dual is infinite
    lambda_ = best - slope + 4 * torch.finfo(torch.float64).eps * (best.abs() + slope)
    value = best - (log_pi.exp() * gap).sum(-1) - beta * exact(f, log_pi, log_a)
    short_of = regularised_dual(f, log_a, best[..., None] - gap, beta, lambda_) - value
    if not bool((short_of <= 1e-8 * (1 + best.abs() + slope)).all()):
        raise ValueError(f"{label(f)}: no λ gives an optimum, so f' does not grow everywhere and π* is not unique")
    return Optimum(log_pi, lambda_, value)


def regularised_dual(f: Divergence, log_a: Tensor, reward: Tensor, beta: float, lambda_: Tensor) -> Tensor:
    """λ + β·E_a f*((r − λ)/β), [..., V] and λ [...] → [...]: at any λ no π has a larger value, and at λ(x) π* has it."""
    u = (reward.double() - lambda_[..., None]) / beta
    a = log_a.double().softmax(-1)
    return lambda_ + beta * torch.where(a > 0, a * f.conjugate(u), 0.0).sum(-1)
