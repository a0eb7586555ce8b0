"""A picture of every f."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure

from rlhf_fdiv import divergences
from rlhf_fdiv.errors import told_as


def plot_divergences(path: Path) -> None:
    """f(t) and −f'(t) (the pseudo-reward of `match`) over log₁₀ t, one line for each registered f."""
    s = torch.linspace(-6, 6, 601, dtype=torch.float64)
    figure = Figure(figsize=(11, 4.2))
    left, right = figure.subplots(1, 2)
    for i, name in enumerate(divergences.names()):
        f = divergences.get(name)
        style = {"color": colormaps["tab20"](i / 12), "linewidth": 1.6, "label": name}
        left.plot(s / 2.302585, f.f(s), **style)
        right.plot(s / 2.302585, -f.f_prime(s), **style)
    left.set(ylim=(0, 4), xlabel="log₁₀ π/p", title="f(π/p): the price")
    right.set(ylim=(-4, 4), xlabel="log₁₀ π/p", title="−f'(π/p): the pseudo-reward of match")
    right.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    for axis in (left, right):
        axis.axvline(0, color="0.8", linewidth=0.8, zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
    with told_as(f"{path}: the plot cannot be written", (OSError, ValueError)):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, bbox_inches="tight")
