"""A grid of runs: every combination of config values is a cell, an ordinary run folder; SFT and reward run once for all.

Where the grid asks for it, learning rates are searched first: under one budget of samples for each, by runs of their own.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from annotated_types import MinLen
from pydantic import ConfigDict

from rlhf_fdiv import config as configs
from rlhf_fdiv.comparison import measured, samples_of
from rlhf_fdiv.config import RunConfig
from rlhf_fdiv.config.checks import STRICT, validate
from rlhf_fdiv.config.files import Dumper, find_config, read_yaml
from rlhf_fdiv.divergences import label
from rlhf_fdiv.errors import UserError, did_you_mean
from rlhf_fdiv.tracking import MADE_FROM, RunFolder, is_finished, touches, write_atomically

Grid = dict[str, Annotated[list[Any], MinLen(1)]]
Chosen = dict[str, dict[str, Any]]  # by the label of a group: config keys and the values that did best
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
    report: Annotated[list[str], MinLen(1)] = field(default_factory=lambda: ["policy.objective"])
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

    def metric(self, path: str) -> float:
        """A figure of its evaluation, its own f for `{divergence}`; nan where not measurable. UserError for a wrong path."""
        path, figures = path.replace("{divergence}", label(self.config.f)), measured(self.config.folder)
        if isinstance(figure := figures.get(path, ""), str):  # or a list of several
            raise UserError(f"{self.name}: metrics.json has no figure {path!r}{did_you_mean(path, figures)}")
        return math.nan if figure is None else float(figure)


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
    searched = ablation.search.values if ablation.search else {}
    if twice := [key for key in ablation.grid if key in more or key in searched]:
        raise UserError(*(f"{path}: grid.{key}: is also an override or searched; keep one" for key in twice))
    return replace(ablation, config=str(path.parent / ablation.config), overrides=ablation.overrides | more)


def phases(ablation: Ablation) -> Iterator[tuple[str, list[Cell]]]:
    """The runs in their order: what is `shared`, the `search` and, once that has run, the `cells` with what it chose."""
    yield "shared", shared_cells(ablation)
    yield "search", search_cells(ablation)
    yield "cells", grid_cells(ablation, choose(ablation))


def shared_part(ablation: Ablation) -> tuple[list[str], list[str]]:
    """The stages that need not run in every cell, and the grid's keys, but for the seed, that these are made from."""
    config = _cell(ablation, {}, ablation.folder, {}).config
    stages = [stage for stage in config.stages if stage in SHARED and not config.reuse]
    made_from = {key for stage in stages for key in MADE_FROM[stage]} - {"seed"}
    keys = [key for key in ablation.grid if touches(key, made_from)]
    if ablation.search and (left_out := [key for key in keys if key not in ablation.search.by]):
        raise UserError(
            f"{ablation.name}: search.by: must hold {', '.join(left_out)}, on which SFT or reward model depend"
        )
    return stages, keys


def shared_cells(ablation: Ablation) -> list[Cell]:
    """One run of SFT and reward model for each combination of the grid's values that they are made from."""
    stages, keys = shared_part(ablation)
    return _cells(ablation, keys, "shared", {"stages": stages}) if stages else []


def search_cells(ablation: Ablation) -> list[Cell]:
    """The runs of the search: each `by` combination with each combination of `values`."""
    if (search := ablation.search) is None:
        return []
    wider = replace(ablation, grid=ablation.grid | search.values)
    return _cells(wider, [*search.by, *search.values], "search", search.overrides)


def grid_cells(ablation: Ablation, chosen: Chosen | None = None) -> list[Cell]:
    """The cells themselves, with what the search chose for them."""
    return _cells(ablation, list(ablation.grid), "", {}, chosen)


def choose(ablation: Ablation) -> Chosen:
    """What the search found, by the label of the `by` values; kept with every figure in `search.json`, and with the groups
    whose best value is the least or the largest of those tried, so that a better one may lie beyond."""
    if (search := ablation.search) is None:
        return {}
    cells, tried = search_cells(ablation), dict[str, list[dict[str, Any]]]()
    for cell in cells:
        figure = cell.metric(search.metric) if cell.state == "finished" else math.nan
        row = {key: cell.values[key] for key in search.values} | {search.metric: None if math.isnan(figure) else figure}
        tried.setdefault(_label(cell.values, search.by), []).append(row)
    chosen, at_edge = {}, []
    for group, rows in tried.items():
        measurable = [row for row in rows if row[search.metric] is not None]
        if not measurable:
            raise UserError(f"{ablation.folder}/search: no run for {group} has a {search.metric}")
        best = (max if search.best == "max" else min)(measurable, key=lambda row: row[search.metric])
        chosen[group] = {key: best[key] for key in search.values}
        numbers = {key: v for key, v in search.values.items() if all(isinstance(x, int | float) for x in v)}
        if any(best[key] in (min(values), max(values)) for key, values in numbers.items()):
            at_edge.append(group)
    samples = sum(samples_of(configs.to_dict(cell.config)) for cell in cells)
    text = json.dumps({"samples": samples, "chosen": chosen, "at_edge": at_edge, "tried": tried}, indent=2)
    write_atomically(ablation.folder / "search.json", text)
    return chosen


def _cells(
    ablation: Ablation, keys: list[str], part: str, fixed: dict[str, Any], chosen: Chosen | None = None
) -> list[Cell]:
    """Every combination of the grid's values of these keys. Raises UserError with what is wrong in any of them."""
    cells, problems = list[Cell](), list[str]()
    stages, shared = shared_part(ablation)
    for combination in itertools.product(*(ablation.grid[key] for key in keys)):
        values, more = dict(zip(keys, combination, strict=True)), dict(fixed)
        if stages and part != "shared":
            more["reuse"] = str(ablation.folder / "shared" / _label(values, shared))
        if chosen and ablation.search:
            more |= chosen[_label(values, ablation.search.by)]
        try:
            cells.append(_cell(ablation, values, ablation.folder / part, more))
        except UserError as error:
            problems += [f"{_label(values, keys)}: {problem}" for problem in error.problems]
    names = Counter(cell.name for cell in cells)
    problems += [f"{name}: two cells of the grid have this name" for name, count in names.items() if count > 1]
    if problems:
        raise UserError(*problems)
    return cells


def _cell(ablation: Ablation, values: dict[str, Any], folder: Path, more: dict[str, Any]) -> Cell:
    settings = {**ablation.overrides, **values, **more, "output_dir": str(folder), "name": _label(values, values)}
    texts = {
        key: yaml.dump(value, Dumper=Dumper, default_flow_style=True, width=math.inf) for key, value in settings.items()
    }
    config = configs.load(ablation.config, [f"{key}={text}" for key, text in texts.items()])
    if config.push_to_hub:
        raise UserError(
            "push_to_hub: every cell of a grid would go into this one repository; push the best by its own run"
        )
    return Cell(values, config)


def _label(values: dict[str, Any], keys: Iterable[str]) -> str:
    """`js-beta=0.1-seed=3`: names alone, numbers with the last part of their key."""

    def word(key: str, value: Any) -> str:
        if isinstance(value, dict):
            return "-".join(str(v) if k == "name" else f"{k}={v}" for k, v in value.items())
        return str(value) if isinstance(value, str) else f"{key.rpartition('.')[2]}={value}"

    return "-".join(re.sub(r"[^\w.+=-]+", "_", word(key, values[key])) for key in keys) or "all"
