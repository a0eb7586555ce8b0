"""What `rlhf-fdiv report` writes of the runs of an ablation: results.csv, results.tex, figures, report.md, report.html."""

from __future__ import annotations

import html
import json
import string
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

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
from rlhf_fdiv.report import markdown_table, plain
from rlhf_fdiv.tracking import write_atomically

BESIDE = ("policy.kl_reference", "policy.entropy", "policy.distinct_2", "policy.self_bleu")
DIVERSITY = {
    "policy.entropy": "entropy, nats a token",
    "policy.distinct_2": "distinct-2",
    "policy.self_bleu": "self-BLEU",
}
KL = "KL(π‖reference), nats"
PROMPTS = 8


class Section(NamedTuple):
    """A part of the report: what its figures show, and the figures by title."""

    name: str
    title: str
    text: str
    figures: dict[str, alt.LayerChart]


def write_comparison(
    out: Path, table: pd.DataFrame, keys: list[str], claims: dict[str, list[Claim]], notes: list[str]
) -> None:
    """Everything about the runs of `table` into `out`; `claims` by metric, `notes` are what a reader must know first."""
    out.mkdir(parents=True, exist_ok=True)
    columns, runs, reward = setting_columns(table, keys), with_settings(table, keys), _reward(table)
    curves, best = training_curves(runs), best_of_n_curve(runs, reward) if reward else pd.DataFrame()
    tables = {metric: settings_table(table, columns, metric) for metric in claims}
    sections = _sections(runs, curves, best, reward)

    def page(figures: Callable[[Section], str]) -> str:
        """The report as Markdown, in which `figures` stand for a section's."""
        parts = [f"# {out.resolve().parent.name}", _introduction(table), *notes]
        parts += [f"## {s.title}\n\n{s.text}\n\n{figures(s)}" for s in sections]
        for metric, figure in tables.items():
            parts += [f"## {metric}", _markdown(figure), "\n".join(f"- {claim.sentence}" for claim in claims[metric])]
        return "\n\n".join([*parts, *_samples(runs), "## Made with", _markdown(_made_of(table))]) + "\n"

    written = {"results": table, "curves": curves.drop(columns="run", errors="ignore"), "best_of_n": best}
    for name, data in written.items():
        write_atomically(out / f"{name}.csv", data.to_csv(index=False))
    latex = {m: t.to_latex(index=False, escape=True, float_format="%.3g", na_rep="--") for m, t in tables.items()}
    write_atomically(out / "results.tex", "\n".join(f"% {metric}\n{text}" for metric, text in latex.items()))
    for section in sections:
        picture = charts.for_paper(section.figures)
        picture.save(str(out / f"{section.name}.png"), ppi=100)
        picture.save(str(out / f"{section.name}.pdf"))
    write_atomically(out / "report.md", page(lambda s: f"![{s.title}]({s.name}.png)"))
    write_atomically(out / "report.html", _html(out.resolve().parent.name, page(_places), sections))


def _introduction(table: pd.DataFrame) -> str:
    curvature = " and ".join(("off", "on")[x] for x in sorted(set(table["unit_curvature"])))
    return (
        f"{len(table)} runs, {int(table['samples'].sum()):,} samples, {table['seconds'].sum() / 60:.0f} min. Curvature "
        f"normalisation {curvature}. IQM is the interquartile mean over seeds, with its 95 % bootstrap interval from three "
        "seeds on; pairs, named before the runs, are tested by changes of sign over seeds, with Holm's correction over the "
        "pairs of a figure."
    )


def settings_table(table: pd.DataFrame, columns: list[str], metric: str) -> pd.DataFrame:
    """A row for each setting: the metric's IQM and interval, and the means of what stands beside it."""
    columns = columns or ["config.divergence"]
    beside = [c for c in BESIDE if c in table and c != metric]
    means = table.groupby(columns, sort=False, dropna=False)[beside].mean().reset_index(drop=True)
    whole = pd.concat([summaries(table, columns, metric), means], axis=1)
    return whole.rename(columns=lambda c: c.removeprefix("config.").removeprefix("policy.")).rename(
        columns={"iqm": "IQM"}
    )


def _reward(table: pd.DataFrame) -> str:
    """The scorer that the target is made of: its reward, or the first of its moments; empty where it has neither."""
    moments = [c.removeprefix("config.target.moments.") for c in table if c.startswith("config.target.moments.")]
    named = table["config.target.reward"].dropna().astype(str).tolist() if "config.target.reward" in table else []
    return next((name for name in (*named, *moments) if f"policy.{name}" in table), "")


def _sections(runs: pd.DataFrame, curves: pd.DataFrame, best: pd.DataFrame, reward: str) -> list[Section]:
    """The figures that these runs have data for."""
    fs, cross = list(dict.fromkeys(runs["divergence"])), cross_table(runs)

    def for_each_rest(data: pd.DataFrame, draw: Callable[[pd.DataFrame], Any], name: str = "") -> dict[str, Any]:
        parts = data.groupby("rest", sort=False)
        return {", ".join(filter(None, (str(rest), name))) or "all": draw(part) for rest, part in parts}

    sections = []
    if reward:
        sections.append(_frontier(runs, fs, best, reward))
        figures = {
            title: charts.lines(charts.points(runs, f"policy.{reward}", c), fs, reward, title)
            for c, title in DIVERSITY.items()
            if c in runs
        }
        text = "What each f gives up for its reward."
        sections.append(Section("diversity", "Diversity against reward", text, figures))
    if len(cross):
        text = (
            "Every trained model (rows) under every divergence to the target (columns), in nats, on held-out prompts: means "
            "over seeds. Dark is best within a column; what these samples cannot measure is left out."
        )
        figures = for_each_rest(cross, lambda part: charts.heat_map(part, fs))
        sections.append(Section("cross_table", "Every model under every divergence", text, figures))
    if measured := [c for c in curves if c.startswith("to_target.")]:
        text = (
            "The same while training, from each step's own completions where these can measure it: means over seeds, with "
            "1.96 standard errors."
        )
        figures = {}
        for c in measured:
            draw = lambda part, c=c: charts.lines(charts.over_steps(part, c), fs, "step", "nats")  # noqa: E731
            figures |= for_each_rest(curves.dropna(subset=c), draw, f"D to the target: {c.removeprefix('to_target.')}")
        sections.append(Section("by_step", "Divergences by training step", text, figures))
    if {reward, "gold"} <= set(curves) and "policy.gold" in runs and reward != "gold":
        text = f"“{reward}” is what training raises, “gold” was fitted to other data and trains nothing (arXiv 2210.10760)."
        figures = for_each_rest(
            curves,
            lambda part: charts.lines(
                charts.over_optimisation(part, reward, "gold"), fs, "√KL(π‖reference), √nats", "score"
            ),
        )
        sections.append(Section("over_optimisation", "Proxy and gold reward", text, figures))
    return sections


def _frontier(runs: pd.DataFrame, fs: list[str], best: pd.DataFrame, reward: str) -> Section:
    def baseline(data: pd.DataFrame, y: str, kind: str) -> pd.DataFrame:
        return data.rename(columns={"kl_reference": "x", y: "y"})[["x", "y"]].assign(kind=kind)

    text = (
        "A curve for each f, with 95 % intervals over seeds. Best of n, at n = 1, 2, 4, …, needs no training but n "
        "completions for each one; its KL is an upper bound."
    )
    exact, of_n = exact_frontier(runs), baseline(best, reward, "best of n")
    if len(exact):
        text += " The optimum, a·exp(r/β) for every β, is exact: no policy is above it."
        data = charts.points(runs, "exact.kl_reference", "exact.reward")
        inside = exact[exact["kl_reference"] <= 1.3 * max(data["x"].max(), of_n["x"].max())]
        optimum = pd.concat([of_n, baseline(inside, "reward", "optimum")])
        figures = {reward: charts.lines(data, fs, KL, reward, optimum)}
    else:
        figures = {
            reward: charts.lines(charts.points(runs, "policy.kl_reference", f"policy.{reward}"), fs, KL, reward, of_n)
        }
        if "policy.gold" in runs and reward != "gold":
            of_n = baseline(best, "gold", "best of n, by the reward")
            data = charts.points(runs, "policy.kl_reference", "policy.gold")
            figures["gold"] = charts.lines(data, fs, KL, "gold", of_n)
    return Section("frontier", "Reward against KL to the reference", text, figures)


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


def _samples(runs: pd.DataFrame) -> list[str]:
    """By prompt: every setting with its first completion, of the first seed; the reference's comes first."""
    found: dict[str, list[tuple[str, str]]] = {}
    for run in runs[runs["seed"] == runs["seed"].min()][["run", "divergence", "rest"]].itertuples():
        samples = pd.read_parquet(Path(run.run) / "evaluate" / "samples.parquet").drop_duplicates("prompt")
        for sample in samples.head(PROMPTS).itertuples():
            rows = found.setdefault(sample.prompt, [("reference", plain(sample.sft))])
            rows.append((", ".join(filter(None, (run.divergence, run.rest))), plain(sample.policy)))
    parts = ["## Samples", "The first completion of the first seed, for the same prompts."]
    for prompt, rows in found.items():
        summary = f"<details>\n<summary>{html.escape(' '.join(prompt.split()))}</summary>"
        parts += [summary, markdown_table(("setting", "completion"), *rows), "</details>"]
    return parts


def _places(section: Section) -> str:
    """Where the browser draws a section's figures."""
    figures = (
        f'<figure><figcaption>{html.escape(title)}</figcaption><div class="figure" id="{section.name}-{i}"></div></figure>'
        for i, title in enumerate(section.figures)
    )
    return f'<div class="figures">{"".join(figures)}</div>'


def _html(title: str, markdown: str, sections: list[Section]) -> str:
    """One file that needs no network: the drawing library is in it."""
    specs = {f"{s.name}-{i}": chart.to_dict() for s in sections for i, chart in enumerate(s.figures.values())}
    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    shell = resources.files("rlhf_fdiv").joinpath("comparison.html").read_text(encoding="utf-8")
    return string.Template(shell).substitute(
        title=html.escape(title),
        body=MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown),
        library=vl_convert.javascript_bundle(vl_version=version),  # type: ignore[call-arg]
        specs=json.dumps(specs).replace("</", "<\\/"),
    )
