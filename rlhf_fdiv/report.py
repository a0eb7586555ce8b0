"""report.md and its figures: what one run asked for and what came out, readable without any tool."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

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

Kinds = tuple[str, ...]
BOTH: Kinds = (".pdf", ".png")


def write_report(config: RunConfig, run: Path, out: Path, report: dict[str, Any], samples: pd.DataFrame) -> None:
    """Figures as PNG and PDF into `out`, and `report.md` into the run folder."""
    curves = training_curves(run / config.objective.stage / "metrics.jsonl", out)
    figures = curves + _before_and_after(config, samples, out)
    parts = [
        f"# {config.name}",
        what(config, "objective" in report["policy"]),
        "## Before and after, on held-out prompts\n\n" + main_table(config, report),
        *_inference_section(config, report),
        *_lm_eval_section(config, report),
        "## Divergences of the policy, in nats\n\n" + divergence_table(report),
        "## Training\n\n" + "\n\n".join(f"![{f.stem}]({f.relative_to(run)})" for f in figures),
        "## Samples\n\n" + _samples(samples, config.evaluate.samples),
        "## Made with\n\n```json\n" + json.dumps(environment(), indent=2) + "\n```",
    ]
    write_atomically(run / "report.md", "\n\n".join(parts) + "\n")


def what(config: RunConfig, has_objective: bool) -> str:
    """Divergence, objective, target, estimator and their β in one sentence."""
    f, stage = config.f, config.objective.stage
    how = {
        "policy": f"target {_named(config.target)}, estimator {_named(config.estimator)}",
        "prefer": "from pairs, offline",
        "distil": f"teacher `{config.distil.teacher}`",
    }[stage]
    objective = f" The reported objective is E[r] − {config.beta:g}·KL(π‖reference)." if has_objective else ""
    return (
        f"Objective {_named(config.objective)}, divergence `{divergences.label(f)}` ({f.direction or 'a user’s own f'}), "
        f"{how}, seed {config.seed}; "
        f"curvature normalisation {'on' if config.divergence.get('unit_curvature') else 'off'}." + objective
    )


def _named(part: Any) -> str:
    return f"`{part.name}`" + (f" with β = {part.beta:g}" if hasattr(part, "beta") else "")


def markdown_table(*rows: Iterable[str]) -> str:
    """Markdown; the first row is the head."""
    head, *lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, re.sub(r"[^|]+", " --- ", head), *lines])


def plain(text: str) -> str:
    """Anyone's text as Markdown of one line that shows it as it stands."""
    return re.sub(r"([\\`*_\[\]<>|&~])", r"\\\1", " ".join(text.split()))


def _number(value: float | None, error: float | None = None) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if error is None else f"{value:.3g} ± {error:.2g}"


def main_table(config: RunConfig, report: dict[str, Any]) -> str:
    """The figures of `evaluate/metrics.json` before and after, and their paired gain, as Markdown."""

    def cell(values: dict[str, Any], key: str) -> str:
        return _number(values.get(key), values.get(f"{key}_se"))

    sft, policy, paired = report["sft"], report["policy"], report["paired"]
    rows = [
        (key, cell(sft, key), cell(policy, key), cell(paired, f"{key}_gain"))
        for key in (*config.scorers, *ROWS)
        if policy.get(key) is not None
    ]
    table = markdown_table(("", "before", "after", "gain (paired)"), *rows)
    if (n := report.get("mauve_texts", MAUVE_TEXTS)) < MAUVE_TEXTS:
        table += f"\n\nMAUVE is of {n} texts a side: below about {MAUVE_TEXTS} it is not reliable."
    return table


def _inference_section(config: RunConfig, report: dict[str, Any]) -> list[str]:
    """The trained policy beside what sampling from the reference reaches without training; none without a target."""
    if "inference" not in report:
        return []
    columns = (*config.scorers, "kl_reference", "objective", "tv_bound")
    tv = report["divergence_to_target"].get("tv", {})
    trained = report["policy"] | {"tv_bound": tv.get("value"), "tv_bound_se": tv.get("standard_error")}
    models = [{"method": "reference", "samples": 1, **report["sft"]}, {"method": "trained", "samples": 1, **trained}]
    rows = [
        (row["method"], _number(row["samples"]), *(_number(row.get(key), row.get(f"{key}_se")) for key in columns))
        for row in (*models, *report["inference"])
    ]
    head = ("", "samples a text", *config.scorers, "KL to the reference", "objective", "TV to the target")
    note = (
        "Without training: the best of n samples of the reference (at most this KL, at least this objective), and "
        "quasi-rejection, which accepts a sample with probability min(1, exp(potential)/b) and draws from the target itself "
        "where no text exceeds b; its TV is a bound. Estimated from the samples above; what they cannot support is left out."
    )
    return ["## What training buys\n\n" + markdown_table(head, *rows) + f"\n\n{note}"]


def _lm_eval_section(config: RunConfig, report: dict[str, Any]) -> list[str]:
    if "lm_eval" not in report:
        return []
    before, after = report["lm_eval"]["sft"], report["lm_eval"]["policy"]
    rows = [
        (key, *(_number(x[key], x.get(f"{key}_se")) for x in (before, after)))
        for key in before
        if not key.endswith("_se")
    ]
    limit = config.evaluate.lm_eval_limit
    note = f"The first {limit} examples of each task." if limit else "All examples of each task."
    return ["## lm-eval\n\n" + markdown_table(("", "before", "after"), *rows) + f"\n\n{note}"]


def divergence_table(report: dict[str, Any]) -> str:
    """Each measured D_f with its standard error, or why it is withheld, as Markdown."""

    def cell(measured: dict[str, Any] | None) -> str:
        if measured is None or measured["reason"]:
            return measured["reason"] if measured else "–"
        return "∞" if measured["value"] is None else _number(measured["value"], measured["standard_error"])

    to_target = report.get("divergence_to_target", {})
    rows = [(name, cell(x), cell(to_target.get(name))) for name, x in report["divergence_to_reference"].items()]
    note = "± is one standard error, clustered by prompt. "
    if z := report.get("log_z"):
        ess = f"ESS {z['ess']:.1f} of {z['samples']} samples a prompt"
        note += f"log Ẑ(x) of the target: mean {_number(z['mean'])}, {ess}."
    return markdown_table(("f", "to the reference", "to the target"), *rows) + f"\n\n{note}"


def _samples(samples: pd.DataFrame, count: int) -> str:
    def cell(text: str) -> str:
        return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())

    texts = samples.drop_duplicates("prompt")[["prompt", "sft", "policy"]].head(count)
    return markdown_table(("prompt", "before", "after"), *(map(cell, row) for row in texts.to_numpy().tolist()))


def _figure(panels: list[str], draw: Callable[[Axes, str], None], path: Path, kinds: Kinds = BOTH) -> list[Path]:
    """Panels side by side; the PNG's path, or none where there are no panels."""
    if not panels:
        return []
    figure = Figure(figsize=(3.2 * len(panels), 2.6))
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axis, panel)
        axis.spines[["top", "right"]].set_visible(False)
    for kind in kinds:
        figure.savefig(path.with_suffix(kind), dpi=150, bbox_inches="tight")
    return [path.with_suffix(".png")]


def training_curves(metrics: Path, out: Path, panels: tuple[str, ...] = PANELS, kinds: Kinds = BOTH) -> list[Path]:
    """What a metrics.jsonl has of the panels over the steps, as `training.png` in `out`; its path, or none without any."""
    table = pd.read_json(metrics, lines=True) if metrics.is_file() else pd.DataFrame()

    def draw(axis: Axes, column: str) -> None:
        axis.plot(table["step"], table[column], color="#1f5a94", linewidth=1.5)
        axis.set(title=column.replace("_", " "), xlabel="step")

    return _figure([c for c in panels if c in table and table[c].notna().sum() > 1], draw, out / "training", kinds)


def _before_and_after(config: RunConfig, samples: pd.DataFrame, out: Path) -> list[Path]:
    def draw(axis: Axes, scorer: str) -> None:
        scores = samples[[f"sft_{scorer}", f"policy_{scorer}"]]
        limits = (scores.min(axis=None), scores.max(axis=None))
        for column, colour, when in zip(scores, ("#9a9a9a", "#1f5a94"), ("before", "after"), strict=True):
            label = f"{when}, mean {scores[column].mean():.2f}"
            axis.hist(scores[column], bins=24, range=limits, color=colour, alpha=0.65, label=label)
        axis.set(title=scorer, xlabel="score of a held-out completion")
        axis.legend(frameon=False, fontsize=7)

    return _figure([s for s in config.scorers if samples[f"policy_{s}"].nunique() > 2], draw, out / "before_and_after")
