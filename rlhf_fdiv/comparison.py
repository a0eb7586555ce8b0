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
from rlhf_fdiv.tracking import touches

_NOT_A_SETTING = ("name", "output_dir", "reuse", "resume", "stages", "report_to", "push_to_hub", "hub_private_repo")
SETTING = ["divergence", "rest"]
LEVEL = 0.05


def measured(folder: Path) -> dict[str, Any]:
    """Every figure of a run's evaluation, by a dotted path. Raises UserError where it has none."""
    path = folder / "evaluate" / "metrics.json"
    if not path.is_file():
        raise UserError(f"{folder}: no finished evaluation")
    return dict(_flat(json.loads(path.read_text(encoding="utf-8"))))


def read_run(folder: Path) -> dict[str, Any]:
    """A run as a row: `config.…` keys, what was `measured`, and what it took."""
    config = read_yaml(folder / "resolved_config.yaml")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    f = config["divergence"]
    settings = {k: v for k, v in config.items() if k not in _NOT_A_SETTING}
    return {
        "run": str(folder),
        **dict(_flat(settings | {"divergence": divergences.label(divergences.get(f))}, "config.")),
        "unit_curvature": bool(f.get("unit_curvature")),
        **measured(folder),
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
    inside = [c for key in keys for c in table if touches(c, [f"config.{key}"]) and c != "config.seed"]
    return [c for c in dict.fromkeys(inside) if table[c].astype(str).nunique() > 1]


def with_settings(table: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """The runs with what they are called in figures: `divergence`, and in `rest` what else of `keys` varies but the seed."""
    others = [c for c in setting_columns(table, keys) if not c.startswith("config.divergence")]
    names = [c.rpartition(".")[2] for c in others]

    def words(values: Any) -> str:
        pairs = zip(names, values, strict=True)
        given = ((name, x) for name, x in pairs if pd.notna(x))  # a field that only other choices have
        return ", ".join(f"{name} {x:g}" if isinstance(x, float) else f"{name} {x}" for name, x in given)

    named = table[["config.divergence", "config.seed"]].set_axis(["divergence", "seed"], axis=1)
    return pd.concat([table, named.assign(rest=[words(values) for values in table[others].to_numpy(object)])], axis=1)


def training_curves(table: pd.DataFrame, windows: int = 12) -> pd.DataFrame:
    """A row for each run and window of its steps: the setting and the mean of every figure logged, `step` among them."""
    parts = []
    for row in table[["run", "seed", "divergence", "rest"]].to_dict("records"):
        for path in (Path(row["run"]) / stage / "metrics.jsonl" for stage in ("policy", "prefer", "distil")):
            if path.is_file():
                steps = pd.read_json(path, lines=True)
                window = (steps["step"] - 1) * windows // max(int(steps["step"].max()), 1)
                parts.append(steps.groupby(window).mean(numeric_only=True).assign(**row))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def best_of_n_curve(table: pd.DataFrame, reward: str) -> pd.DataFrame:
    """Best of n = 1, 2, 4, … by `reward`, of the reference's held-out samples: KL and the mean of each score, over seeds."""
    rows = []
    for run, k in table.drop_duplicates("config.seed")[["run", "config.evaluate.num_generations"]].to_numpy():
        samples = pd.read_parquet(Path(run) / "evaluate" / "samples.parquet").filter(regex="^sft_")
        scores = {c.removeprefix("sft_"): torch.tensor(samples[c].to_numpy()).view(-1, k) for c in samples}
        for n in (2**i for i in range(k.bit_length())):
            means = {name: float(metrics.best_of_n(scores[reward], x, n).mean()) for name, x in scores.items()}
            rows.append({"n": n, "kl_reference": metrics.best_of_n_kl(n), **means})
    return pd.DataFrame(rows).groupby("n", as_index=False).mean()


def cross_table(table: pd.DataFrame) -> pd.DataFrame:
    """Every trained model under every divergence to its target: mean and standard error over the seeds where it can be
    measured, exact where the language was enumerated."""
    exact = [c for c in table if c.startswith("exact.to_target.")]
    columns = exact or [c for c in table if c.startswith("divergence_to_target.") and c.endswith(".value")]
    long = table[SETTING].join(table[columns].astype(float)).melt(SETTING, var_name="measured")
    long["measured"] = long["measured"].str.removesuffix(".value").str.partition("to_target.")[2]
    grouped = long.groupby([*SETTING, "measured"], sort=False)["value"]
    return grouped.agg(value="mean", error="sem", seeds="count").reset_index().dropna(subset="value")


def exact_frontier(table: pd.DataFrame) -> pd.DataFrame:
    """The most reward at each KL, where the runs' language was enumerated; empty elsewhere."""
    texts = table.get("exact.frontier", pd.Series(dtype=str)).dropna().unique()
    found = [pd.DataFrame(json.loads(text)) for text in texts]  # of one reward, but for the rounding of β · (r/β)
    same = all(x.shape == found[0].shape and np.allclose(x, found[0], rtol=1e-4, atol=1e-6) for x in found)
    return found[0] if found and same else pd.DataFrame()


# -- statistics --------------------------------------------------------------------------------------------------------


class Summary(NamedTuple):
    """Interquartile mean over seeds and its 95 % bootstrap interval, nan below three seeds (arXiv 2108.13264)."""

    iqm: float
    low: float
    high: float
    seeds: int


def summarise(values: np.ndarray[Any, Any]) -> Summary:
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return Summary(math.nan, math.nan, math.nan, 0)
    iqm, low, high = float(_iqm(values)), math.nan, math.nan
    if len(values) >= 3 and np.ptp(values) > 0:
        found = stats.bootstrap((values,), _iqm, n_resamples=5000, method="percentile", rng=np.random.default_rng(0))
        low, high = map(float, found.confidence_interval)
    return Summary(iqm, low, high, len(values))


def summaries(table: pd.DataFrame, columns: list[str], metric: str) -> pd.DataFrame:
    """The summary of a metric for each combination of the columns' values, beside these."""
    groups = table.groupby(columns, sort=False, dropna=False)[metric]
    return pd.DataFrame(
        {**dict(zip(columns, values, strict=True)), **summarise(runs.to_numpy(float))._asdict()}
        for values, runs in groups
    )


def _iqm(values: np.ndarray[Any, Any], axis: int = -1) -> Any:
    return stats.trim_mean(values, 0.25, axis=axis)


class Claim(NamedTuple):
    """One pair that was named before the runs: mean difference over seeds, its interval, p after Holm's correction (nan
    where no number of signs of so few seeds could reject), and the sentence that this supports."""

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
    column = f"config.{key}"
    if unknown := [c for c in (metric, column) if c not in table]:
        raise UserError(*(f"comparison: no run has {c!r}{did_you_mean(c, table)}" for c in unknown))
    known = set(table[column])
    if unknown := [value for pair in pairs for value in pair if value not in known]:
        raise UserError(*(f"comparison: no run has {key} = {value!r}{did_you_mean(value, known)}" for value in unknown))
    others = [c for c in setting_columns(table, keys) if c != column]
    index = [table["config.seed"], *(table[c].astype(str) for c in others)]
    sides = table[metric].astype(float).groupby([*index, table[column]]).mean().unstack()
    by_seed = [(sides[a] - sides[b]).dropna().groupby("config.seed").mean().to_numpy() for a, b in pairs]
    corrected = _holm([_sign_flip(differences, len(pairs)) for differences in by_seed])
    return [_claim(*pair, d, p, metric) for pair, d, p in zip(pairs, by_seed, corrected, strict=True)]


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
    """A test that was not made still counts among the tests."""
    p = pd.Series(p_values, dtype=float).sort_values()
    corrected = (p * np.arange(len(p), 0, -1)).clip(upper=1).cummax()
    return list(corrected.sort_index())


def _claim(first: str, second: str, differences: np.ndarray[Any, Any], p: float, metric: str) -> Claim:
    n, mean = len(differences), float(np.mean(differences)) if len(differences) else math.nan
    half = float(stats.t.ppf(0.975, n - 1) * stats.sem(differences)) if n > 1 else math.nan
    interval = f"95 % interval {mean - half:+.3g} to {mean + half:+.3g}, " if n > 1 else ""
    figures = f"{mean:+.3g} ({interval}{n} {'seed' if n == 1 else 'seeds'}"
    if math.isnan(p):
        sentence = f"{first} − {second}: {figures}); too few seeds for a test to reject."
    elif p <= LEVEL:
        order = "higher" if mean > 0 else "lower"
        sentence = f"{first} has a {order} {metric} than {second}: {figures}, p = {p:.2g})."
    else:
        sentence = f"No difference shown between {first} and {second}: {figures}, p = {p:.2g})."
    return Claim(mean, mean - half, mean + half, p, n, sentence)
