"""Figures of an ablation, one description each: drawn in the browser for report.html, and as PNG and PDF for a paper."""

from __future__ import annotations

import warnings
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from rlhf_fdiv.comparison import SETTING, summaries

BELOW = alt.Legend(orient="bottom", columns=3, symbolOpacity=1)


def points(table: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """A row for each setting: IQM of two columns over seeds, `x`, `y`, each with `_low` and `_high`."""
    found = {axis: summaries(table, SETTING, column) for axis, column in (("x", x), ("y", y))}
    named = [part.rename(columns={"iqm": a, "low": f"{a}_low", "high": f"{a}_high"}) for a, part in found.items()]
    return named[0].merge(named[1], on=[*SETTING])


def over_steps(curves: pd.DataFrame, y: str) -> pd.DataFrame:
    """A figure of training over the steps: mean of the seeds, and 1.96 standard errors."""
    found = curves.dropna(subset=y).groupby(["divergence", "step"], sort=False)[y].agg(y="mean", error="sem")
    half = 1.96 * found["error"]
    return found.assign(y_low=found["y"] - half, y_high=found["y"] + half).reset_index().rename(columns={"step": "x"})


def over_optimisation(curves: pd.DataFrame, proxy: str, gold: str) -> pd.DataFrame:
    """Proxy and gold reward against √KL(π‖reference) while training (arXiv 2210.10760), means over the seeds."""
    means = curves.groupby(["divergence", "step"], sort=False)[[proxy, gold, "kl_reference"]].mean().reset_index()
    means["x"] = np.sqrt(means["kl_reference"].clip(lower=0))
    return means.melt(["divergence", "step", "x"], [proxy, gold], "kind", "y")


def lines(data: pd.DataFrame, fs: list[str], x: str, y: str, baselines: pd.DataFrame | None = None) -> Any:
    """A curve for each f through its `x` and `y`, dashed by `kind`, with intervals from `_low` to `_high`, where `data` has
    them; baselines (x, y, kind) in grey. A click in the legend leaves one f, shift adds another."""
    chosen = alt.selection_point("chosen", fields=["divergence"], bind="legend")
    colour = alt.Color("divergence:N", title=None, scale=alt.Scale(domain=fs, scheme="tableau10"), legend=BELOW)
    across = alt.X("x:Q", title=x, scale=alt.Scale(zero=False))
    up = alt.Y("y:Q", title=y, scale=alt.Scale(zero=False))
    dash = {"strokeDash": alt.StrokeDash("kind:N", title=None, sort=None, legend=BELOW)}
    tips: list[Any] = [c for c in ("divergence", "rest", "kind") if c in data]
    tips += [alt.Tooltip("x:Q", title=x, format=".3g"), alt.Tooltip("y:Q", title=y, format=".3g")]
    base = alt.Chart(data).encode(color=colour).transform_filter(chosen)
    order, dashed = "step:Q" if "step" in data else "x:Q", dash if "kind" in data else {}
    curve = base.mark_line(strokeWidth=1.5).encode(x=across, y=up, order=order, **dashed)
    layers = [curve.add_params(chosen), base.mark_circle(size=20, opacity=1).encode(x=across, y=up, tooltip=tips)]
    if "x_low" in data:
        layers.append(base.mark_rule(opacity=0.5).encode(y=up, x=alt.X("x_low:Q", title=x), x2="x_high"))
    if "y_low" in data:
        layers.append(base.mark_rule(opacity=0.5).encode(x=across, y=alt.Y("y_low:Q", title=y), y2="y_high"))
    if baselines is not None and len(baselines):
        layers.insert(0, alt.Chart(baselines).mark_line(color="#666666").encode(x=across, y=up, order="x:Q", **dash))
    return alt.layer(*layers).properties(width="container", height=260)


def heat_map(cross: pd.DataFrame, fs: list[str]) -> Any:
    """Trained f by measured f; the colour is relative within a measured f, from its best (dark) to its worst."""
    low, high = (cross.groupby("measured")["value"].transform(how) for how in ("min", "max"))
    rank = (cross["value"] - low) / (high - low).replace(0, 1)
    figures = (alt.Tooltip("value", format=".4g"), alt.Tooltip("error", format=".2g"))
    tips: list[Any] = ["divergence", "measured", *figures, "seeds"]
    base = alt.Chart(cross.assign(rank=rank)).encode(
        x=alt.X("measured:N", title="measured", sort=None, axis=alt.Axis(labelAngle=-40)),
        y=alt.Y("divergence:N", title="trained", sort=fs),
        tooltip=tips,
    )
    colour = alt.Color("rank:Q", scale=alt.Scale(scheme="blues", reverse=True, domain=[-0.3, 1.3]), legend=None)
    ink = alt.condition("datum.rank < 0.45", alt.value("white"), alt.value("black"))
    numbers = base.mark_text(fontSize=10).encode(text=alt.Text("value:Q", format=".3g"), color=ink)
    height = 28 * cross["divergence"].nunique()
    return alt.layer(base.mark_rect().encode(color=colour), numbers).properties(width="container", height=height)


def for_paper(charts: dict[str, alt.LayerChart], columns: int = 3) -> Any:
    """Several figures as one picture of fixed size, their keys as titles."""
    fixed = [chart.properties(width=300, title=title) for title, chart in charts.items()]
    with warnings.catch_warnings():  # that their legends' choices become one, which a still picture has no use for
        warnings.filterwarnings("ignore", "Automatically deduplicated selection parameter")
        whole = alt.concat(*fixed, columns=columns)
    return whole.configure_view(stroke=None).configure_axis(grid=False)
