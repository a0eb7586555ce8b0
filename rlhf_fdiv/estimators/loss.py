"""The policy loss that every estimator shares, and what an estimator hands to it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Advantages(NamedTuple):
    """By token, [B, T]; `returns` is what a value head learns, None without one."""

    advantages: Tensor
    returns: Tensor | None = None


def policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float | None = None
) -> Tensor:
    """−Σ_t A_t·π/π_old, clipped as in PPO (arXiv 1707.06347, eq. 7) if `clip_range` is set; [B, T] each → [B].

    At π = π_old its gradient is −Σ_t A_t·∇log π_t, clipped or not. A sum over tokens, so no length is favoured.
    """
    ratio = (log_probs - old_log_probs).exp()
    gain = ratio * advantages
    if clip_range is not None:
        gain = torch.minimum(gain, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)
    return -(gain * mask).sum(-1)


def importance_weights(log_pi: Tensor, log_mu: Tensor, cap: float) -> Tensor:
    """min(π/μ, cap) of completions sampled from μ, [B] each: truncated, so that one of them cannot decide a step.

    π/μ is unbiased; the truncation (Ionides 2008) trades a bias towards the samples' own distribution for variance.
    """
    return (log_pi - log_mu).exp().clamp(max=cap)


def out_of_range(log_probs: Tensor, old_log_probs: Tensor, clip_range: float) -> Tensor:
    """Which tokens have a ratio outside the clip range, [B, T]."""
    return ((log_probs - old_log_probs).exp() - 1).abs() > clip_range
