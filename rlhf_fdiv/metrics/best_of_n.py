"""Best-of-n sampling, the baseline that needs no training: what it would score, from samples of the reference alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
