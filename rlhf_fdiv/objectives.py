"""What is optimised, as pure functions of log-probabilities. `match` and `regularise` coincide for no f but reverse KL.

Those two are one policy gradient E_π[score(y)·∇log π(y)] with a score of their own (`pseudo_reward`):

    match        min D_f(π‖p)              score = −f'(log π − log p)          f-DPG, GDC, KL-DPG; arXiv 2302.08215
    regularise   max E_π[r] − β·D_f(π‖a)   score = r − β·f'(log π − log a)     KL-regularised RLHF and PPO are reverse KL
    prefer       −log σ(β[f'(u_w) − f'(u_l)]), u = π/a, from pairs             f-DPO; arXiv 2309.16240
    distil       Σ_t D_f(π_t‖q_t), q a teacher, whole next-token laws          GKD, arXiv 2306.13649, for any f

with log p = log a + potential − log Z(x) and, where a target is configured, r = β·potential.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fdiv.divergences import Divergence, exact, label
from rlhf_fdiv.ranges import BelowHalf, BelowOne, Positive, Share
from rlhf_fdiv.sequences import at_last_token, sequence_sum


def log_target(log_a: Tensor, potential: Tensor, log_z: Tensor) -> Tensor:
    """log p = log a + potential − log Z, −inf where the target is zero, also for a prompt whose Ẑ is still zero."""
    return torch.where(potential == -math.inf, -math.inf, log_a + potential - log_z)


@dataclass(frozen=True)
class Match:
    """min D_f(π‖p) for a fixed target p."""

    name: ClassVar[str] = "match"
    stage: ClassVar[str] = "policy"

    def pseudo_reward(self, f: Divergence, log_pi: Tensor, log_a: Tensor, potential: Tensor, log_z: Tensor) -> Tensor:
        """−f'(log π − log p), [B] each; where p = 0 it is −f'(∞), which `conflicts` requires to be finite."""
        return -f.f_prime(log_pi - log_target(log_a, potential, log_z))

    def conflicts(self, f: Divergence, target_has_zeros: bool) -> str | None:
        if target_has_zeros and math.isinf(f.f_prime_at_infinity):
            return (
                f"{label(f)} is infinite where the target is zero (f'(∞) = ∞): with a pointwise target use an f of "
                "finite f'(∞), such as forward_kl, js, tv, hellinger or alpha < 1, or bound the target below by `floor`"
            )
        return None


@dataclass(frozen=True)
class Regularise:
    """max E_π[r] − β·D_f(π‖a); its optimum is a·[(f')⁻¹((r − λ(x))/β)]₊, a tilt a·exp(r/β) for reverse KL only."""

    beta: Positive = 0.1
    name: ClassVar[str] = "regularise"
    stage: ClassVar[str] = "policy"

    def pseudo_reward(self, f: Divergence, log_pi: Tensor, log_a: Tensor, potential: Tensor, log_z: Tensor) -> Tensor:
        """r − β·f'(log π − log a) with r = β·potential, [B] each."""
        return self.beta * (potential - f.f_prime(log_pi - log_a))

    def conflicts(self, f: Divergence, target_has_zeros: bool) -> str | None:
        if target_has_zeros:
            return (
                "regularise needs a finite reward, and this target's potential is −inf where it is zero: "
                "use objective match, or bound the target below by `floor`"
            )
        return None


@dataclass(frozen=True)
class Prefer:
    """f-DPO from pairs, offline: Bradley–Terry with the reward β·f'(π/a) that `regularise` would be optimal for.

    Needs a strictly convex f with f'(0⁺) = −∞. Reverse KL is DPO (arXiv 2305.18290), chi_mix is χPO (arXiv 2407.13399).
    `label_smoothing` ε is the share of labels taken to be flipped (cDPO), `preference` c the share of raters who agree.
    """

    beta: Positive = 0.1
    label_smoothing: BelowHalf = 0.0
    name: ClassVar[str] = "prefer"
    stage: ClassVar[str] = "prefer"

    def reward(self, f: Divergence, log_pi: Tensor, log_a: Tensor) -> Tensor:
        """The implicit reward β·f'(π/a) up to a constant of the prompt, [B] each, in float64.

        It is exact while f' stays within ±1e15 (35 nats for forward KL, any distance for reverse KL and js) and goes on
        along its tangent there, so that order and slope stay, and the gradient of the weights fits into float32.
        """
        s = log_pi.double() - log_a.double()
        (low, high), slopes = _tame(f)
        beyond = slopes[0] * (s - low).clamp(max=0) + slopes[1] * (s - high).clamp(min=0)
        return self.beta * (f.f_prime(s.clamp(low, high)) + beyond)

    def loss(self, margin: Tensor, preference: Tensor) -> Tensor:
        """−c·log σ(margin) − (1 − c)·log σ(−margin), [B] each; margin is the chosen text's reward less the other's."""
        return F.binary_cross_entropy_with_logits(margin, preference.to(margin), reduction="none")

    def conflicts(self, f: Divergence, target_has_zeros: bool = False) -> str | None:
        slope_at_zero = float(f.f_prime(torch.tensor(-math.inf, dtype=torch.float64)))
        if slope_at_zero != -math.inf:
            return (
                f"{label(f)} cannot be used by prefer: f'(0⁺) = {slope_at_zero:.3g}, and f-DPO is valid only where it is "
                "−∞ (forward_kl, reverse_kl, js, hellinger, jeffreys, alpha ≤ 1, chi_mix — the repaired Pearson, …)"
            )
        return None


def _tame(f: Divergence) -> tuple[list[float], list[float]]:
    """Where, in log t, f' stays within ±1e15 on either side of 0 (at most a million nats), and its slope at both ends."""
    reach = torch.cat([torch.arange(1.0, 701.0), torch.tensor([1e6])]).double()
    counts = [int((f.f_prime(sign * reach).abs() <= 1e15).long().cumprod(0).sum()) for sign in (-1, 1)]
    with torch.enable_grad():
        ends = torch.stack([-reach[max(counts[0], 1) - 1], reach[max(counts[1], 1) - 1]]).requires_grad_()
        (slopes,) = torch.autograd.grad(f.f_prime(ends).sum(), ends)
    return ends.tolist(), slopes.tolist()


@dataclass(frozen=True)
class Distil:
    """D_f(student ‖ teacher) of the whole next-token distributions, summed over a completion's tokens.

    `on_policy` is the share of steps whose completions the student writes itself; the rest are the data's. They are taken
    as given: no gradient flows through the sampling (as in GKD). `skew` w mixes w of the teacher into the student before
    the two are compared (skew KL, arXiv 2402.03898), or with skew_of: teacher w of the student into the teacher.
    """

    on_policy: Share = 1.0
    skew: BelowOne = 0.0
    skew_of: Literal["student", "teacher"] = "student"
    name: ClassVar[str] = "distil"
    stage: ClassVar[str] = "distil"

    def divergence(self, f: Divergence, log_pi: Tensor, log_q: Tensor) -> Tensor:
        """D_f by token in nats, exact over the vocabulary; log-probs of student and teacher, [..., V] each → [...]."""
        return exact(f, *self._skewed(log_pi, log_q))

    def slope(self, f: Divergence, log_pi: Tensor, log_q: Tensor) -> Tensor:
        """∂D_f/∂log π of each next token, [..., V]: π·f'(π/q), as in `match`; the skew's chain rule where there is one."""
        ours, theirs = self._skewed(log_pi, log_q)
        s = ours - theirs
        by_first = log_pi.exp() * f.f_prime(s)
        if not bool(by_first.isfinite().all()):  # f' alone overflows, far below q: t·f'(t) = f(t) − f*'(1/t)
            far = (log_pi - ours + theirs).exp() * (f.f(s) - f.dual().f_prime(-s))
            by_first = torch.where(by_first.isfinite(), by_first, far)
        if self.skew_of == "student" or not self.skew:
            return (1 - self.skew) * by_first
        return by_first + self.skew * log_pi.exp() * f.dual().f_prime(-s)  # ∂/∂q of q·f(π/q) is the dual's slope

    def _skewed(self, log_pi: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        if not self.skew:
            return log_pi, log_q
        first, second = (log_pi, log_q) if self.skew_of == "student" else (log_q, log_pi)
        mixed = torch.logaddexp(first + math.log1p(-self.skew), second + math.log(self.skew))
        return (mixed, log_q) if self.skew_of == "student" else (log_pi, mixed)

    def conflicts(self, f: Divergence, target_has_zeros: bool = False) -> str | None:
        return None


OBJECTIVES: dict[str, Any] = {cls.name: cls for cls in (Match, Regularise, Prefer, Distil)}


def chain_rule_factor(f: Divergence) -> float | None:
    """c where f'(t) = c·ln t. Reverse KL alone (up to scale) is a sum over tokens; every other f is one number a text."""
    s = torch.tensor([-7.0, -0.3, 2.0, 11.0], dtype=torch.float64)
    slopes = f.f_prime(s) / s
    return float(slopes[0]) if bool(torch.allclose(slopes, slopes[:1].expand(4), rtol=1e-9, atol=0)) else None


def token_rewards(
    objective: Match | Regularise,
    f: Divergence,
    log_pi: Tensor,
    log_a: Tensor,
    mask: Tensor,
    potential: Tensor,
    log_z: Tensor,
) -> Tensor:
    """The pseudo-reward laid out over tokens, [B, T], summing to it exactly; log π and log a by token, [B, T].

    For reverse KL each token pays its own log-ratio and the last one receives the rest (PPO's usual form). For any other
    f the whole score is paid at the last token: a per-token f-penalty would be another objective.
    """
    score = objective.pseudo_reward(f, sequence_sum(log_pi, mask), sequence_sum(log_a, mask), potential, log_z)
    factor = chain_rule_factor(f)
    if factor is None:
        return at_last_token(score, mask)
    scale = factor * (objective.beta if isinstance(objective, Regularise) else 1.0)
    penalty = -scale * (log_pi - log_a) * mask
    return penalty + at_last_token(score - penalty.sum(-1), mask)


def next_token_divergence(f: Divergence, log_prob: Tensor) -> Tensor:
    """SFT by token: D_f(π ‖ δ_y) = f(π_y) + f'(∞)·(1 − π_y), the data's next token y as the target; any shape.

    Forward KL gives −log π_y, the cross-entropy; alpha and hellinger give the generalised cross-entropy
    (1 − π_y^q)/q up to scale (arXiv 1805.07836), tv gives 1 − π_y. Needs a finite f'(∞).
    """
    if math.isinf(f.f_prime_at_infinity):
        raise ValueError(f"{label(f)} is infinite for any model that is not certain (f'(∞) = ∞)")
    return f.f(log_prob) - f.f_prime_at_infinity * torch.expm1(log_prob)


def soft_labels(shares: Tensor, smoothing: float) -> Tensor:
    """c(1 − ε) + (1 − c)ε: the share of raters who prefer the first, were ε of all labels flipped; any shape."""
    return shares * (1 - 2 * smoothing) + smoothing


def preference_divergence(f: Divergence, margin: Tensor, preference: Tensor) -> Tensor:
    """Reward model by pair: Bernoulli D_f(σ(r_A − r_B) ‖ c), c the share of raters who prefer A; any shape.

    Forward KL is Bradley–Terry with soft labels less the labels' own entropy, which no parameter moves.
    """
    log_pi = torch.stack([F.logsigmoid(margin), F.logsigmoid(-margin)], -1)
    log_p = torch.stack([preference.log(), torch.log1p(-preference)], -1)
    return exact(f, log_pi, log_p)
