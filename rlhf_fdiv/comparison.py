"""Many runs side by side: tables from the runs' folders alone, and the statistics that a claim rests on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats

from rlhf_fdiv import divergences, metrics
from rlhf_fdiv.config.files import read_yaml
from rlhf_fdiv.errors import UserError, did_you_mean
from rlhf_fdiv.objectives import OBJECTIVES

_NOT_A_SETTING = ("name", "output_dir", "reuse", "resume", "stages", "report_to", "push_to_hub", "hub_private_repo")
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
    return {
        "run": str(folder),
        **dict(_flat(settings, "config.")),
        "unit_curvature": bool(f.get("unit_curvature")),
        **dict(_flat(measured)),
        "samples": samples_of(config),
        "seconds": sum(manifest["wall_seconds"].values()),
        **{key: manifest[key] for key in ("git_commit", "machine")},
        **dict(_flat(manifest["versions"], "versions.")),
    }


def samples_of(config: dict[str, Any]) -> int:
    """How many completions a run trains on: sampled ones, or both texts of each pair."""
    stage = OBJECTIVES[config["objective"]["name"]].stage
    options = config[stage]
    each = 2 * options["num_pairs"] if stage == "prefer" else options["num_prompts"] * options.get("num_generations", 1)
    return int(options["max_steps"] * each)


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


def settings_of(table: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """For each run what it is called in figures: `divergence`, and in `rest` whatever else varies but the seed."""
    others = [c for c in columns if not c.startswith("config.divergence")]
    words = [
        c.split(".")[-1] + " " + table[c].map(lambda v: f"{v:g}" if isinstance(v, float) else str(v)) for c in others
    ]
    rest = pd.concat(words, axis=1).agg(", ".join, axis=1) if words else ""
    return pd.DataFrame(
        {"run": table["run"], "seed": table["config.seed"], "divergence": table["config.divergence"], "rest": rest}
    )


def training_curves(settings: pd.DataFrame, windows: int = 12) -> pd.DataFrame:
    """A row for each run and window of its steps: the settings and the mean of every figure logged, `step` among them."""
    parts = []
    for row in settings.itertuples(index=False):
        for path in (Path(row.run) / stage / "metrics.jsonl" for stage in ("policy", "prefer", "distil")):
            if path.is_file():
                steps = pd.read_json(path, lines=True)
                window = (steps["step"] - 1) * windows // max(int(steps["step"].max()), 1)
                parts.append(steps.groupby(window).mean(numeric_only=True).assign(**row._asdict()))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def best_of_n_curve(table: pd.DataFrame, reward: str) -> pd.DataFrame:
    """Best of n = 1, 2, 4, … by `reward`, of the reference's held-out samples: KL and the mean of each score, over seeds;
    empty without a `reward`."""
    if not reward:
        return pd.DataFrame()
    rows, k = [], int(table["config.evaluate.num_generations"].iloc[0])
    for run in table.drop_duplicates("config.seed")["run"]:
        samples = pd.read_parquet(Path(run) / "evaluate" / "samples.parquet")
        scores = {
            c.removeprefix("sft_"): torch.tensor(samples[c].to_numpy()).view(-1, k)
            for c in samples
            if c.startswith("sft_")
        }
        for n in (2**i for i in range(k.bit_length())):
            means = {name: float(metrics.best_of_n(scores[reward], x, n).mean()) for name, x in scores.items()}
            rows.append({"n": n, "kl_reference": metrics.best_of_n_kl(n), **means})
    return pd.DataFrame(rows).groupby("n", as_index=False).mean()


def cross_table(table: pd.DataFrame, settings: pd.DataFrame) -> pd.DataFrame:
    """Every trained model under every divergence to its target: mean and standard error over the seeds where it can be
    measured, exact where the language was enumerated."""
    exact = [c for c in table if c.startswith("exact.to_target.")]
    estimated = [c for c in table if c.startswith("divergence_to_target.") and c.endswith(".value")]
    rows = []
    for column in exact or estimated:
        measured = column.removesuffix(".value").split("to_target.", 1)[1]
        for (f, rest), runs in settings.assign(value=table[column].astype(float)).groupby(
            ["divergence", "rest"], sort=False
        ):
            values = runs["value"].dropna()
            error = float(values.sem()) if len(values) > 1 else math.nan
            rows.append({"divergence": f, "rest": rest, "measured": measured, "value": values.mean(), "error": error,
                         "seeds": len(values)})  # fmt: skip
    return pd.DataFrame(rows)


def exact_frontier(table: pd.DataFrame) -> pd.DataFrame:
    """The most reward at each KL, where the runs' language was enumerated; empty elsewhere."""
    found = [json.loads(value) for value in table.get("exact.frontier", pd.Series(dtype=str)).dropna().unique()]
    return pd.DataFrame(found[0] if len(found) == 1 else [])


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
    by_seed = table.copy().assign(rest=table[others].astype(str).agg("|".join, axis=1) if others else "")
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
    interval = f"95 % interval {mean - half:+.3g} to {mean + half:+.3g}, " if n > 1 else ""
    figures = f"{mean:+.3g} ({interval}{n} {'seed' if n == 1 else 'seeds'}"
    if math.isnan(p):
        sentence = f"{first} − {second}: {figures}); too few seeds for a test to reject."
    elif p <= LEVEL:
        order = "higher" if mean > 0 else "lower"
        sentence = f"{first} has a {order} {metric} than {second}: {figures}, p = {p:.2g})."
    else:
        sentence = f"No difference shown between {first} and {second}: {figures}, p = {p:.2g})."
    return Claim(first, second, mean, mean - half, mean + half, p, n, sentence)
