"""What inference alone buys for the same target: best of n, and quasi-rejection sampling with its distance to the target."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlhf_fdiv import divergences
from rlhf_fdiv.divergences import clustered_error
from rlhf_fdiv.targets import effective_sample_size


def best_of_n(reward: Tensor, scores: Tensor, n: int) -> Tensor:
    """Mean score of the completion with the largest reward among n, over all n-subsets of a prompt's K; [P, K] each → [P].

    Unbiased: the i-th smallest of K is the best of C(i − 1, n − 1) of the C(K, n) subsets; ties go by their order. Raises
    ValueError unless 1 ≤ n ≤ K.
    """
    k = reward.shape[1]
    if not 1 <= n <= k:
        raise ValueError(f"best of {n} needs at least {n} completions a prompt, not {k}")
    weights = torch.tensor([math.comb(i, n - 1) / math.comb(k, n) for i in range(n - 1, k)], dtype=torch.float64)
    return scores.double().gather(1, reward.argsort(stable=True)[:, n - 1 :]) @ weights


def best_of_n_kl(n: int) -> float:
    """log n − (n − 1)/n nats: KL(best of n‖reference) without ties, and no less than it with them (arXiv 2401.01879)."""
    return math.log(n) - (n - 1) / n


def quasi_rejection(log_a: Tensor, potential: Tensor, log_cap: Tensor, scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Figures of p_b = a·min(w, b)/Z_b, w = e^potential, which accepting y ~ a with probability min(1, w/b) samples.

    [..., N] each → [...] each: exact from log a of every text, an estimate from log a/(N·μ) of N samples of μ. `acceptance`
    is E_a[min(1, w/b)]; `tv` TV(p_b, p) ≤ `tv_bound` = 1 − Z_b/Z; `kl_target` KL(p_b‖p) ≤ `kl_bound` = log Z/Z_b; `value` is
    E_{p_b}[potential] − KL(p_b‖a) = log Z − KL(p_b‖p). nan where nothing is accepted. b = e^log_cap is the β of Eikema et al.
    2022 (arXiv 2112.05702); docs/mathematics.md derives the bounds.
    """
    kept = potential.clamp(max=log_cap)
    log_z, log_z_b = (torch.logsumexp(log_a + x, -1) for x in (potential, kept))
    log_p, log_p_b = log_a + potential - log_z[..., None], log_a + kept - log_z_b[..., None]
    tv, kl_target = (divergences.exact(divergences.get(f), log_p_b, log_p) for f in ("tv", "reverse_kl"))
    figures = {"acceptance": (log_z_b - log_cap).exp(), "tv": tv, "tv_bound": -torch.expm1(log_z_b - log_z)}
    figures |= {"kl_target": kl_target, "kl_bound": log_z - log_z_b, "value": log_z - kl_target}
    for name, x in {"kl_reference": log_p_b - log_a, **scores}.items():
        figures[name] = torch.where(log_p_b == -math.inf, 0.0, log_p_b.exp() * x).sum(-1)
    return figures


def jackknife(log_weights: Tensor, potential: Tensor, log_cap: Tensor, scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """`quasi_rejection` from log a/μ of N samples of μ for each prompt, [P, N] each → [P] each, without its first-order bias;
    nan where fewer than two have w > 0."""
    n = potential.shape[1]
    without = log_weights[:, None].masked_fill(torch.eye(n, dtype=torch.bool), -math.inf) - math.log(n - 1)
    left = quasi_rejection(without, potential[:, None], log_cap, {name: x[:, None] for name, x in scores.items()})
    whole = quasi_rejection(log_weights - math.log(n), potential, log_cap, scores)
    return {name: n * x - (n - 1) * left[name].mean(1) for name, x in whole.items()}


def inference_baselines(
    log_weights: Tensor, potential: Tensor, scores: dict[str, Tensor], k: int, beta: float
) -> list[dict[str, Any]]:
    """A row of figures, with errors clustered by prompt, for each n and each b; no model is called.

    log a/μ, potential and scores of N samples of μ for each prompt, [P, N] each, the first k of them drawn from a. `samples`
    is draws a text. What rests on too few effective samples, N/8 but 4 to 16, is left out, or nan for distances to p.
    """
    rows: list[dict[str, Any]] = []
    for n in (2**i for i in range(1, k.bit_length())):
        kl, ours = best_of_n_kl(n), potential[:, :k]
        best = {name: best_of_n(ours, x[:, :k], n) for name, x in scores.items()}
        figures = _means(best | {"objective": beta * (best_of_n(ours, ours, n) - kl)})
        rows.append({"method": f"best of {n}", "samples": n, "kl_reference": kl, **figures})
    seen, enough = potential[potential > -math.inf], min(max(4, potential.shape[1] / 8), 16)
    for log_cap in torch.quantile(seen, torch.tensor([0.25, 0.5, 0.75, 1]).to(seen)).unique() if len(seen) else ():
        if effective_sample_size(log_weights + potential.clamp(max=log_cap)).mean() < enough:
            continue
        chunks = torch.arange(len(potential)).split(max(1, 2**20 // potential.shape[1] ** 2))
        parts = [jackknife(log_weights[i], potential[i], log_cap, {k: x[i] for k, x in scores.items()}) for i in chunks]
        by_prompt = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        figures = _means(by_prompt | {"objective": beta * by_prompt.pop("value")})
        if effective_sample_size(log_weights + potential).mean() < enough:
            figures |= {name: math.nan for name in figures if name.startswith(("tv", "kl_target", "kl_bound"))}
        if math.isfinite(figures["kl_reference"]):
            row = {"method": f"quasi-rejection, log b = {log_cap:.3g}", "log_b": float(log_cap)}
            rows.append(row | {"samples": 1 / figures["acceptance"], **figures})
    return rows


def _means(figures: dict[str, Tensor]) -> dict[str, float]:
    errors = {f"{name}_se": clustered_error(x, torch.arange(len(x))) for name, x in figures.items()}
    return {name: float(x.mean()) for name, x in figures.items()} | errors
