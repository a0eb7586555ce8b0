"""What `rlhf-fdiv report` writes of the runs of an ablation: results.csv, results.tex, figures, report.md, report.html."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import altair as alt
import jinja2
import numpy as np
import pandas as pd
import vl_convert

from rlhf_fdiv import charts
from rlhf_fdiv.comparison import (
    Claim,
    best_of_n_curve,
    cross_table,
    exact_frontier,
    setting_columns,
    settings_of,
    summarise,
    training_curves,
)
from rlhf_fdiv.report import markdown_table
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


class Content(NamedTuple):
    """What both reports say. `tables` and `claims` are by metric, `samples` are (setting, completion) by prompt."""

    title: str
    intro: list[str]
    tables: dict[str, pd.DataFrame]
    claims: dict[str, list[Claim]]
    sections: list[Section]
    samples: dict[str, list[list[str]]]
    made_of: list[list[str]]


def write_comparison(
    out: Path, table: pd.DataFrame, keys: list[str], claims: dict[str, list[Claim]], notes: list[str]
) -> None:
    """Everything about the runs of `table` into `out`; `claims` by metric, `notes` are what a reader must know first."""
    out.mkdir(parents=True, exist_ok=True)
    columns = setting_columns(table, keys)
    settings, reward = settings_of(table, columns), _reward(table)
    curves, best = training_curves(settings), best_of_n_curve(table, reward)
    content = Content(
        out.resolve().parent.name,
        [_introduction(table), *notes],
        {metric: settings_table(table, columns, metric) for metric in claims},
        claims,
        _sections(table, settings, curves, best, reward),
        _samples(settings),
        _made_of(table),
    )
    for name, data in {
        "results": table,
        "curves": curves.drop(columns="run", errors="ignore"),
        "best_of_n": best,
    }.items():
        write_atomically(out / f"{name}.csv", data.to_csv(index=False))
    write_atomically(out / "results.tex", "\n".join(f"% {m}\n{_latex(t)}" for m, t in content.tables.items()))
    for section in content.sections:
        picture = charts.for_paper(section.figures)
        picture.save(str(out / f"{section.name}.png"), ppi=100)
        picture.save(str(out / f"{section.name}.pdf"))
    write_atomically(out / "report.md", _markdown(content))
    write_atomically(out / "report.html", _html(content))


def _latex(table: pd.DataFrame) -> str:
    return table.to_latex(index=False, escape=True, float_format="%.3g", na_rep="--")


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
    groups = table.groupby(columns, sort=False, dropna=False) if columns else [((), table)]
    rows = []
    for values, runs in groups:
        found = summarise(runs[metric].to_numpy(float))
        named = {k.removeprefix("config."): v for k, v in zip(columns, values, strict=True)}
        means = {c.removeprefix("policy."): float(runs[c].mean()) for c in BESIDE if c in table and c != metric}
        rows.append({**named, "IQM": found.iqm, "low": found.low, "high": found.high, "seeds": found.seeds, **means})
    return pd.DataFrame(rows)


def _reward(table: pd.DataFrame) -> str:
    """The scorer that the target is made of: its reward, or the first of its moments; empty where it has neither."""
    moments = [c.removeprefix("config.target.moments.") for c in table if c.startswith("config.target.moments.")]
    named = table["config.target.reward"].dropna().astype(str).tolist() if "config.target.reward" in table else []
    return next((name for name in (*named, *moments) if f"policy.{name}" in table), "")


def _sections(
    table: pd.DataFrame, settings: pd.DataFrame, curves: pd.DataFrame, best: pd.DataFrame, reward: str
) -> list[Section]:
    """The figures that these runs have data for."""
    fs, rests = list(dict.fromkeys(settings["divergence"])), list(dict.fromkeys(settings["rest"]))
    cross = cross_table(table, settings)
    gold = next((c for c in curves if f"policy.{c}" in table and c == "gold"), "")
    sections = []
    if reward:
        sections.append(_frontier(table, settings, fs, best, reward))
        figures = {title: charts.trade_off(charts.points(table, settings, f"policy.{reward}", c), fs, reward, title)
                   for c, title in DIVERSITY.items() if c in table}  # fmt: skip
        sections.append(
            Section("diversity", "Diversity against reward", "What each f gives up for its reward.", figures)
        )

    def for_each_rest(draw: Any, data: pd.DataFrame, name: str) -> dict[str, alt.LayerChart]:
        parts = {rest: data[data["rest"] == rest] for rest in rests}
        return {", ".join(filter(None, (rest, name))) or "all": draw(part) for rest, part in parts.items() if len(part)}

    if len(cross.dropna(subset=["value"])):
        text = (
            "Every trained model (rows) under every divergence to the target (columns), in nats, on held-out prompts: means "
            "over seeds. Dark is best within a column; what these samples cannot measure is left out."
        )
        figures = for_each_rest(lambda part: charts.heat_map(part, fs), cross.dropna(subset=["value"]), "")
        sections.append(Section("cross_table", "Every model under every divergence", text, figures))
    measured = [c for c in curves if c.startswith("to_target.")]
    if measured:
        text = (
            "The same while training, from each step's own completions where these can measure it: means over seeds, with "
            "1.96 standard errors."
        )
        figures = {}
        for column in measured:
            name = f"D to the target: {column.removeprefix('to_target.')}"
            draw = lambda part, column=column: charts.by_step(part, fs, column, "nats")  # noqa: E731
            figures |= for_each_rest(draw, curves.dropna(subset=[column]), name)
        sections.append(Section("by_step", "Divergences by training step", text, figures))
    if gold and reward in curves and gold != reward:
        text = f"“{reward}” is what training raises, “{gold}” was fitted to other data and trains nothing (arXiv 2210.10760)."
        figures = for_each_rest(lambda part: charts.over_optimisation(part, fs, reward, gold), curves, "")
        sections.append(Section("over_optimisation", "Proxy and gold reward", text, figures))
    return sections


def _frontier(table: pd.DataFrame, settings: pd.DataFrame, fs: list[str], best: pd.DataFrame, reward: str) -> Section:
    exact = exact_frontier(table)
    source = "exact" if len(exact) else "policy"
    x, y = f"{source}.kl_reference", "exact.reward" if len(exact) else f"policy.{reward}"
    data = charts.points(table, settings, x, y)
    lines = best.rename(columns={"kl_reference": "x", reward: "y"})[["x", "y"]].assign(kind="best of n")
    text = (
        "A curve for each f, with 95 % intervals over seeds. Best of n, at n = 1, 2, 4, …, needs no training but n "
        "completions for each one; its KL is an upper bound."
    )
    if len(exact):
        inside = exact[exact["kl_reference"] <= 1.3 * max(data["x"].max(), lines["x"].max())]
        lines = pd.concat(
            [lines, inside.rename(columns={"kl_reference": "x", "reward": "y"})[["x", "y"]].assign(kind="optimum")]
        )
        text += " The optimum, a·exp(r/β) for every β, is exact: no policy is above it."
    figures = {reward: charts.trade_off(data, fs, KL, reward, lines)}
    if source == "policy" and "policy.gold" in table and reward != "gold":
        of_gold = best.rename(columns={"kl_reference": "x", "gold": "y"})[["x", "y"]].assign(
            kind="best of n, by the reward"
        )
        figures["gold"] = charts.trade_off(charts.points(table, settings, x, "policy.gold"), fs, KL, "gold", of_gold)
    return Section("frontier", "Reward against KL to the reference", text, figures)


def _rows(table: pd.DataFrame) -> list[list[str]]:
    return [[_cell(x) for x in row] for row in table.to_numpy(dtype=object).tolist()]


def _cell(x: Any) -> str:
    if not isinstance(x, float | np.floating):
        return str(x)
    return "–" if np.isnan(x) else f"{x:.4g}"


def _made_of(table: pd.DataFrame) -> list[list[str]]:
    """What the runs share and where they differ: settings, versions, machine, commit."""
    differ = [c for c in table if c.startswith("config.") and table[c].astype(str).nunique() > 1]
    rows = [[c.removeprefix("config."), ", ".join(map(str, dict.fromkeys(table[c])))] for c in differ]
    shared = ["git_commit", "machine", *(c for c in table if c.startswith("versions."))]
    return rows + [[c, ", ".join(map(str, dict.fromkeys(table[c])))] for c in shared if c in table]


def _samples(settings: pd.DataFrame) -> dict[str, list[list[str]]]:
    """By prompt: a setting and its first completion, of the first seed; the reference's comes first."""
    first = settings[settings["seed"] == settings["seed"].min()]
    found: dict[str, list[list[str]]] = {}
    for run in first.itertuples(index=False):
        samples = (
            pd.read_parquet(Path(run.run) / "evaluate" / "samples.parquet").drop_duplicates("prompt").head(PROMPTS)
        )
        for sample in samples.itertuples(index=False):
            rows = found.setdefault(sample.prompt, [["reference", sample.sft]])
            rows.append([", ".join(filter(None, (run.divergence, run.rest))), sample.policy])
    return found


def _markdown(content: Content) -> str:
    def flat(text: str) -> str:
        return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())

    parts = [f"# {content.title}", *content.intro]
    for metric, table in content.tables.items():
        sentences = "\n".join(f"- {claim.sentence}" for claim in content.claims[metric])
        parts.append(f"## {metric}\n\n{markdown_table(list(table), *_rows(table))}\n\n{sentences}".rstrip())
    parts += [f"## {s.title}\n\n{s.text}\n\n![{s.title}]({s.name}.png)" for s in content.sections]
    parts.append("## Samples\n\nThe first completion of the first seed, for the same prompts.")
    for prompt, rows in list(content.samples.items())[:3]:
        cells = ([flat(x) for x in row] for row in rows)
        parts.append(f"**{flat(prompt)}**\n\n{markdown_table(('setting', 'completion'), *cells)}")
    made_of = ([flat(x) for x in row] for row in content.made_of)
    parts.append("## Made with\n\n" + markdown_table(("what", "value"), *made_of))
    return "\n\n".join(parts) + "\n"


def _html(content: Content) -> str:
    """One file that needs no network: the drawing library is in it."""
    specs = {f"{s.name}-{i}": chart.to_dict() for s in content.sections for i, chart in enumerate(s.figures.values())}
    template = resources.files("rlhf_fdiv").joinpath("comparison.html.j2").read_text(encoding="utf-8")
    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    return (
        jinja2.Environment(autoescape=True)
        .from_string(template)
        .render(
            content=content,
            tables={metric: (list(table), _rows(table)) for metric, table in content.tables.items()},
            library=vl_convert.javascript_bundle(vl_version=version),  # type: ignore[call-arg]
            specs=json.dumps(specs).replace("</", "<\\/"),
        )
    )
