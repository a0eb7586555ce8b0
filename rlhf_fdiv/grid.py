"""A grid of runs: every combination of config values is a cell, an ordinary run folder; SFT and reward run once for all.

Where the grid asks for it, learning rates are searched first: under one budget of samples for each, by runs of their own.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import MinLen
from pydantic import ConfigDict

from rlhf_fdiv import config as configs
from rlhf_fdiv.comparison import samples_of
from rlhf_fdiv.config import RunConfig
from rlhf_fdiv.config.checks import STRICT, validate
from rlhf_fdiv.config.files import find_config, read_yaml
from rlhf_fdiv.divergences import label
from rlhf_fdiv.errors import UserError, did_you_mean
from rlhf_fdiv.tracking import MADE_FROM, RunFolder, is_finished, touches, write_atomically

Grid = dict[str, Annotated[list[Any], MinLen(1)]]
SHARED = ("sft", "reward")


@dataclass(frozen=True)
class Search:
    """For each combination of the grid's keys in `by`, the combination of `values` whose run does best on `metric`.

    `metric` is a path in `evaluate/metrics.json`, in which `{divergence}` stands for the run's own f. `overrides` make the
    search's runs differ from the cells: validation prompts, another seed. Every combination has the same budget of samples,
    since each runs as many steps.
    """

    values: Grid
    by: list[str] = field(default_factory=lambda: ["divergence"])
    metric: str = "policy.objective"
    best: Literal["max", "min"] = "max"
    overrides: dict[str, Any] = field(default_factory=dict)
    __pydantic_config__: ClassVar[ConfigDict] = STRICT


@dataclass(frozen=True)
class Ablation:
    """What an ablation file holds: `config` is the run that every cell builds on, `grid` maps config keys to values.

    `compare` names, before the runs, the pairs of values of `compare_by` that will be tested against each other, on each
    figure of `report` (paths in `evaluate/metrics.json`).
    """

    name: str
    config: str
    grid: Grid
    search: Search | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    report: list[str] = field(default_factory=lambda: ["policy.objective"])
    compare: list[tuple[str, str]] = field(default_factory=list)
    compare_by: str = "divergence"
    output_dir: str = "runs"
    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    @property
    def folder(self) -> Path:
        return Path(self.output_dir) / self.name


@dataclass(frozen=True)
class Cell:
    """One run of the grid and the values that make it this one."""

    values: dict[str, Any]
    config: RunConfig

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def state(self) -> str:
        """finished, failed or open. Raises UserError where the folder holds a finished run of another config."""
        own = [stage for stage in self.config.stages if not (self.config.reuse and stage in SHARED)]
        if all(is_finished(self.config.folder / stage) for stage in own):
            RunFolder(self.config).require_same_config()
            return "finished"
        return "failed" if self.failure.is_file() else "open"

    @property
    def failure(self) -> Path:
        return self.config.folder / "failed.txt"

    def own(self, path: str) -> str:
        """A metric's dotted path with its own f for `{divergence}`."""
        return path.replace("{divergence}", label(self.config.f))

    def metric(self, path: str) -> float:
        """A figure of its evaluation by its `own` path, nan where not measurable. Raises UserError for a wrong path."""
        path = self.own(path)
        value: Any = json.loads((self.config.folder / "evaluate" / "metrics.json").read_text(encoding="utf-8"))
        rest = path
        while rest:
            known = value if isinstance(value, dict) else {}
            found = [key for key in known if f"{rest}.".startswith(f"{key}.")]  # a key may have dots itself
            if not found:
                raise UserError(
                    f"{self.name}: metrics.json has no {path!r}: {rest!r} is unknown{did_you_mean(rest, known)}"
                )
            key = max(found, key=len)
            value, rest = value[key], rest[len(key) + 1 :]
        if isinstance(value, dict):
            raise UserError(f"{self.name}: {path!r} is not one figure but {', '.join(value)}")
        return math.nan if value is None else float(value)


def load(path: Path, overrides: list[str] | None = None) -> Ablation:
    """Reads an ablation file; overrides `a.b=value` are for every cell. Raises UserError with every problem."""
    path = find_config(path)
    raw, problems = {"name": path.stem, **read_yaml(path)}, list[str]()
    ablation: Ablation | None = validate(Ablation, raw, "", problems)
    if ablation is None:
        raise UserError(*(f"{path}: {problem.removeprefix('.')}" for problem in problems))
    if ablation.search and (unknown := [key for key in ablation.search.by if key not in ablation.grid]):
        raise UserError(
            *(f"{path}: search.by: {k!r} is not a key of the grid{did_you_mean(k, ablation.grid)}" for k in unknown)
        )
    if (ablation.folder / "resolved_config.yaml").is_file():
        raise UserError(f"{path}: name: {ablation.folder} holds a run of its own; give the ablation another name")
    configs.files.with_overrides({}, overrides or [])  # where one is none, this says so
    pairs = (word.split("=", 1) for word in overrides or [])
    more = {key: configs.files.with_overrides({}, [f"value={value}"])["value"] for key, value in pairs}
    return replace(ablation, config=str(path.parent / ablation.config), overrides=ablation.overrides | more)


def shared_keys(ablation: Ablation) -> list[str] | None:
    """The grid's keys, but for the seed, that SFT or reward model are made from; None where there is nothing to share."""
    config = _cell(ablation, {}, ablation.folder, {}).config
    stages = [stage for stage in config.stages if stage in SHARED]
    if config.reuse or not stages:
        return None
    made_from = {key for stage in stages for key in MADE_FROM[stage]} - {"seed"}
    keys = [key for key in ablation.grid if touches(key, made_from)]
    if ablation.search and (left_out := [key for key in keys if key not in ablation.search.by]):
        raise UserError(
            f"{ablation.name}: search.by: must hold {', '.join(left_out)}, on which SFT or reward model depend"
        )
    return keys


def shared_cells(ablation: Ablation) -> list[Cell]:
    """One run of SFT and reward model for each combination of the grid's values that they are made from."""
    keys = shared_keys(ablation)
    return [] if keys is None else _cells(ablation, keys, "shared", {"stages": list(SHARED)})


def search_cells(ablation: Ablation) -> list[Cell]:
    """The runs of the search: each `by` combination with each combination of `values`."""
    search = ablation.search
    if search is None:
        return []
    wider = replace(ablation, grid=ablation.grid | search.values)
    return _cells(wider, [*search.by, *search.values], "search", search.overrides)


def grid_cells(ablation: Ablation, chosen: dict[str, dict[str, Any]] | None = None) -> list[Cell]:
    """The cells themselves, with what the search chose for them."""
    return _cells(ablation, list(ablation.grid), "", {}, chosen)


def choose(ablation: Ablation, cells: list[Cell]) -> dict[str, dict[str, Any]]:
    """What the search found, by the label of the `by` values; kept with every figure in `search.json`, and with the groups
    whose best value is the least or the largest of those tried, so that a better one may lie beyond."""
    search = ablation.search
    assert search is not None
    sign, samples = (1 if search.best == "max" else -1), 0
    tried: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        figure = cell.metric(search.metric) if cell.state == "finished" else math.nan
        row = {key: cell.values[key] for key in search.values} | {search.metric: None if math.isnan(figure) else figure}
        tried.setdefault(_label({key: cell.values[key] for key in search.by}), []).append(row)
        samples += samples_of(configs.to_dict(cell.config))
    chosen, at_edge = {}, []
    for group, rows in tried.items():
        measured = [row for row in rows if row[search.metric] is not None]
        if not measured:
            raise UserError(f"{ablation.folder}/search: no run for {group} has a {search.metric}")
        best = max(measured, key=lambda row: sign * row[search.metric])
        chosen[group] = {key: best[key] for key in search.values}
        ordered = {k: sorted(v) for k, v in search.values.items() if all(isinstance(x, int | float) for x in v)}
        if any(best[k] in (values[0], values[-1]) for k, values in ordered.items()):
            at_edge.append(group)
    text = json.dumps({"samples": samples, "chosen": chosen, "at_edge": at_edge, "tried": tried}, indent=2)
    write_atomically(ablation.folder / "search.json", text)
    return chosen


def _cells(
    ablation: Ablation,
    keys: list[str],
    part: str,
    fixed: dict[str, Any],
    chosen: dict[str, dict[str, Any]] | None = None,
) -> list[Cell]:
    """Every combination of the grid's values of these keys. Raises UserError with what is wrong in any of them."""
    cells, problems = list[Cell](), list[str]()
    shared = None if part == "shared" else shared_keys(ablation)
    for combination in itertools.product(*(ablation.grid[key] for key in keys)):
        values = dict(zip(keys, combination, strict=True))
        more = dict(fixed)
        if shared is not None:
            more["reuse"] = str(ablation.folder / "shared" / _label({key: values[key] for key in shared}))
        if chosen and ablation.search:
            more |= chosen[_label({key: values[key] for key in ablation.search.by})]
        try:
            cells.append(_cell(ablation, values, ablation.folder / part, more))
        except UserError as error:
            problems += [f"{_label(values)}: {problem}" for problem in error.problems]
    names = [cell.name for cell in cells]
    problems += [
        f"{name}: two cells of the grid have this name" for name in dict.fromkeys(names) if names.count(name) > 1
    ]
    if problems:
        raise UserError(*problems)
    return cells


def _cell(ablation: Ablation, values: dict[str, Any], folder: Path, more: dict[str, Any]) -> Cell:
    settings = {**ablation.overrides, **values, **more, "output_dir": str(folder), "name": _label(values)}
    config = configs.load(ablation.config, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    if config.push_to_hub:
        raise UserError(
            "push_to_hub: every cell of a grid would go into this one repository; push the best by its own run"
        )
    return Cell(values, config)


def _label(values: dict[str, Any]) -> str:
    """`js-beta=0.1-seed=3`: names alone, numbers with the last part of their key."""

    def word(key: str, value: Any) -> str:
        if isinstance(value, dict):
            return "-".join(str(v) if k == "name" else f"{k}={v}" for k, v in value.items())
        return str(value) if isinstance(value, str) else f"{key.rpartition('.')[2]}={value}"

    return "-".join(re.sub(r"[^\w.+=-]+", "_", word(key, value)) for key, value in values.items()) or "all"
