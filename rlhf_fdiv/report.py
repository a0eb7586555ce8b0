"""report.md and its figures: what one run asked for and what came out, readable without any tool."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf_fdiv import divergences
from rlhf_fdiv.config import RunConfig
from rlhf_fdiv.metrics import MAUVE_TEXTS
from rlhf_fdiv.tracking import environment, write_atomically

ROWS = ("objective", "kl_reference", "entropy", "length", "distinct_1", "distinct_2", "distinct_3", "self_bleu", "bleu",
        "rouge_l", "mauve", "perplexity", "bits_per_character")  # fmt: skip

PANELS = ("objective", "kl_reference", "divergence_target", "entropy", "margin", "accuracy", "divergence_by_token")
KINDS = (".pdf", ".png")


def write_report(config: RunConfig, run: Path, out: Path, report: dict[str, Any], samples: pd.DataFrame) -> None:
    """Figures as PNG and PDF into `out`, and `report.md` into the run folder."""
    curves = training_figure(run / config.objective.stage / "metrics.jsonl", out)
    texts = samples.drop_duplicates("prompt")[["prompt", "sft", "policy"]].head(config.evaluate.samples).map(plain)
    text = TEMPLATES.get_template("report.md").render(
        config=config,
        f=divergences.label(config.f),
        has_objective="objective" in report["policy"],
        main=main_table(config, report),
        inference=inference_table(config, report) if "inference" in report else "",
        lm_eval=before_and_after(report["lm_eval"], report["lm_eval"]["sft"]) if "lm_eval" in report else "",
        divergences=divergence_table(report),
        figures=curves + score_histograms(config, samples, out),
        samples=markdown_table(("prompt", "before", "after"), *texts.to_numpy()),
        environment=json.dumps(environment(), indent=2),
    )
    write_atomically(run / "report.md", text)


TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("rlhf_fdiv"),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def plain(text: str) -> str:
    """Anyone's text as Markdown of one line that shows it as it stands."""
    return re.sub(r"([\\`*_\[\]<>|&~])", r"\\\1", " ".join(text.split()))


def markdown_table(*rows: Iterable[str]) -> str:
    """Markdown; the first row is the head."""
    head, *lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, re.sub(r"[^|]+", " --- ", head), *lines])


def figure(values: dict[str, Any], key: str) -> str:
    """Three digits of a figure, with its standard error if there is one."""
    value, error = values.get(key), values.get(f"{key}_se")
    if value is None:
        return "–"
    return f"{value:.3g}" if error is None else f"{value:.3g} ± {error:.2g}"


def before_and_after(report: dict[str, Any], keys: Iterable[str]) -> str:
    """These figures of `sft` and `policy`, and, where the report has them, their paired gains."""
    sides = [(report["sft"], ""), (report["policy"], "")] + (
        [(report["paired"], "_gain")] if "paired" in report else []
    )
    rows = [(key, *(figure(side, key + end) for side, end in sides)) for key in keys if not key.endswith("_se")]
    return markdown_table(("", "before", "after", "gain (paired)")[: len(sides) + 1], *rows)


def main_table(config: RunConfig, report: dict[str, Any]) -> str:
    """The figures of `evaluate/metrics.json` before and after, and their paired gain, as Markdown."""
    table = before_and_after(report, [k for k in (*config.scorers, *ROWS) if report["policy"].get(k) is not None])
    if (n := report.get("mauve_texts", MAUVE_TEXTS)) < MAUVE_TEXTS:
        table += f"\n\nMAUVE is of {n} texts a side: below about {MAUVE_TEXTS} it is not reliable."
    return table


def inference_table(config: RunConfig, report: dict[str, Any]) -> str:
    """The trained policy beside what sampling from the reference reaches without training."""
    tv = report["divergence_to_target"].get("tv", {})
    trained = report["policy"] | {"tv_bound": tv.get("value"), "tv_bound_se": tv.get("standard_error")}
    models = [{"method": "reference", "samples": 1, **report["sft"]}, {"method": "trained", "samples": 1, **trained}]
    keys = ("samples", *config.scorers, "kl_reference", "objective", "tv_bound")
    rows = [(row["method"], *(figure(row, key) for key in keys)) for row in (*models, *report["inference"])]
    head = ("", "samples a text", *config.scorers, "KL to the reference", "objective", "TV to the target")
    return markdown_table(head, *rows)


def divergence_table(report: dict[str, Any]) -> str:
    """Each measured D_f with its standard error, or why it is withheld, as Markdown."""

    def cell(measured: dict[str, Any] | None) -> str:
        if measured is None or measured["reason"]:
            return measured["reason"] if measured else "–"
        found = {"value": measured["value"], "value_se": measured["standard_error"]}
        return "∞" if measured["value"] is None else figure(found, "value")

    to_target = report.get("divergence_to_target", {})
    rows = [(name, cell(x), cell(to_target.get(name))) for name, x in report["divergence_to_reference"].items()]
    prompts = report.get("prompts", 10)  # which reports of before did not say
    few = f" Of {prompts} prompts it is itself rough." if prompts < 10 else ""
    note = f"± is one standard error, clustered by prompt.{few}"
    if z := report.get("log_z"):
        ess = f"ESS {z['ess']:.1f} of {z['samples']} samples a prompt"
        note += f" log Ẑ(x) of the target: mean {figure(z, 'mean')}, {ess}."
    return markdown_table(("f", "to the reference", "to the target"), *rows) + f"\n\n{note}"


def training_figure(
    metrics: Path, out: Path, panels: Iterable[str] = PANELS, kinds: Iterable[str] = KINDS
) -> list[Path]:
    """What a metrics.jsonl has of the panels over the steps, as `training.png` in `out`; its path, or none without any."""
    table = pd.read_json(metrics, lines=True) if metrics.is_file() else pd.DataFrame()

    def draw(axis: Axes, column: str) -> None:
        table.plot(x="step", y=column, ax=axis, legend=False, color="#1f5a94", title=column.replace("_", " "))

    return _figure([c for c in panels if c in table and table[c].notna().sum() > 1], draw, out / "training", kinds)


def score_histograms(config: RunConfig, samples: pd.DataFrame, out: Path) -> list[Path]:
    """Each score before and after, as `before_and_after.png` in `out`; its path, or none where no score varies."""

    def draw(axis: Axes, scorer: str) -> None:
        scores = samples[[f"sft_{scorer}", f"policy_{scorer}"]].set_axis(["before", "after"], axis=1)
        named = scores.rename(columns=lambda when: f"{when}, mean {scores[when].mean():.2f}")
        named.plot.hist(ax=axis, bins=24, alpha=0.65, color=["#9a9a9a", "#1f5a94"], title=scorer, ylabel="")
        axis.set_xlabel("score of a held-out completion")
        axis.legend(frameon=False, fontsize=7)

    scorers = [s for s in config.scorers if samples[f"policy_{s}"].nunique() > 2]
    return _figure(scorers, draw, out / "before_and_after", KINDS)


def _figure(panels: list[str], draw: Callable[[Axes, str], None], path: Path, kinds: Iterable[str]) -> list[Path]:
    """Panels side by side; the PNG's path, or none where there are no panels."""
    if not panels:
        return []
    drawn = Figure(figsize=(3.2 * len(panels), 2.6))
    for axis, panel in zip(drawn.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axis, panel)
        axis.spines[["top", "right"]].set_visible(False)
    for kind in kinds:
        drawn.savefig(path.with_suffix(kind), dpi=150, bbox_inches="tight")
    return [path.with_suffix(".png")]
