"""What every f has: the base class with numeric defaults, the dual of any f, and c·f."""

from __future__ import annotations

import dataclasses
import inspect
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor


class Divergence:
    """Base of every f. A subclass gives `name`, `f`, `f_prime` and `f_prime_at_infinity`; everything else is derived
    numerically unless the subclass gives closed forms. Overriding `f` drops every closed form of the parent's f."""

    name: ClassVar[str]
    formula: ClassVar[str] = ""
    direction: ClassVar[str] = ""
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({},)  # the parameters under which the proofs run
    f_prime_at_infinity: ClassVar[Any]  # a float, lim f(t)/t: the price of a unit of mass where p = 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "f" not in cls.__dict__:
            return
        for needed in ("f_prime", "f_prime_at_infinity"):
            if needed not in cls.__dict__ and needed not in inspect.get_annotations(cls):
                raise TypeError(f"{cls.__name__} defines f but not {needed}: they belong to one f, give both")
        for derived in ("f_prime_inverse", "conjugate", "dual", "curvature", "f_at_zero", "summand"):
            if derived not in cls.__dict__:
                setattr(cls, derived, Divergence.__dict__[derived])

    def f(self, s: Tensor) -> Tensor:
        """f(e^s), any shape; s = −inf gives f(0)."""
        raise NotImplementedError

    def f_prime(self, s: Tensor) -> Tensor:
        """f'(e^s), any shape; s = +inf gives f'(∞)."""
        raise NotImplementedError

    def f_prime_inverse(self, u: Tensor) -> Tensor:
        """log t with f'(t) = u; −inf at or below the range of f', +inf at or above f'(∞). Default: bisection."""
        x = u.detach().double()
        near = torch.full_like(x, 700.0)  # e^s overflows beyond, which only an f' that is still short of u must bear
        low = torch.where(self.f_prime(-near) < x, -near, -1e5)
        high = torch.where(self.f_prime(near) < x, 1e5, near)
        beneath = x <= self.f_prime(low)
        for _ in range(110):
            middle = (low + high) / 2
            under = self.f_prime(middle) < x
            low, high = torch.where(under, middle, low), torch.where(under, high, middle)
        root = torch.where(beneath, -math.inf, (low + high) / 2)
        return torch.where(x >= self.f_prime_at_infinity, math.inf, root).to(u.dtype)

    def conjugate(self, u: Tensor) -> Tensor:
        """f*(u) = sup_{t ≥ 0} u·t − f(t); +inf above f'(∞). Default: through `f_prime_inverse`."""
        x = u.detach().double()
        s = self.f_prime_inverse(x)
        t_at = s.clamp(-700.0, 700.0)
        value = torch.where(s == -math.inf, -self.f_at_zero, x * t_at.exp() - self.f(t_at))
        value = torch.where(x >= self.f_prime_at_infinity, self._conjugate_at_top(), value)
        return torch.where((x > self.f_prime_at_infinity) | (x == math.inf), math.inf, value).to(u.dtype)

    def _conjugate_at_top(self) -> float:
        """f*(f'(∞)) = lim t·f'(t) − f(t), from three values of t by Aitken's extrapolation, exact for a power law."""
        s = torch.tensor([9.0, 12.0, 15.0], dtype=torch.float64)
        a, b, c = (s.exp() * self.f_prime(s) - self.f(s)).tolist()
        first, second = b - a, c - b
        if abs(second) <= 1e-9 * max(abs(c), 1.0):
            return c
        return math.inf if second >= 0.9 * first else c - second**2 / (second - first)

    def summand(self, s: Tensor) -> Tensor:
        """g(s) with E_π[g] = D_f(π‖p), for sampling: f(t)/t − c·(1/t − 1), which E_π[1/t] = 1 makes exact for any c.

        c = f(0) removes the heavy tail that 1/t has far from p; an f whose f(0) is out of proportion to its curvature
        (alpha near 0) would pay for that near p, and keeps c = 0.
        """
        c = self.f_at_zero
        c = 0.0 if c > 4 * self.curvature or math.isinf(c) else c
        g = self.dual().f(-s)
        g = g - c * torch.expm1(-s) if c else g
        return torch.where(s == math.inf, self.f_prime_at_infinity + c, g)

    def dual(self) -> Divergence:
        """f* with f*(t) = t·f(1/t), so that D_dual(p‖π) = D_f(π‖p)."""
        return Dual(self)

    @property
    def curvature(self) -> float:
        """f''(1); nan at a kink. Default: central differences."""
        wide, narrow = (
            float(self.f_prime(torch.tensor(h).double()) - self.f_prime(torch.tensor(-h).double())) / (2 * h)
            for h in (1e-4, 1e-5)
        )
        return math.nan if narrow > 2 * wide else narrow

    @property
    def f_at_zero(self) -> float:
        """f(0): the price of a unit of p where π = 0, which is the dual's f'(∞)."""
        return self.dual().f_prime_at_infinity

    def __repr__(self) -> str:
        return label(self)


@dataclass(frozen=True, repr=False)
class Dual(Divergence):
    """t·f(1/t) of any f, numerically."""

    of: Divergence
    name: ClassVar[str] = "dual"

    def f(self, s: Tensor) -> Tensor:
        return s.exp() * self.of.f(-s)

    def f_prime(self, s: Tensor) -> Tensor:
        return self.of.f(-s) - (-s).exp() * self.of.f_prime(-s)

    @cached_property
    def f_prime_at_infinity(self) -> float:
        # f(0), read far out in log t, where whatever has not settled grows without bound
        far, farther = (float(self.of.f(torch.tensor(x, dtype=torch.float64))) for x in (-1e150, -1e300))
        return farther if abs(farther - far) <= 1e-9 * max(abs(far), 1.0) else math.inf

    def dual(self) -> Divergence:
        return self.of


@dataclass(frozen=True, repr=False)
class Scaled(Divergence):
    """factor·f: with factor = 1/f''(1), every smooth f agrees to second order around π = p."""

    of: Divergence
    factor: float
    name: ClassVar[str] = "scaled"
    f_prime_at_infinity = property(lambda self: self.factor * self.of.f_prime_at_infinity)
    curvature = property(lambda self: self.factor * self.of.curvature)

    def f(self, s: Tensor) -> Tensor:
        return self.factor * self.of.f(s)

    def f_prime(self, s: Tensor) -> Tensor:
        return self.factor * self.of.f_prime(s)

    def f_prime_inverse(self, u: Tensor) -> Tensor:
        return self.of.f_prime_inverse(u / self.factor)

    def conjugate(self, u: Tensor) -> Tensor:
        return self.factor * self.of.conjugate(u / self.factor)

    def summand(self, s: Tensor) -> Tensor:
        return self.factor * self.of.summand(s)

    def dual(self) -> Divergence:
        return Scaled(self.of.dual(), self.factor)


def parameters(f: Divergence | type[Divergence]) -> list[str]:
    """The names of f's parameters, which are its YAML schema."""
    return [x.name for x in dataclasses.fields(f) if x.init] if dataclasses.is_dataclass(f) else []


def label(f: Divergence) -> str:
    """A name with its parameters, for tables: `alpha(alpha=0.3)`."""
    if type(f) is Scaled:
        return f"{f.factor:g}·{label(f.of)}"
    values = ", ".join(f"{name}={getattr(f, name)!r}" for name in parameters(f))
    return f.name + (f"({values})" if values else "")
