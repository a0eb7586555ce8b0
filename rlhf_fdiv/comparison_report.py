"""What `rlhf-fdiv report` writes of the runs of an ablation: results.csv, results.tex, figures, report.md, report.html."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import vl_convert
from markdown_it import MarkdownIt

from rlhf_fdiv import charts
from rlhf_fdiv.comparison import (
    Claim,
    best_of_n_curve,
    cross_table,
    exact_frontier,
    setting_columns,
    summaries,
    training_curves,
    with_settings,
)
from rlhf_fdiv.report import TEMPLATES, markdown_table, plain
from rlhf_fdiv.tracking import write_atomically

BESIDE = ("policy.kl_reference", "policy.entropy", "policy.distinct_2", "policy.self_bleu")
DIVERSITY = {
    "policy.entropy": "entropy, nats a token",
    "policy.distinct_2": "distinct-2",
    "policy.self_bleu": "self-BLEU",
}
KL = "KL(π‖reference), nats"
PROMPTS = 8


def write_comparison(
    out: Path,
    table: pd.DataFrame,
    keys: list[str],
    claims: dict[str, list[Claim]],
    missing: list[str],
    search: dict[str, Any] | None,
) -> None:
    """Everything about the runs of `table` into `out`; `claims` by metric, the names of the cells that are `missing`, and
    what a `search` was and found."""
    out.mkdir(parents=True, exist_ok=True)
    columns, runs, reward = setting_columns(table, keys), with_settings(table, keys), _reward(table)
    curves, best = training_curves(runs), best_of_n_curve(runs, reward) if reward else pd.DataFrame()
    tables = {metric: settings_table(table, columns, metric) for metric in claims}
    figures = {name: part for name, part in _figures(runs, curves, best, reward).items() if part}
    written = {"results": table, "curves": curves.drop(columns="run", errors="ignore"), "best_of_n": best}
    for name, data in written.items():
        write_atomically(out / f"{name}.csv", data.to_csv(index=False))
    latex = {m: t.to_latex(index=False, escape=True, float_format="%.3g", na_rep="--") for m, t in tables.items()}
    write_atomically(out / "results.tex", "\n".join(f"% {metric}\n{text}" for metric, text in latex.items()))
    for name, part in figures.items():
        picture = charts.for_paper(part)
        picture.save(str(out / f"{name}.png"), ppi=100)
        picture.save(str(out / f"{name}.pdf"))
    content = {
        "title": out.resolve().parent.name,
        "runs": table,
        "curvature": " and ".join(("off", "on")[x] for x in sorted(set(table["unit_curvature"]))),
        "missing": missing,
        "search": search,
        "figures": figures,
        "exact": len(exact_frontier(table)) > 0,
        "reward": reward,
        "tables": {metric: _markdown(figure) for metric, figure in tables.items()},
        "claims": claims,
        "samples": _samples(runs),
        "made_of": _markdown(_made_of(table)),
    }
    page, shell = TEMPLATES.get_template("comparison.md"), TEMPLATES.get_template("comparison.html")
    write_atomically(out / "report.md", page.render(content, browser=False))
    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(page.render(content, browser=True))
    specs = {f"{name}-{i}": c.to_dict() for name, part in figures.items() for i, c in enumerate(part.values())}
    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    text = shell.render(
        title=content["title"],
        body=body,
        library=vl_convert.javascript_bundle(vl_version=version),  # type: ignore[call-arg]
        specs=json.dumps(specs).replace("</", "<\\/"),
    )
    write_atomically(out / "report.html", text)


def settings_table(table: pd.DataFrame, columns: list[str], metric: str) -> pd.DataFrame:
    """A row for each setting: the metric's IQM and interval, and the means of what stands beside it."""
    columns = columns or ["config.divergence"]
    beside = [c for c in BESIDE if c in table and c != metric]
    means = table.groupby(columns, sort=False, dropna=False)[beside].mean().reset_index(drop=True)
    whole = pd.concat([summaries(table, columns, metric), means], axis=1)
    return whole.rename(columns=lambda c: "IQM" if c == "iqm" else c.removeprefix("config.").removeprefix("policy."))


def _reward(table: pd.DataFrame) -> str:
    """The scorer that the target is made of: its reward, or the first of its moments; empty where it has neither."""
    moments = [c.removeprefix("config.target.moments.") for c in table if c.startswith("config.target.moments.")]
    named = table["config.target.reward"].dropna().astype(str).tolist() if "config.target.reward" in table else []
    return next((name for name in (*named, *moments) if f"policy.{name}" in table), "")


def _figures(
    runs: pd.DataFrame, curves: pd.DataFrame, best: pd.DataFrame, reward: str
) -> dict[str, dict[str, alt.LayerChart]]:
    """For each part of the report its figures by their titles, where these runs have data for them."""
    fs, parts = list(dict.fromkeys(runs["divergence"])), dict[str, dict[str, alt.LayerChart]]()

    def for_each_rest(data: pd.DataFrame, draw: Callable[[pd.DataFrame], Any], name: str = "") -> dict[str, Any]:
        groups = data.groupby("rest", sort=False)
        return {", ".join(filter(None, (str(rest), name))) or "all": draw(part) for rest, part in groups}

    if reward:
        parts["frontier"] = _frontier(runs, fs, best, reward)
        parts["diversity"] = {
            title: charts.lines(charts.points(runs, f"policy.{reward}", c), fs, reward, title)
            for c, title in DIVERSITY.items()
            if c in runs
        }
    parts["cross_table"] = for_each_rest(cross_table(runs), lambda part: charts.heat_map(part, fs))
    parts["by_step"] = {}
    for column in (c for c in curves if c.startswith("to_target.")):
        parts["by_step"] |= for_each_rest(
            curves.dropna(subset=column),
            lambda part, y=column: charts.lines(charts.over_steps(part, y), fs, "step", "nats"),  # type: ignore[misc]
            f"D to the target: {column.removeprefix('to_target.')}",
        )
    if {reward, "gold"} <= set(curves) and "policy.gold" in runs and reward != "gold":
        parts["over_optimisation"] = for_each_rest(
            curves,
            lambda part: charts.lines(charts.over_optimisation(part, reward, "gold"), fs, "√KL(π‖reference)", "score"),
        )
    return parts


def _frontier(runs: pd.DataFrame, fs: list[str], best: pd.DataFrame, reward: str) -> dict[str, alt.LayerChart]:
    """Scores against KL, beside best of n and, where the language was enumerated, the optimum."""

    def line(data: pd.DataFrame, y: str, kind: str) -> pd.DataFrame:
        return data.rename(columns={"kl_reference": "x", y: "y"})[["x", "y"]].assign(kind=kind)

    def against_kl(source: str, score: str, y: str, baselines: pd.DataFrame) -> alt.LayerChart:
        return charts.lines(charts.points(runs, f"{source}.kl_reference", f"{source}.{score}"), fs, KL, y, baselines)

    of_n = line(best, reward, "best of n")
    if len(exact := exact_frontier(runs)):
        inside = exact[exact["kl_reference"] <= 1.3 * max(runs["exact.kl_reference"].max(), of_n["x"].max())]
        return {reward: against_kl("exact", "reward", reward, pd.concat([of_n, line(inside, "reward", "optimum")]))}
    figures = {reward: against_kl("policy", reward, reward, of_n)}
    if "policy.gold" in runs and reward != "gold":
        figures["gold"] = against_kl("policy", "gold", "gold", line(best, "gold", "best of n, by the reward"))
    return figures


def _markdown(table: pd.DataFrame) -> str:
    def cell(x: Any) -> str:
        if not isinstance(x, float | np.floating):
            return plain(str(x))
        return "–" if np.isnan(x) else f"{x:.4g}"

    return markdown_table(list(table), *([cell(x) for x in row] for row in table.to_numpy(object)))


def _made_of(table: pd.DataFrame) -> pd.DataFrame:
    """What the runs share and where they differ: settings, versions, machine, commit."""
    differ = [c for c in table if c.startswith("config.") and table[c].astype(str).nunique() > 1]
    shared = ["git_commit", "machine", *(c for c in table if c.startswith("versions."))]
    values = [(c.removeprefix("config."), ", ".join(map(str, table[c].unique()))) for c in (*differ, *shared)]
    return pd.DataFrame(values, columns=["what", "value"])


def _samples(runs: pd.DataFrame) -> dict[str, str]:
    """By prompt a table of every setting's first completion, of the first seed; the reference's comes first."""
    found: dict[str, list[tuple[str, str]]] = {}
    for run in runs[runs["seed"] == runs["seed"].min()][["run", "divergence", "rest"]].itertuples():
        samples = pd.read_parquet(Path(run.run) / "evaluate" / "samples.parquet").drop_duplicates("prompt")
        for sample in samples.head(PROMPTS).itertuples():
            rows = found.setdefault(" ".join(sample.prompt.split()), [("reference", plain(sample.sft))])
            rows.append((plain(", ".join(filter(None, (run.divergence, run.rest)))), plain(sample.policy)))
    return {prompt: markdown_table(("setting", "completion"), *rows) for prompt, rows in found.items()}
