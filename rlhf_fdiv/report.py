"""report.md and its figures: what one run asked for and what came out, readable without any tool."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from rlhf_fdiv import divergences
from rlhf_fdiv.config import RunConfig
from rlhf_fdiv.tracking import environment, write_atomically

ROWS = ("objective", "kl_reference", "entropy", "length", "distinct_1", "distinct_2", "distinct_3", "self_bleu", "bleu",
        "rouge_l", "perplexity", "bits_per_character")  # fmt: skip

PANELS = ("objective", "kl_reference", "divergence_target", "entropy", "margin", "accuracy", "divergence_by_token")


def write_report(config: RunConfig, run: Path, out: Path, report: dict[str, Any], samples: pd.DataFrame) -> None:
    """Figures as PNG and PDF into `out`, and `report.md` into the run folder."""
    figures = [
        _training_curves(run / config.objective.stage / "metrics.jsonl", out),
        _before_and_after(config, report, samples, out),
    ]
    parts = [
        f"# {config.name}",
        _what(config),
        "## Before and after, on held-out prompts\n\n" + _main_table(config, report),
        "## Divergences of the policy, in nats\n\n" + _divergence_table(report),
        "## Training\n\n" + "\n\n".join(f"![{f.stem}]({f.relative_to(run)})" for f in figures if f),
        "## Samples\n\n" + _samples(samples, config.evaluate.samples),
        "## Made with\n\n```json\n" + json.dumps(environment(), indent=2) + "\n```",
    ]
    write_atomically(run / "report.md", "\n\n".join(parts) + "\n")


def _what(config: RunConfig) -> str:
    f, target = config.f, config.target
    how = {
        "policy": f"target `{target.name}`, estimator `{config.estimator.name}`",
        "prefer": "from pairs, offline",
        "distil": f"teacher `{config.distil.teacher}`",
    }[config.objective.stage]
    return (
        f"Objective `{config.objective.name}`, divergence `{divergences.label(f)}` ({f.direction or 'a user’s own f'}), "
        f"{how}, seed {config.seed}; "
        f"curvature normalisation {'on' if config.divergence.get('unit_curvature') else 'off'}. "
        f"With β = {config.beta:g}, the objective below is E[r] − β·KL(π‖reference)."
    )


def _number(value: Any, error: Any = None) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" + (f" ± {error:.2g}" if error is not None else "")


def _main_table(config: RunConfig, report: dict[str, Any]) -> str:
    lines = ["| | before | after | gain (paired) |", "| --- | --- | --- | --- |"]
    for key in (*config.scorers, *ROWS):
        before, after = (report[m].get(key) for m in ("sft", "policy"))
        if after is None:
            continue
        errors = [report[m].get(f"{key}_se") for m in ("sft", "policy")]
        gain = _number(report["paired"].get(f"{key}_gain"), report["paired"].get(f"{key}_gain_se"))
        lines.append(f"| {key} | {_number(before, errors[0])} | {_number(after, errors[1])} | {gain} |")
    return "\n".join(lines)


def _divergence_table(report: dict[str, Any]) -> str:
    lines = ["| f | to the reference | to the target |", "| --- | --- | --- |"]
    for name, to_reference in report["divergence_to_reference"].items():
        cells = [to_reference, report.get("divergence_to_target", {}).get(name)]
        shown = [
            "–"
            if c is None
            else c["reason"] or ("∞" if c["value"] is None else _number(c["value"], c["standard_error"]))
            for c in cells
        ]
        lines.append(f"| {name} | {shown[0]} | {shown[1]} |")
    note = ""
    if z := report.get("log_z"):
        ess = f"ESS {z['ess']:.1f} of {z['samples']} samples a prompt"
        note = f"log Ẑ(x) of the target: mean {_number(z['mean'])}, {ess}."
    return "\n".join(lines) + f"\n\n± is one standard error, clustered by prompt. {note}"


def _samples(samples: pd.DataFrame, count: int) -> str:
    each_prompt = samples.drop_duplicates("prompt").head(count)
    lines = ["| prompt | before | after |", "| --- | --- | --- |"]
    for row in each_prompt.to_dict("records"):
        lines.append("| " + " | ".join(_cell(row[k]) for k in ("prompt", "sft", "policy")) + " |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def _figure() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, out: Path, name: str) -> Path:
    for kind in ("png", "pdf"):
        figure.savefig(out / f"{name}.{kind}", dpi=150, bbox_inches="tight")
    _figure().close(figure)
    return out / f"{name}.png"


def _training_curves(path: Path, out: Path) -> Path | None:
    if not path.is_file():
        return None
    table = pd.read_json(path, lines=True)
    panels = [c for c in PANELS if c in table and table[c].notna().any()]
    figure, axes = _figure().subplots(1, len(panels), figsize=(3.1 * len(panels), 2.6), squeeze=False)
    for axis, column in zip(axes[0], panels, strict=True):
        axis.plot(table["step"], table[column], color="#1f5a94", linewidth=1.5)
        axis.set(title=column.replace("_", " "), xlabel="step")
        axis.spines[["top", "right"]].set_visible(False)
    return _save(figure, out, "training")


def _before_and_after(config: RunConfig, report: dict[str, Any], samples: pd.DataFrame, out: Path) -> Path | None:
    shown = [s for s in config.scorers if samples[f"policy_{s}"].nunique() > 2]
    if not shown:
        return None
    figure, axes = _figure().subplots(1, len(shown), figsize=(3.4 * len(shown), 2.6), squeeze=False)
    for axis, scorer in zip(axes[0], shown, strict=True):
        columns = [samples[f"{m}_{scorer}"] for m in ("sft", "policy")]
        bins = pd.concat(columns).quantile([0, 1]).tolist()
        for values, colour, text in zip(columns, ("#9a9a9a", "#1f5a94"), ("before", "after"), strict=True):
            axis.hist(
                values, bins=24, range=tuple(bins), color=colour, alpha=0.65, label=f"{text}, mean {values.mean():.2f}"
            )
        axis.set(title=scorer, xlabel="score of a held-out completion")
        axis.legend(frameon=False, fontsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    return _save(figure, out, "before_and_after")
