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


class _Figures(NamedTuple):
    value: float
    standard_error: float
    ess: float


class Estimate(_Figures):
    """(value, standard_error, ess) of a measured D_f, in nats; `reason` is empty, or says why the first two are nan."""

    reason: str

    def __new__(cls, value: float, standard_error: float, ess: float, reason: str = "") -> Estimate:
        estimate = super().__new__(cls, value, standard_error, ess)
        estimate.reason = reason
        return estimate


MAX_SKEWNESS = 0.4  # of the mean itself; chosen by simulation, see the coverage in docs/mathematics.md


def estimate(f: Divergence, log_pi: Tensor, log_p: Tensor, groups: Tensor | None = None) -> Estimate:
    """D_f(π‖p) from samples y ~ π: their log π(y) and log p(y), [N]; `groups` [N] are the clusters (prompts).

    Averages `f.summand`, which is the log-ratio itself (k1) for reverse KL and (1 − p/π)₊ for tv. Mass of p where π = 0
    is not seen; a softmax has none. The interval is withheld where the central limit cannot be trusted: the mean would
    be too skewed even if s were normal, or the weights p/π do not average 1. A smaller skewness still costs a 95 % interval
    coverage, and the error is widened for it by (z⁴ + 2z² − 3)/18 = 1.08 times the squared skewness of the mean (Hall 1992,
    Edgeworth expansion of Student's statistic). `ess` is that of the weights p/π.
    Raises ValueError for other shapes, a nan log-ratio, or a sample of probability zero.
    """
    if log_pi.shape != log_p.shape or log_pi.ndim != 1 or len(log_pi) < 2:
        raise ValueError(f"estimate needs two vectors of N ≥ 2 log-probs, not {[*log_pi.shape]} and {[*log_p.shape]}")
    s = (log_pi.detach().double() - log_p.detach().double()).cpu()
    groups = torch.arange(len(s)) if groups is None else torch.as_tensor(groups).cpu()
    if groups.shape != s.shape:
        raise ValueError(f"estimate needs one group for each of the {len(s)} samples, not shape {[*groups.shape]}")
    if s.isnan().any() or bool((log_pi == -math.inf).any()):
        raise ValueError("estimate: a log-ratio is nan, or a sample has probability zero under the policy")
    weights = (-s).exp()
    ess = float(weights.sum() ** 2 / (weights**2).sum()) if 0 < float((weights**2).sum()) < math.inf else 0.0
    g = f.summand(s)
    value, error = float(g.mean()), clustered_error(g, groups)
    alone = float(g.std()) / math.sqrt(len(s))  # the error that as many independent samples would have
    skewness = _normal_skewness(f, s) / math.sqrt(len(s)) * max(1.0, error / alone if alone else 1.0)  # of the mean
    error *= 1 + 1.08 * min(skewness, 1.0) ** 2
    if value == math.inf and bool((s == math.inf).any()):
        return Estimate(value, math.nan, ess)  # mass of π where p = 0, at an infinite price
    reason = _why_not(f, g, groups, weights, error, skewness)
    return Estimate(math.nan, math.nan, ess, f"not measurable: {reason}") if reason else Estimate(value, error, ess)


def _why_not(f: Divergence, g: Tensor, groups: Tensor, weights: Tensor, error: float, skewness: float) -> str:
    if math.isnan(error):
        return "all samples are of one group" if bool(g.isfinite().all()) else "a sample's p/π is out of range"
    if skewness > MAX_SKEWNESS:
        return f"too heavy a tail for {len(g)} samples"
    off = abs(float(weights.mean()) - 1)
    if f.f_at_zero == math.inf and off > 1e-6 and off > 4 * clustered_error(weights, groups):
        return f"p/π averages {float(weights.mean()):.2g}, not 1"
    return ""


def _normal_skewness(f: Divergence, s: Tensor) -> float:
    """The skewness that the summand would have if s were normal with the sample's mean, spread and share of p = 0."""
    inside = s[s.isfinite()]
    if len(inside) < 2 or not float(inside.std()):
        return 0.0
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    share = len(inside) / len(s)
    w = torch.cat([torch.softmax(-(z**2) / 2, 0) * share, torch.tensor([1 - share])])
    g = f.summand(torch.cat([inside.mean() + inside.std() * z, torch.tensor([math.inf])]))
    g = torch.where(w > 0, g, 0.0)
    centred = g - (w * g).sum()
    largest = centred.abs().max()  # that the powers of its unit neither overflow nor vanish
    if not largest.isfinite():
        return math.inf
    unit = centred / largest if largest > 0 else centred
    third, variance = float((w * unit**3).sum()), float((w * unit**2).sum())
    return abs(third) / variance**1.5 if variance > 0 else 0.0


def clustered_error(x: Tensor, groups: Tensor) -> float:
    """The standard error of mean(x) when the samples of one group are dependent, nan of fewer than two; [N], [N] → float."""
    kinds, index = torch.unique(groups, return_inverse=True)
    count = len(kinds)
    if count < 2:
        return math.nan
    residual = torch.zeros(count, dtype=torch.float64).index_add(0, index, (x - x.mean()).double())
    return math.sqrt(float((residual**2).sum()) * count / (count - 1)) / len(x)
