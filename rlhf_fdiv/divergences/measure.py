"""D_f measured: exactly, from whole distributions, and from samples, with an interval or the reason for none."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fdiv.divergences.base import Divergence


def perspective(f: Divergence, log_pi: Tensor, log_p: Tensor) -> Tensor:
    """p·f(π/p), elementwise; f is only ever called at s ≤ 0 (π·f*(p/π) elsewhere), so nothing overflows early.

    Where p = 0 it is f'(∞)·π, where π = 0 it is f(0)·p. Differentiable in both arguments.
    """
    s = torch.where((log_pi == -math.inf) & (log_p == -math.inf), 0.0, log_pi - log_p)
    below, finite = s <= 0, s.isfinite()
    under = log_p.exp() * f.f(torch.where(below & finite, s, 0.0))
    over = log_pi.exp() * f.dual().f(torch.where(~below & finite, -s, 0.0))
    value = torch.where(below, under, over)
    value = torch.where(s == math.inf, _mass(f.f_prime_at_infinity, log_pi), value)
    return torch.where(s == -math.inf, _mass(f.f_at_zero, log_p), value)


def _mass(price: float, log_mass: Tensor) -> Tensor:
    return torch.full_like(log_mass, math.inf) if price == math.inf else price * log_mass.exp()


def exact(f: Divergence, log_pi: Tensor, log_p: Tensor) -> Tensor:
    """D_f(π‖p) in nats from whole distributions, [..., V] and [..., V] → [...], atoms of p = 0 and π = 0 included."""
    return perspective(f, log_pi, log_p).sum(-1)


class Estimate(NamedTuple):
    """A measured D_f in nats; `reason` is empty, or says why `value` and `standard_error` are withheld as nan."""

    value: float
    standard_error: float
    ess: float
    reason: str = ""


MAX_SKEWNESS = 0.6  # of the mean itself; docs/mathematics.md shows the coverage at which this withholds


def estimate(f: Divergence, log_pi: Tensor, log_p: Tensor, groups: Tensor | None = None) -> Estimate:
    """D_f(π‖p) from samples y ~ π: their log π(y) and log p(y), [N]; `groups` [N] are the clusters (prompts).

    Averages g = f(t)/t − f(0)·(1/t − 1) where f(0) is finite, f(t)/t otherwise. E_π[1/t] = 1 makes both exact, and the
    first removes the heavy tail of 1/t: it is the log-ratio itself (k1) for reverse KL and (1 − p/π)₊ for tv. Both lose
    f(0)·p(π = 0), which a softmax does not have. The interval is withheld where the central limit cannot be trusted:
    the mean would be too skewed even if s were normal, or the weights p/π do not average 1. `ess` is that of p/π.
    """
    if log_pi.shape != log_p.shape or log_pi.ndim != 1 or len(log_pi) < 2:
        raise ValueError(f"estimate needs two vectors of N ≥ 2 log-probs, not {[*log_pi.shape]} and {[*log_p.shape]}")
    s = log_pi.detach().double() - log_p.detach().double()
    if s.isnan().any():
        raise ValueError("estimate: a log-ratio is nan")
    groups = torch.arange(len(s)) if groups is None else torch.as_tensor(groups).cpu()
    s = s.cpu()
    weights = (-s).exp()
    ess = float(weights.sum() ** 2 / (weights**2).sum()) if weights.any() else 0.0
    g = _from_policy(f, s)
    value, error = float(g.mean()), clustered_error(g, groups)
    if not math.isfinite(value):
        return Estimate(value, math.nan, ess)
    spread = float(g.std())
    samples = len(s) * min(1.0, (spread / math.sqrt(len(s)) / error) ** 2) if error else len(s)
    skewness = _normal_skewness(f, s[s.isfinite()])
    drift = abs(float(weights.mean()) - 1) / max(clustered_error(weights, groups), 1e-12)
    if skewness / math.sqrt(samples) > MAX_SKEWNESS:
        return Estimate(math.nan, math.nan, ess, f"not measurable: too heavy a tail for {samples:.0f} samples")
    if f.f_at_zero == math.inf and drift > 4 and abs(float(weights.mean()) - 1) > 1e-6:
        return Estimate(math.nan, math.nan, ess, f"not measurable: p/π averages {float(weights.mean()):.2g}, not 1")
    return Estimate(value, error, ess)


def _from_policy(f: Divergence, s: Tensor) -> Tensor:
    f0 = f.f_at_zero
    g = f.dual().f(-s)
    g = g - f0 * torch.expm1(-s) if math.isfinite(f0) else g
    return torch.where(s == math.inf, f.f_prime_at_infinity, g)


def _normal_skewness(f: Divergence, s: Tensor) -> float:
    """The skewness that g would have if s were normal with the sample's mean and spread."""
    if len(s) < 2 or not float(s.std()):
        return 0.0
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    w = torch.softmax(-(z**2) / 2, 0)
    g = _from_policy(f, s.mean() + s.std() * z)
    centred = g - (w * g).sum()
    third, variance = float((w * centred**3).sum()), float((w * centred**2).sum())
    return abs(third) / variance**1.5 if 0 < variance < math.inf else (math.inf if variance else 0.0)


def clustered_error(x: Tensor, groups: Tensor) -> float:
    """The standard error of mean(x) when the samples of one group are dependent; [N], [N] → float."""
    _, index = torch.unique(groups, return_inverse=True)
    count = int(index.max()) + 1
    if count < 2:
        return math.nan
    residual = torch.zeros(count, dtype=torch.float64).index_add(0, index, (x - x.mean()).double())
    return math.sqrt(float((residual**2).sum()) * count / (count - 1)) / len(x)
