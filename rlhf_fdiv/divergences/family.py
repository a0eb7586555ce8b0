"""The f's themselves, each a frozen dataclass in normal form, written in s = log t; the table is in
docs/mathematics.md."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlhf_fdiv.divergences.base import Divergence, Scaled


def _expm1_minus(x: Tensor) -> Tensor:
    """e^x − 1 − x without cancellation near 0: the generator that every smooth f below is made of."""
    near = x.abs() < 0.1
    z = torch.where(near, x, 0.0)
    tail = torch.zeros_like(z)
    for k in range(12 if x.dtype == torch.float64 else 7, 2, -1):
        tail = (1 + tail) * z / k
    return torch.where(near, z * z / 2 * (1 + tail), torch.expm1(x) - x)


def _t_log_t(s: Tensor) -> Tensor:
    """t ln t − t + 1 = t·(e^−s − 1 + s), without cancellation near 0 and without overflow far below it."""
    near = s.abs() < 0.1
    z = torch.where(near, s, 0.0)
    far = s.clamp(min=-1e4)
    return torch.where(near, z.exp() * _expm1_minus(-z), 1 + far.exp() * (far - 1))


def _log_mix(s: Tensor, w: float) -> Tensor:
    """log(w·e^s + 1 − w): accurate near 0, and finite with its gradient far from it."""
    near = s.abs() < 1
    z = torch.where(near, s, 0.0)
    return torch.where(
        near, torch.log1p(w * torch.expm1(z)), torch.logaddexp(s + math.log(w), s.new_tensor(math.log1p(-w)))
    )


@dataclass(frozen=True, repr=False)
class ReverseKL(Divergence):
    """KL(π‖p), mode seeking: the KL of RLHF and of PPO's penalty."""

    name: ClassVar[str] = "reverse_kl"
    formula: ClassVar[str] = "t ln t − t + 1"
    direction: ClassVar[str] = "KL(π‖p), mode seeking"
    f_prime_at_infinity: ClassVar[float] = math.inf
    curvature: ClassVar[float] = 1.0

    def f(self, s: Tensor) -> Tensor:
        return _t_log_t(s)

    def f_prime(self, s: Tensor) -> Tensor:
        return s

    def f_prime_inverse(self, u: Tensor) -> Tensor:
        return u

    def conjugate(self, u: Tensor) -> Tensor:
        return torch.expm1(u)

    def dual(self) -> Divergence:
        return ForwardKL()

    def summand(self, s: Tensor) -> Tensor:
        return s  # k1, without the rounding of f(t)/t + (1 − 1/t)


@dataclass(frozen=True, repr=False)
class ForwardKL(Divergence):
    """KL(p‖π), mass covering: the KL of maximum likelihood, distributional tuning (GDC) and distillation."""

    name: ClassVar[str] = "forward_kl"
    formula: ClassVar[str] = "−ln t + t − 1"
    direction: ClassVar[str] = "KL(p‖π), mass covering"
    f_prime_at_infinity: ClassVar[float] = 1.0
    curvature: ClassVar[float] = 1.0

    def f(self, s: Tensor) -> Tensor:
        return _expm1_minus(s)

    def f_prime(self, s: Tensor) -> Tensor:
        return -torch.expm1(-s)

    def f_prime_inverse(self, u: Tensor) -> Tensor:
        return -torch.log1p(-u.clamp(max=1))

    def conjugate(self, u: Tensor) -> Tensor:
        return torch.where(u > 1, math.inf, self.f_prime_inverse(u))

    def dual(self) -> Divergence:
        return ReverseKL()


@dataclass(frozen=True, repr=False)
class SkewJS(Divergence):
    """w·KL(π‖m) + (1−w)·KL(p‖m) with m = w·π + (1−w)·p, 0 < w < 1; bounded, symmetric at w = ½."""

    w: float = 0.5
    name: ClassVar[str] = "skew_js"
    formula: ClassVar[str] = "w t ln t − (wt+1−w) ln(wt+1−w)"
    direction: ClassVar[str] = "w·KL(π‖m) + (1−w)·KL(p‖m), m = wπ + (1−w)p"
    examples: ClassVar = ({"w": 0.1}, {"w": 0.5}, {"w": 0.8})
    f_prime_at_infinity = property(lambda self: -self.w * math.log(self.w))
    curvature = property(lambda self: self.w * (1 - self.w))

    def __post_init__(self) -> None:
        if not 0 < self.w < 1:
            raise ValueError(f"skew_js: w must lie strictly between 0 and 1, not {self.w}")

    def _log_to_m(self, s: Tensor) -> Tensor:
        """log π/m; log p/m is the same function of −s with 1−w."""
        return -_log_mix(-s, 1 - self.w)

    def f(self, s: Tensor) -> Tensor:
        log_m = _log_mix(s, self.w)  # log m/p
        return self.w * log_m.exp() * _t_log_t(self._log_to_m(s)) + (1 - self.w) * _expm1_minus(log_m)

    def f_prime(self, s: Tensor) -> Tensor:
        return self.w * self._log_to_m(s)

    def f_prime_inverse(self, u: Tensor) -> Tensor:
        v = (u / self.w).clamp(max=-math.log(self.w))
        s = math.log1p(-self.w) + v - torch.log1p(-self.w * v.exp())
        return torch.where(u >= self.f_prime_at_infinity, math.inf, s)

    def conjugate(self, u: Tensor) -> Tensor:
        v = (u / self.w).clamp(max=-math.log(self.w))
        value = (1 - self.w) * (math.log1p(-self.w) - torch.log1p(-self.w * v.exp()))
        return torch.where(u >= self.f_prime_at_infinity, math.inf, value)

    def dual(self) -> Divergence:
        return SkewJS(1 - self.w)


@dataclass(frozen=True, repr=False)
class JS(Scaled):
    """2·JSD(π, p), the scale of GANs and of f-DPG: KL(π‖m) + KL(p‖m) with m = (π+p)/2; symmetric, at most 2 ln 2."""

    of: Divergence = dataclasses.field(default=SkewJS(0.5), init=False)
    factor: float = dataclasses.field(default=2.0, init=False)
    name: ClassVar[str] = "js"
    formula: ClassVar[str] = "t ln t − (t+1) ln((t+1)/2)"
    direction: ClassVar[str] = "symmetric; between mode seeking and mass covering"

    def dual(self) -> Divergence:
        return self


@dataclass(frozen=True, repr=False)
class TotalVariation(Divergence):
    """½ Σ|π − p|: symmetric, bounded by 1, with a kink at t = 1 (no curvature, no inverse of f')."""

    name: ClassVar[str] = "tv"
    formula: ClassVar[str] = "½|t − 1|"
    direction: ClassVar[str] = "symmetric; ½ Σ|π − p|"
    f_prime_at_infinity: ClassVar[float] = 0.5
    curvature: ClassVar[float] = math.nan

    def f(self, s: Tensor) -> Tensor:
        return torch.expm1(s).abs() / 2

    def f_prime(self, s: Tensor) -> Tensor:
        return torch.sign(s) / 2

    def f_prime_inverse(self, u: Tensor) -> Tensor:
        raise NotImplementedError("tv: f' takes only the values −½, 0 and ½, so it has no inverse")

    def conjugate(self, u: Tensor) -> Tensor:
        return torch.where(u > 0.5, math.inf, u.clamp(min=-0.5))

    def dual(self) -> Divergence:
        return self


@dataclass(frozen=True, repr=False)
class PearsonChi2(Divergence):
    """χ²(π‖p) = E_p[(π/p − 1)²]: punishes π where p is small."""

    name: ClassVar[str] = "pearson_chi2"
    formula: ClassVar[str] = "(t − 1)²"
    direction: ClassVar[str] = "χ²(π‖p) = E_p[(π/p − 1)²]"
    f_prime_at_infinity: ClassVar[float] = math.inf
    curvature: ClassVar[float] = 2.0

    def f(self, s: Tensor) -> Tensor:
        return torch.expm1(s) ** 2

    def f_prime(self, s: Tensor) -> Tensor:
        return 2 * torch.expm1(s)

    def f_prime_inverse(self, u: Tensor) -> Tensor:
        return torch.log1p(u.clamp(min=-2) / 2)

    def conjugate(self, u: Tensor) -> Tensor:
        v = u.clamp(min=-2)
        return v + v**2 / 4

    def dual(self) -> Divergence:
        return NeymanChi2()


@dataclass(frozen=True, repr=False)
class NeymanChi2(Divergence):
    """χ²(p‖π) = E_π[(p/π − 1)²]: punishes π for leaving out what p contains."""

    name: ClassVar[str] = "neyman_chi2"
    formula: ClassVar[str] = "(1 − t)²/t"
    direction: ClassVar[str] = "χ²(p‖π) = E_π[(p/π − 1)²]"
    f_prime_at_infinity: ClassVar[float] = 1.0
    curvature: ClassVar[float] = 2.0

    def f(self, s: Tensor) -> Tensor:
        return (2 * torch.sinh(s / 2)) ** 2

    def f_prime(self, s: Tensor) -> Tensor:
        return -torch.expm1(-2 * s)

    def f_prime_inverse(self, u: Tensor) -> Tensor:
        return -torch.log1p(-u.clamp(max=1)) / 2

    def conjugate(self, u: Tensor) -> Tensor:
        return torch.where(u > 1, math.inf, -2 * torch.expm1(torch.log1p(-u.clamp(max=1)) / 2))

    def dual(self) -> Divergence:
        return PearsonChi2()


@dataclass(frozen=True, repr=False)
class Hellinger(Divergence):
    """H² = 1 − Σ√(π·p) = ½ Σ(√π − √p)²: symmetric, bounded by 1."""

    name: ClassVar[str] = "hellinger"
    formula: ClassVar[str] = "½(√t − 1)²"
    direction: ClassVar[str] = "symmetric; H² = 1 − Σ√(πp)"
    f_prime_at_infinity: ClassVar[float] = 0.5
    curvature: ClassVar[float] = 0.25

    def f(self, s: Tensor) -> Tensor:
        return torch.expm1(s / 2) ** 2 / 2

    def f_prime(self, s: Tensor) -> Tensor:
        return -torch.expm1(-s / 2) / 2

    def f_prime_inverse(self, u: Tensor) -> Tensor:
        return -2 * torch.log1p(-2 * u.clamp(max=0.5))

    def conjugate(self, u: Tensor) -> Tensor:
        return torch.where(u > 0.5, math.inf, torch.expm1(-torch.log1p(-2 * u.clamp(max=0.5))) / 2)

    def dual(self) -> Divergence:
        return self


@dataclass(frozen=True, repr=False)
class Alpha(Divergence):
    """Amari's family in the convention of f-DPG: α → 1 is KL(π‖p), α → 0 is KL(p‖π), α = 2 is ½χ²(π‖p), α = ½ is 4·H².
    Continuous in α, in value and slope, through 0 and 1."""

    alpha: float = 0.5
    name: ClassVar[str] = "alpha"
    formula: ClassVar[str] = "(t^α − αt − 1 + α)/(α(α−1))"
    direction: ClassVar[str] = "α → 1: KL(π‖p); α → 0: KL(p‖π)"
    examples: ClassVar = tuple({"alpha": a} for a in (-1.0, 0.0, 1e-6, 0.3, 0.5, 0.9, 1.0, 1 + 1e-6, 2.0, 3.0))
    f_prime_at_infinity = property(lambda self: 1 / (1 - self.alpha) if self.alpha < 1 else math.inf)
    curvature: ClassVar[float] = 1.0

    def f(self, s: Tensor) -> Tensor:
        a = self.alpha
        if a > 0.5:  # t·f_{1−α}(1/t) near t = 1, where the plain form cancels
            near, far = s.abs() < 1, s.clamp(min=-150.0)
            plain = (1 + far.exp() * (_expm1_over(far, a - 1) - 1)) / a
            z = torch.where(near, s, 0.0)
            return torch.where(near, z.exp() * Alpha(1 - a).f(-z), plain)
        near = s.abs() < 1
        z = torch.where(near, s, 0.0)
        shrunk = _expm1_minus(a * z) / a if a else torch.zeros_like(z)
        return torch.where(near, _expm1_minus(z) - shrunk, torch.expm1(s) - _expm1_over(s, a)) / (1 - a)

    def f_prime(self, s: Tensor) -> Tensor:
        return _expm1_over(s, self.alpha - 1)

    def f_prime_inverse(self, u: Tensor) -> Tensor:
        c = self.alpha - 1
        return torch.log1p((c * u).clamp(min=-1)) / c if c else u

    def conjugate(self, u: Tensor) -> Tensor:
        return torch.where(u > self.f_prime_at_infinity, math.inf, _expm1_over(self.f_prime_inverse(u), self.alpha))

    def dual(self) -> Divergence:
        return Alpha(1 - self.alpha)


def _expm1_over(s: Tensor, c: float) -> Tensor:
    """(e^{cs} − 1)/c, which tends to s as c → 0."""
    return torch.expm1(c * s) / c if c else s


@dataclass(frozen=True, repr=False)
class Jeffreys(Divergence):
    """KL(π‖p) + KL(p‖π)."""

    name: ClassVar[str] = "jeffreys"
    formula: ClassVar[str] = "(t − 1) ln t"
    direction: ClassVar[str] = "symmetric; KL(π‖p) + KL(p‖π)"
    f_prime_at_infinity: ClassVar[float] = math.inf
    curvature: ClassVar[float] = 2.0

    def f(self, s: Tensor) -> Tensor:
        return s * torch.expm1(s)

    def f_prime(self, s: Tensor) -> Tensor:
        return s - torch.expm1(-s)

    def dual(self) -> Divergence:
        return self


@dataclass(frozen=True, repr=False)
class Mixture(Divergence):
    """Σ wᵢ·fᵢ, wᵢ ≥ 0: `{name: mixture, components: [js, {name: alpha, alpha: 2}], weights: [1, 0.1]}`."""

    components: tuple[Divergence, ...] = (ForwardKL(), ReverseKL())
    weights: tuple[float, ...] = (0.5, 0.5)
    name: ClassVar[str] = "mixture"
    formula: ClassVar[str] = "Σ wᵢ fᵢ"
    direction: ClassVar[str] = "as its components"
    f_prime_at_infinity = property(lambda self: self._sum(lambda f: f.f_prime_at_infinity))
    curvature = property(lambda self: self._sum(lambda f: f.curvature))

    def __post_init__(self) -> None:
        if len(self.components) != len(self.weights) or min(self.weights, default=-1) < 0 or not sum(self.weights):
            raise ValueError(f"mixture: one weight ≥ 0 for each component and one above 0, not {self.weights}")

    def _sum(self, of: Any) -> Any:
        return sum(w * of(f) for w, f in zip(self.weights, self.components, strict=True) if w)

    def f(self, s: Tensor) -> Tensor:
        return self._sum(lambda f: f.f(s))

    def f_prime(self, s: Tensor) -> Tensor:
        return self._sum(lambda f: f.f_prime(s))

    def dual(self) -> Divergence:
        return Mixture(tuple(f.dual() for f in self.components), self.weights)


@dataclass(frozen=True, repr=False)
class ChiMix(Mixture):
    """½χ²(π‖p) + KL(π‖p): Pearson's guard against over-optimisation, with the f'(0⁺) = −∞ that `prefer` needs (χPO)."""

    components: tuple[Divergence, ...] = dataclasses.field(default=(PearsonChi2(), ReverseKL()), init=False)
    weights: tuple[float, ...] = dataclasses.field(default=(0.5, 1.0), init=False)
    name: ClassVar[str] = "chi_mix"
    formula: ClassVar[str] = "½(t−1)² + t ln t − t + 1"
    direction: ClassVar[str] = "½χ²(π‖p) + KL(π‖p)"


FAMILY: tuple[type[Divergence], ...] = (
    ReverseKL, ForwardKL, JS, TotalVariation, PearsonChi2, NeymanChi2, Hellinger, Alpha, Jeffreys, ChiMix, SkewJS,
    Mixture,
)  # fmt: skip
