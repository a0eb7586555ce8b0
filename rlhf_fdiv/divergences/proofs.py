"""What makes an f usable: the proofs that `register` and the tests run on every f."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_fdiv.divergences.base import Divergence, label
from rlhf_fdiv.divergences.measure import exact

_S = torch.cat([torch.linspace(-20, 20, 401), torch.tensor([-1e-3, 1e-3, 1e-6, -1e-6])]).double().sort().values


def check(f: Divergence) -> list[str]:
    """The failed proofs of `f`, each in a sentence that names what is wrong; empty when f is sound."""
    failures = []
    for proof in (_normal_form, _slope, _convexity, _infinity, _inverse, _conjugate, _dual, _curvature, _finite):
        try:
            message = proof(f)
        except NotImplementedError as gap:
            message = None if proof in (_inverse, _conjugate) else f"not implemented: {gap}"
        except Exception as error:
            message = f"{proof.__name__.strip('_')}: raised {type(error).__name__}: {error}"
        if message:
            failures.append(f"{label(f)}: {message}")
    return failures


def _close(a: Tensor, b: Tensor, rtol: float = 1e-6, atol: float = 1e-9) -> bool:
    both = a.isfinite() & b.isfinite()
    same_infinity = (a == b) | both
    return bool(same_infinity.all()) and bool(torch.allclose(a[both], b[both], rtol=rtol, atol=atol))


def _normal_form(f: Divergence) -> str | None:
    zero = torch.zeros(1, dtype=torch.float64)
    if abs(float(f.f(zero))) > 1e-12 or abs(float(f.f_prime(zero))) > 1e-12:
        return f"not in normal form: f(1) = {float(f.f(zero)):g}, f'(1) = {float(f.f_prime(zero)):g}, both must be 0"
    return "f is negative somewhere" if bool((f.f(_S) < -1e-12).any()) else None


def _slope(f: Divergence) -> str | None:
    s = _S[_S.abs() > 0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(f.f(s).sum(), s)
    declared = f.f_prime(s.detach()) * s.detach().exp()
    wrong = ~torch.isclose(slope, declared, rtol=1e-5, atol=1e-8 * float(slope.abs().clamp(max=1).max()))
    return f"f' is not the slope of f at t = {float(s.detach()[wrong][0].exp()):g}" if bool(wrong.any()) else None


def _convexity(f: Divergence) -> str | None:
    slope = f.f_prime(_S)
    falls = slope.diff() < -1e-9 * (1 + slope[1:].abs())
    return "f' decreases with t, so f is not convex" if bool(falls.any()) else None


def _infinity(f: Divergence) -> str | None:
    far = torch.tensor([300.0, 600.0], dtype=torch.float64)
    ratio = f.f_prime(far)
    declared = f.f_prime_at_infinity
    if math.isinf(declared):
        return None if float(ratio[1]) > float(ratio[0]) * (1 + 1e-6) or ratio.isinf().any() else (
            f"f'(∞) is declared infinite, but f' settles at {float(ratio[1]):g}")  # fmt: skip
    settled = abs(float(ratio[1]) - declared) <= 1e-6 * max(1.0, abs(declared))
    # a slow approach (α just below 1) is not an error while f' still climbs towards the declared value
    climbing = float(ratio[0]) < float(ratio[1]) * (1 - 1e-9) and float(ratio[1]) < declared
    return None if settled or climbing else f"f'(∞) is declared {declared:g}, but f' reaches {float(ratio[1]):g}"


def _inverse(f: Divergence) -> str | None:
    s = _S[(_S.abs() < 8)]
    u = f.f_prime(s)
    back = f.f_prime(f.f_prime_inverse(u))
    return None if _close(back, u, 1e-6, 1e-8) else "f_prime_inverse is not the inverse of f'"


def _conjugate(f: Divergence) -> str | None:
    s = _S[(_S.abs() < 8)]
    u = f.f_prime(s)
    touching = u * s.exp() - f.f(s)  # Fenchel–Young holds with equality at u = f'(t)
    if not _close(f.conjugate(u), touching, 1e-5, 1e-7):
        return "conjugate is not sup_t ut − f(t): Fenchel–Young fails at u = f'(t)"
    linear = u[:, None] * s.exp()
    gap, rounding = f.conjugate(u)[:, None] - (linear - f.f(s)), 1e-12 * (linear.abs() + f.f(s))
    return "conjugate lies below ut − f(t) somewhere" if bool((gap < -1e-6 * (1 + s.exp()) - rounding).any()) else None


def _dual(f: Divergence) -> str | None:
    g, s = f.dual(), _S[_S.abs() < 15]
    if not _close(g.f(s), s.exp() * f.f(-s), 1e-6, 1e-9):
        return "dual is not t·f(1/t)"
    log_pi, log_p = torch.log_softmax(torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).double(), -1)
    return None if _close(exact(f, log_pi, log_p), exact(g, log_p, log_pi)) else "D_dual(p‖π) is not D_f(π‖p)"


def _curvature(f: Divergence) -> str | None:
    numeric = Divergence.curvature.fget(f)  # type: ignore[attr-defined]
    same = math.isclose(numeric, f.curvature, rel_tol=1e-4, abs_tol=1e-7) or (
        math.isnan(numeric) and math.isnan(f.curvature)
    )
    return None if same else f"curvature is declared {f.curvature:g}, f''(1) is {numeric:g}"


def _finite(f: Divergence) -> str | None:
    values: list[Callable[[Tensor], Tensor]] = [f.f, f.f_prime, f.dual().f]
    far = torch.tensor([-80.0, 80.0])
    return "nan at s = ±80 in float32" if any(bool(v(far).isnan().any()) for v in values) else None
