"""Figures of an ablation, one description each: drawn in the browser for report.html, and as PNG and PDF for a paper."""

from __future__ import annotations

import warnings
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from rlhf_fdiv.comparison import summarise

HEIGHT = 260
GREY = "#666666"


def points(table: pd.DataFrame, settings: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """A row for each setting: IQM of two columns over seeds, `x`, `y`, each with `_low` and `_high`."""
    rows = []
    for (f, rest), runs in settings.assign(x=table[x], y=table[y]).groupby(["divergence", "rest"], sort=False):
        row = {"divergence": f, "rest": rest}
        for axis in ("x", "y"):
            found = summarise(runs[axis].to_numpy(float))
            row |= {axis: found.iqm, f"{axis}_low": found.low, f"{axis}_high": found.high}
        rows.append(row)
    return pd.DataFrame(rows)


def trade_off(data: pd.DataFrame, fs: list[str], x: str, y: str, lines: pd.DataFrame | None = None) -> alt.LayerChart:
    """A curve for each f through its `points`, with seed intervals; `lines` (x, y, kind) are baselines. A click in the legend
    leaves one f, shift adds another."""
    chosen, base = _legend(data, fs)
    where = alt.X("x:Q", title=x, scale=alt.Scale(zero=False))
    up = alt.Y("y:Q", title=y, scale=alt.Scale(zero=False))
    tips = ["divergence", "rest", alt.Tooltip("x", title=x, format=".3g"), alt.Tooltip("y", title=y, format=".3g")]
    layers = [
        base.mark_line(strokeWidth=1.5).encode(x=where, y=up, order="x:Q").add_params(chosen),
        base.mark_rule(opacity=0.5).encode(x=where, y=alt.Y("y_low:Q", title=y), y2="y_high"),
        base.mark_rule(opacity=0.5).encode(y=up, x=alt.X("x_low:Q", title=x), x2="x_high"),
        base.mark_circle(size=45, opacity=1).encode(x=where, y=up, tooltip=tips),
    ]
    if lines is not None and len(lines):
        dashes = alt.StrokeDash("kind:N", title=None, legend=alt.Legend(orient="bottom"))
        layers.insert(0, alt.Chart(lines).mark_line(color=GREY).encode(x=where, y=up, strokeDash=dashes, order="x:Q"))
    return _finish(alt.layer(*layers))


def by_step(curves: pd.DataFrame, fs: list[str], y: str, title: str) -> alt.LayerChart:
    """A figure of training over the steps: mean of the seeds, and a band of 1.96 standard errors."""
    grouped = (
        curves.dropna(subset=[y]).groupby(["divergence", "step"], sort=False)[y].agg(["mean", "sem"]).reset_index()
    )
    half = 1.96 * grouped["sem"].fillna(0)
    data = pd.DataFrame({"divergence": grouped["divergence"], "step": grouped["step"], "y": grouped["mean"],
                         "low": grouped["mean"] - half, "high": grouped["mean"] + half})  # fmt: skip
    chosen, base = _legend(data, fs)
    up = alt.Y("y:Q", title=title, scale=alt.Scale(zero=False))
    band = base.mark_area(opacity=0.15).encode(x="step:Q", y=alt.Y("low:Q", title=title), y2="high")
    line = base.mark_line(strokeWidth=1.5).encode(x=alt.X("step:Q", title="step"), y=up)
    return _finish(alt.layer(band, line).add_params(chosen))


def over_optimisation(curves: pd.DataFrame, fs: list[str], proxy: str, gold: str) -> alt.LayerChart:
    """Proxy and gold reward against √KL(π‖reference) while training (arXiv 2210.10760), means over the seeds."""
    means = curves.groupby(["divergence", "step"], sort=False)[[proxy, gold, "kl_reference"]].mean().reset_index()
    means["root"] = np.sqrt(means["kl_reference"].clip(lower=0))
    data = means.melt(["divergence", "step", "root"], [proxy, gold], "score", "y")
    chosen, base = _legend(data, fs)
    where = alt.Legend(orient="bottom")
    dashes = alt.StrokeDash("score:N", title=None, scale=alt.Scale(domain=[proxy, gold]), legend=where)
    line = base.mark_line(strokeWidth=1.5).encode(
        x=alt.X("root:Q", title="√KL(π‖reference), √nats"),
        y=alt.Y("y:Q", title="score"),
        strokeDash=dashes,
        order="step:Q",
    )
    return _finish(alt.layer(line).add_params(chosen))


def heat_map(cross: pd.DataFrame, fs: list[str]) -> alt.LayerChart:
    """Trained f by measured f; the colour is relative within a measured f, from its best (dark) to its worst."""
    low, high = (cross.groupby("measured")["value"].transform(how) for how in ("min", "max"))
    data = cross.assign(
        rank=((cross["value"] - low) / (high - low).replace(0, 1)), text=cross["value"].map("{:.3g}".format)
    )
    base = alt.Chart(data).encode(
        x=alt.X("measured:N", title="measured", sort=None, axis=alt.Axis(labelAngle=-40)),
        y=alt.Y("divergence:N", title="trained", sort=fs),
        tooltip=[
            "divergence",
            "measured",
            alt.Tooltip("value", format=".4g"),
            alt.Tooltip("error", format=".2g"),
            "seeds",
        ],
    )
    colour = alt.Color("rank:Q", scale=alt.Scale(scheme="blues", reverse=True, domain=[-0.3, 1.3]), legend=None)
    ink = alt.condition("datum.rank < 0.45", alt.value("white"), alt.value("black"))
    numbers = base.mark_text(fontSize=10).encode(text="text:N", color=ink)
    return _finish(alt.layer(base.mark_rect().encode(color=colour), numbers), 28 * data["divergence"].nunique())


def _legend(data: pd.DataFrame, fs: list[str]) -> tuple[Any, alt.Chart]:
    """What a click in the legend chooses, and the data filtered by it; an f has one colour in every figure."""
    chosen = alt.selection_point("chosen", fields=["divergence"], bind="legend")
    colour = alt.Color("divergence:N", title=None, scale=alt.Scale(domain=fs, scheme="tableau10"),
                       legend=alt.Legend(orient="bottom", columns=3, symbolOpacity=1))  # fmt: skip
    return chosen, alt.Chart(data).encode(color=colour).transform_filter(chosen)


def _finish(chart: Any, height: Any = HEIGHT) -> alt.LayerChart:
    sized: alt.LayerChart = chart.properties(width="container", height=height)
    return sized


def for_paper(charts: dict[str, alt.LayerChart], columns: int = 3) -> Any:
    """Several figures as one picture of fixed size, their keys as titles."""
    fixed = [chart.properties(width=300, title=title) for title, chart in charts.items()]
    with warnings.catch_warnings():  # that their legends' choices become one, which a still picture has no use for
        warnings.filterwarnings("ignore", "Automatically deduplicated selection parameter")
        whole = alt.concat(*fixed, columns=columns)
    return whole.configure_view(stroke=None).configure_axis(grid=False)
