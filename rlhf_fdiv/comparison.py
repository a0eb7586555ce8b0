"""Many runs side by side: `results.csv`, a LaTeX table, figures and `comparison.md`, from the runs' folders alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from rlhf_fdiv import divergences
from rlhf_fdiv.config.files import read_yaml
from rlhf_fdiv.errors import UserError, did_you_mean
from rlhf_fdiv.report import markdown_table
from rlhf_fdiv.tracking import write_atomically

_NOT_A_SETTING = ("name", "output_dir", "reuse", "resume", "stages", "report_to")
LEVEL = 0.05


def collect(folders: list[Path]) -> pd.DataFrame:
    """One row a run: `config.…` keys, every figure of its evaluation by a dotted path, and what it took.

    Raises UserError, naming the folder, where a run has no evaluation.
    """
    if missing := [folder for folder in folders if not (folder / "evaluate" / "metrics.json").is_file()]:
        raise UserError(*(f"{folder}: no finished evaluation" for folder in missing))
    return pd.DataFrame([_row(folder) for folder in folders])


def _row(folder: Path) -> dict[str, Any]:
    config = read_yaml(folder / "resolved_config.yaml")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    measured = json.loads((folder / "evaluate" / "metrics.json").read_text(encoding="utf-8"))
    settings = {k: v for k, v in config.items() if k not in _NOT_A_SETTING}
    f = settings["divergence"]
    settings["divergence"] = divergences.label(divergences.get(f))
    policy = config["policy"]
    return {
        "run": str(folder),
        **dict(_flat(settings, "config.")),
        "unit_curvature": bool(f.get("unit_curvature")),
        **dict(_flat(measured)),
        "samples": policy["max_steps"] * policy["num_prompts"] * policy["num_generations"],
        "seconds": sum(manifest["wall_seconds"].values()),
        "git_commit": manifest["git_commit"],
    }


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(inner) if isinstance(inner, list) else inner


def setting_columns(table: pd.DataFrame, keys: list[str]) -> list[str]:
    """The columns of these config keys, the seed apart, in which the runs differ; a mapping has a column for each entry."""
    inside = [c for key in keys for c in table if f"{c}.".startswith(f"config.{key}.") and c != "config.seed"]
    return [c for c in dict.fromkeys(inside) if table[c].astype(str).nunique() > 1]


# -- statistics --------------------------------------------------------------------------------------------------------


class Summary(NamedTuple):
    """Interquartile mean over seeds and its 95 % bootstrap interval, nan below three seeds (arXiv 2108.13264)."""

    iqm: float
    low: float
    high: float
    seeds: int


def summarise(values: np.ndarray[Any, Any]) -> Summary:
    values = values[np.isfinite(values)]
    if len(values) < 3 or np.ptp(values) == 0:
        return Summary(
            float(stats.trim_mean(values, 0.25)) if len(values) else math.nan, math.nan, math.nan, len(values)
        )
    found = stats.bootstrap((values,), _iqm, n_resamples=5000, method="percentile", rng=np.random.default_rng(0))
    low, high = found.confidence_interval
    return Summary(float(_iqm(values)), float(low), float(high), len(values))


def _iqm(values: np.ndarray[Any, Any], axis: int = -1) -> Any:
    return stats.trim_mean(values, 0.25, axis=axis)


class Claim(NamedTuple):
    """One pair that was named before the runs: mean difference over seeds, its interval, p after Holm's correction (nan
    where no number of signs of so few seeds could reject), and the sentence that this supports."""

    first: str
    second: str
    difference: float
    low: float
    high: float
    p: float
    seeds: int
    sentence: str


def compare(table: pd.DataFrame, keys: list[str], key: str, pairs: list[tuple[str, str]], metric: str) -> list[Claim]:
    """Paired sign-flip tests over seeds, the runs of a pair matched in all other `keys`; Holm over the pairs.

    Raises UserError for a value of `key` that no run has, or a metric that none has.
    """
    for column in (metric, *([f"config.{key}"] if pairs else [])):
        if column not in table:
            raise UserError(f"comparison: no run has {column!r}{did_you_mean(column, table)}")
    known = set(table[f"config.{key}"]) if pairs else set[str]()
    if unknown := [value for pair in pairs for value in pair if value not in known]:
        raise UserError(*(f"comparison: no run has {key} = {value!r}{did_you_mean(value, known)}" for value in unknown))
    others = setting_columns(table, [k for k in keys if k != key])
    by_seed = table.assign(rest=table[others].astype(str).agg("|".join, axis=1) if others else "")
    found = []
    for first, second in pairs:
        sides = [
            by_seed[by_seed[f"config.{key}"] == v].set_index(["config.seed", "rest"])[metric] for v in (first, second)
        ]
        differences = (sides[0] - sides[1]).dropna().astype(float).groupby("config.seed").mean().to_numpy()
        found.append((first, second, differences))
    corrected = _holm([_sign_flip(d, len(pairs)) for *_, d in found])
    return [_claim(first, second, d, p, metric) for (first, second, d), p in zip(found, corrected, strict=True)]


def _sign_flip(differences: np.ndarray[Any, Any], pairs: int) -> float:
    """Two-sided p of the mean under all changes of sign, or 100,000 random ones; nan where no such p could reject."""
    if 2.0 ** (1 - len(differences)) > LEVEL / pairs:
        return math.nan
    exact = min(2 ** len(differences), 100_000)
    test = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=exact, rng=np.random.default_rng(0)
    )
    return float(test.pvalue)


def _holm(p_values: list[float]) -> list[float]:
    corrected, largest = [math.nan] * len(p_values), 0.0
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def _claim(first: str, second: str, differences: np.ndarray[Any, Any], p: float, metric: str) -> Claim:
    n, mean = len(differences), float(np.mean(differences)) if len(differences) else math.nan
    half = float(stats.t.ppf(0.975, n - 1) * np.std(differences, ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    figures = f"{mean:+.3g} (95 % interval {mean - half:+.3g} to {mean + half:+.3g}, {n} seeds"
    if math.isnan(p):
        sentence = f"{first} − {second}: {figures}); too few seeds for a test to reject."
    elif p <= LEVEL:
        order = "higher" if mean > 0 else "lower"
        sentence = f"{first} has a {order} {metric} than {second}: {figures}, p = {p:.2g})."
    else:
        sentence = f"No difference shown between {first} and {second}: {figures}, p = {p:.2g})."
    return Claim(first, second, mean, mean - half, mean + half, p, n, sentence)


# -- what is written ---------------------------------------------------------------------------------------------------


def write_comparison(
    out: Path, table: pd.DataFrame, keys: list[str], claims: dict[str, list[Claim]], missing: list[str]
) -> None:
    """`results.csv`, `results.tex`, `frontier.pdf/.png` and `comparison.md` into `out`; `claims` by metric."""
    out.mkdir(parents=True, exist_ok=True)
    part = out / ".results.csv"
    table.to_csv(part, index=False)
    part.replace(out / "results.csv")
    columns = setting_columns(table, keys)
    curvature = " and ".join(("off", "on")[x] for x in sorted(set(table["unit_curvature"])))
    tables = {metric: settings_table(table, columns, metric) for metric in claims}
    latex = (t.to_latex(index=False, escape=True, float_format="%.3g", na_rep="--") for t in tables.values())
    write_atomically(out / "results.tex", "\n".join(f"% {m}\n{t}" for m, t in zip(tables, latex, strict=True)))
    parts = [
        f"# {out.resolve().parent.name}",
        f"{len(table)} runs, {int(table['samples'].sum()):,} samples, {table['seconds'].sum() / 60:.0f} min; commit "
        f"{', '.join(sorted({str(c)[:10] for c in table['git_commit']}))}. Curvature normalisation {curvature}. IQM is the "
        "interquartile mean over seeds, with its 95 % bootstrap interval from three seeds on; pairs, named before the "
        "runs, are tested by changes of sign over seeds, with Holm's correction over the pairs of a figure.",
        *(f"No finished run: {name}." for name in missing),
    ]
    for metric, found in claims.items():
        rows = [list(map(_cell, row)) for row in tables[metric].to_numpy().tolist()]
        sentences = "\n".join(f"- {claim.sentence}" for claim in found)
        parts.append(f"## {metric}\n\n{markdown_table(list(tables[metric]), *rows)}\n\n{sentences}".rstrip())
    if _frontier(table, columns, out):
        parts.append("## Reward against KL(π‖reference)\n\n![frontier](frontier.png)")
    write_atomically(out / "comparison.md", "\n\n".join(parts) + "\n")


def _cell(x: Any) -> str:
    return str(x) if not isinstance(x, float) else "–" if math.isnan(x) else f"{x:.4g}"


def settings_table(table: pd.DataFrame, columns: list[str], metric: str) -> pd.DataFrame:
    """A row for each setting: the metric's IQM and interval, and the means of what stands beside it."""
    beside = [
        c for c in ("policy.kl_reference", "policy.entropy", "policy.distinct_2", "policy.self_bleu") if c in table
    ]
    groups = table.groupby(columns, sort=False, dropna=False) if columns else [((), table)]
    rows = []
    for values, runs in groups:
        found = summarise(runs[metric].to_numpy(float))
        named = {k.removeprefix("config."): v for k, v in zip(columns, values, strict=True)}
        means = {c.removeprefix("policy."): float(runs[c].mean()) for c in beside}
        rows.append({**named, "IQM": found.iqm, "low": found.low, "high": found.high, "seeds": found.seeds, **means})
    return pd.DataFrame(rows)


def _frontier(table: pd.DataFrame, columns: list[str], out: Path) -> bool:
    """Reward of the target against KL to the reference: a line for each f across what else varies, means over seeds."""
    reward = f"policy.{table['config.target.reward'].iloc[0]}" if "config.target.reward" in table else ""
    if reward not in table or "policy.kl_reference" not in table:
        return False
    figure = Figure(figsize=(5, 3.6))
    axis = figure.subplots()
    for label, runs in table.groupby("config.divergence", sort=False):
        points = runs.groupby([c for c in columns if c != "config.divergence"] or "config.divergence", sort=False)
        x, y = (points[c].mean() for c in ("policy.kl_reference", reward))
        errors = [points[c].sem().fillna(0) for c in ("policy.kl_reference", reward)]
        order = np.argsort(x.to_numpy())
        axis.errorbar(x.iloc[order], y.iloc[order], xerr=errors[0].iloc[order], yerr=errors[1].iloc[order],
                      marker="o", markersize=3, linewidth=1, label=label)  # fmt: skip
    axis.set(xlabel="KL(π‖reference), nats", ylabel=reward.removeprefix("policy."))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=7)
    for kind in ("pdf", "png"):
        figure.savefig(out / f"frontier.{kind}", dpi=150, bbox_inches="tight")
    return True
