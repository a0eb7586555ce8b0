"""From token rewards to advantages, and from advantages to a loss. Each estimator's fields are its YAML schema.

Every estimator optimises the same objective; they differ in variance, and grpo and ppo's clip in a stated bias. The
sampling policy's pseudo-rewards are computed once a rollout and frozen over the epochs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from rlhf_fdiv.ranges import Count, NotNegative, Positive, Share


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


@dataclass(frozen=True)
class Reinforce:
    """score·∇log π, no baseline: unbiased, and the most variance (Williams 1992). Each of `num_epochs` takes the scores anew,
    of the policy as it is by then, and weighs the completions by π/μ."""

    num_epochs: Count = 1
    clip_range: ClassVar[float | None] = None
    value_head: ClassVar[bool] = False
    min_generations: ClassVar[int] = 1
    name: ClassVar[str] = "reinforce"

    def __call__(
        self,
        rewards: Tensor,
        mask: Tensor,
        num_generations: int,
        values: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Advantages:
        """Token rewards and mask [B, T], the K completions of a prompt in consecutive rows → advantages [B, T].

        `weights` [B] are the importance weights of off-policy samples, None on policy.
        """
        weights = torch.ones_like(rewards[:, 0]) if weights is None else weights
        groups = (x.view(-1, num_generations) for x in (rewards.sum(-1), weights))
        return Advantages(self.advantage(*groups).flatten()[:, None] * mask)

    def advantage(self, scores: Tensor, weights: Tensor) -> Tensor:
        """What multiplies ∇log π of each completion; pseudo-rewards and weights by group, [P, K] each → [P, K]."""
        return weights * scores


@dataclass(frozen=True)
class RLOO(Reinforce):
    """Leave-one-out: the baseline is the mean score of the prompt's other K − 1 completions (arXiv 2402.14740). Unbiased;
    any per-prompt constant, log Z(x) in reverse KL among them, drops out."""

    min_generations: ClassVar[int] = 2
    name: ClassVar[str] = "rloo"

    def advantage(self, scores: Tensor, weights: Tensor) -> Tensor:
        weighted = weights * scores
        others = (weighted.sum(1, keepdim=True) - weighted) / (scores.shape[1] - 1)
        return weighted - weights * others


@dataclass(frozen=True)
class GRPO(Reinforce):
    """(score − group mean)/(group std), clipped ratios, several epochs (arXiv 2402.03300). Biased by design: the mean
    contains the score itself, a factor (K − 1)/K, and the std reweights prompts."""

    scale_rewards: bool = True
    clip_range: Positive | None = 0.2  # type: ignore[misc]
    min_generations: ClassVar[int] = 2
    name: ClassVar[str] = "grpo"

    def advantage(self, scores: Tensor, weights: Tensor) -> Tensor:
        centred = scores - (weights * scores).mean(1, keepdim=True)
        if self.scale_rewards:
            centred = centred / (scores.std(1, keepdim=True) + 1e-4)
        return weights * centred


@dataclass(frozen=True)
class PPO:
    """Clipped ratios and generalised advantages, several epochs over minibatches of one rollout.

    f' is computed once a rollout, with the policy that sampled it, and frozen over the epochs: later epochs follow the
    gradient of the surrogate, not of D_f at the moving policy. At one epoch, lam = 1, gamma = 1, no whitening and a zero
    value head it is `reinforce`, sample by sample.

    The critic is a value head that is trained with the policy, or what the target's own scorers say of the `prefixes` of each
    completion (`prefix_values`): it has no weights, so vf_coef and clip_range_value do nothing. For it a reward model of the
    policy's vocabulary reads each completion once; by other scorers T times as many texts are scored.
    """

    critic: Literal["value_head", "prefixes"] = "value_head"
    num_epochs: Count = 2
    num_minibatches: Count = 2
    clip_range: Positive | None = 0.2
    gamma: Share = 1.0
    lam: Share = 0.95
    vf_coef: NotNegative = 0.1
    clip_range_value: Positive | None = 0.2
    whiten_advantages: bool = True
    value_head = property(lambda self: self.critic == "value_head")
    reads_prefixes = property(lambda self: self.critic == "prefixes")
    min_generations: ClassVar[int] = 1
    name: ClassVar[str] = "ppo"

    def __call__(
        self,
        rewards: Tensor,
        mask: Tensor,
        num_generations: int,
        values: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Advantages:
        """Token rewards, mask and values V(x, y_<t), [B, T] → advantages and returns, [B, T]; `weights` [B] multiply the
        advantages of off-policy samples."""
        if values is None:
            raise ValueError("ppo needs the values of its critic, a value head or `prefix_values`")
        advantages = generalised_advantages(rewards, values, mask, self.gamma, self.lam)
        returns = advantages + values * mask
        advantages = whiten(advantages, mask) if self.whiten_advantages else advantages
        return Advantages(advantages if weights is None else weights[:, None] * advantages, returns)

    def value_loss(self, values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
        """½·vf_coef·Σ_t (V − R)², the larger of clipped and unclipped; [B, T] each → [B]."""
        error = (values - returns) ** 2
        if self.clip_range_value is not None:
            near = old_values + (values - old_values).clamp(-self.clip_range_value, self.clip_range_value)
            error = torch.maximum(error, (near - returns) ** 2)
        return 0.5 * self.vf_coef * (error * mask).sum(-1)


def generalised_advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """A_t = Σ_l (γλ)^l·δ_{t+l}, δ_t = r_t + γ·V_{t+1} − V_t, V = 0 after the last token; all [B, T]."""
    values = values * mask
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    deltas = (rewards + gamma * following - values) * mask
    advantage, out = torch.zeros_like(deltas[:, 0]), []
    for t in reversed(range(deltas.shape[1])):
        advantage = (deltas[:, t] + gamma * lam * advantage) * mask[:, t]
        out.append(advantage)
    return torch.stack(out[::-1], 1)


def prefix_values(
    rewards: Tensor,
    mask: Tensor,
    scores: Tensor,
    num_generations: int,
    gamma: float = 1.0,
    places: Tensor | None = None,
) -> Tensor:
    """V(x, y_<t) from what S scorers say of each prefix y_<t, `scores` [B, T, S]; token rewards and mask [B, T] → [B, T].

    At each position the return is regressed on those scores and on the mean return of the prompt's other completions, by
    least squares with eight observations of the mean position added, and kept within the returns that were seen. Each half
    of the completions has its values from the other half, so that a value knows of its own completion no more than the
    prefix: as a baseline it is unbiased. Which half a completion is in goes by its place in its step, `places` [B].
    """
    places = torch.arange(len(mask), device=mask.device) if places is None else places
    returns = generalised_advantages(rewards.double(), torch.zeros_like(rewards).double(), mask, gamma, 1.0)
    values = torch.zeros_like(returns)
    every_other = places % max(num_generations, 2) % 2 == 0  # within each prompt where it has several
    for fitted in (every_other, ~every_other):
        kept, weight = fitted.view(-1, num_generations).double(), (mask * fitted[:, None]).double()
        total = returns[:, :1].view(-1, num_generations) * kept
        others = (total.sum(1, keepdim=True) - total) / (kept.sum(1, keepdim=True) - kept).clamp(min=1)
        x = torch.cat([others.flatten()[:, None, None].expand(*mask.shape, 1), scores.double()], -1)
        x = torch.cat([torch.ones_like(x[..., :1]), _standardised(x, weight[..., None])], -1)  # [B, T, F]
        squares = torch.einsum("bt,btf,btg->tfg", weight, x, x)
        products = torch.einsum("bt,btf,bt->tf", weight, x, returns)
        prior = 8 / weight.sum().clamp(min=1)
        squares, products = squares + prior * squares.sum(0), products + prior * products.sum(0)
        fit = torch.linalg.pinv(squares, hermitian=True, rtol=1e-9) @ products[..., None]
        seen = returns[weight.bool()] if bool(weight.any()) else returns.new_zeros(1)
        found = torch.einsum("btf,tf->bt", x, fit.squeeze(-1)).clamp(seen.min(), seen.max())
        values = torch.where(fitted[:, None], values, found)
    return (values * mask).to(rewards.dtype)


def _standardised(x: Tensor, weight: Tensor) -> Tensor:
    """Mean 0 and deviation 1 over the tokens of positive `weight` [B, T, 1], 0 for what does not vary there; [B, T, F]."""
    mean, total = (x * weight).sum((0, 1)), weight.sum().clamp(min=1)
    centred = x - mean / total
    deviation = ((centred**2 * weight).sum((0, 1)) / total).sqrt()
    varies = deviation > 1e-9 * (1 + (mean / total).abs())
    return torch.where(varies, centred / deviation.where(varies, 1.0), 0.0)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the tokens of the batch; 0 where masked."""
    n = mask.sum()
    mean = (x * mask).sum() / n
    variance = (((x - mean) ** 2) * mask).sum() / n
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 − Var(R − V)/Var(R) over tokens: 0 for a useless critic, 1 for a perfect one; a scalar."""
    keep = mask.bool()
    return 1 - (returns[keep] - values[keep]).var() / returns[keep].var().clamp(min=1e-12)


ESTIMATORS: dict[str, Any] = {cls.name: cls for cls in (Reinforce, RLOO, GRPO, PPO)}
