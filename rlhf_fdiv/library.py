"""`align`: a model, data, reward functions and an f from Python, through the very stages that `rlhf-fdiv run` takes.

What was given in memory goes into the run's folder first, named by a hash of its contents, and stands in the config by path:
a second call with the same is the same run, and one with anything else is told so, as on the command line.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import operator
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pandas as pd
import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_fdiv import divergences
from rlhf_fdiv.assets import build_once
from rlhf_fdiv.config import RunConfig, parse
from rlhf_fdiv.config.files import merge
from rlhf_fdiv.errors import UserError, did_you_mean
from rlhf_fdiv.models import load_tokenizer, merged
from rlhf_fdiv.rewards import RESERVED
from rlhf_fdiv.stages.common import execute
from rlhf_fdiv.tracking import RunFolder
from rlhf_fdiv.weights import from_safetensors

Keep = list[tuple[Path, Callable[[Path], Any]]]  # folders of the run, and what saves into them


class _Given(SimpleNamespace):
    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{name} was given to align() from Python, and no other process knows it")


given = _Given()  # the reward functions that no dotted path leads to: lambdas, methods, those of a notebook


@dataclass(frozen=True)
class Aligned:
    """A finished run. Model (adapters merged) and tokenizer are loaded from its folder `path` when asked for."""

    path: Path
    config: RunConfig

    @functools.cached_property
    def model(self) -> Any:
        return from_safetensors(AutoModelForCausalLM, str(self._stage / "model"), dtype="auto")

    @functools.cached_property
    def processing_class(self) -> Any:
        return load_tokenizer(str(self._stage / "model"))

    @property
    def metrics(self) -> pd.DataFrame:
        """The figures of metrics.jsonl, a row for each step."""
        return pd.read_json(self._stage / "metrics.jsonl", lines=True)

    @property
    def _stage(self) -> Path:
        return self.path / self.config.objective.stage


def align(
    model: str | dict[str, Any] | PreTrainedModel,
    reward_funcs: Any,
    train_dataset: str | datasets.Dataset,
    divergence: Any = "reverse_kl",
    *,
    beta: float | None = None,
    output_dir: str | Path = "runs/align",
    processing_class: Any = None,
    peft_config: dict[str, Any] | None = None,
    reward_weights: list[float] | None = None,
    eval_dataset: str | datasets.Dataset | None = None,
    **config: Any,
) -> Aligned:
    """Trains `model` on the prompts of `train_dataset` and, with an `eval_dataset`, measures it before and after.

    `model` is a folder, a hub name, a config's `model` section or a model in memory, which stays as it is; `reward_funcs`
    one or a list of functions with TRL's signature, names of reward models, or scorers as a config has them; `divergence` a
    name, a mapping or an f; `peft_config` the keys of `model.lora`; `output_dir` the run's folder. `config` takes any other
    keys of a config file: `policy={"max_steps": 20}`, `objective="regularise"`. Raises UserError as the command line does.
    """
    folder, keep = Path(output_dir).parent / str(config.get("name", Path(output_dir).name)), Keep()
    scorers = _scorers(reward_funcs, reward_weights, {*config.get("scorers", {})})
    raw: dict[str, Any] = {
        "name": folder.name,
        "output_dir": str(folder.parent),
        "model": _model(model, processing_class, folder, keep),
        "data": {"prompts_train": _prompts(train_dataset, "train_dataset", folder, keep)},
        "scorers": scorers,
        "target": {"name": "tilted", "reward": next(iter(scorers))},
        "policy": {"logged_scorers": list(scorers)[1:]},
        "divergence": divergence,
        "stages": ["policy"],
    }
    if isinstance(divergence, divergences.Divergence):
        values = {key: getattr(divergence, key) for key in divergences.parameters(divergence)}
        raw["divergence"] = {"name": divergence.name, **values}
    if eval_dataset is not None:
        raw["data"]["prompts_eval"] = _prompts(eval_dataset, "eval_dataset", folder, keep)
        raw["stages"].append("evaluate")
    options = {"model": {"lora": peft_config}} if peft_config else {}
    raw = functools.reduce(merge, (raw, options, config, {} if beta is None else {"target": {"beta": beta}}), {})
    checked = parse(raw)
    if checked.resume is None:
        RunFolder(checked).require_same_config()
    for path, save in keep:
        build_once(path, save)
    return Aligned(execute(checked, checked.stages).path, checked)


def _model(model: Any, tokenizer: Any, folder: Path, keep: Keep) -> Any:
    """The config's `model`."""
    if isinstance(model, str) and tokenizer is not None:
        model = from_safetensors(AutoModelForCausalLM, model, dtype="auto")
    if not isinstance(model, torch.nn.Module):
        return model
    lm: Any = merged(model)
    tokenizer = tokenizer or load_tokenizer(lm.config.name_or_path)
    words = (sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map, tokenizer.chat_template)
    digest = hashlib.sha256(repr((lm.config.to_json_string(), words)).encode())
    for name, weight in lm.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    path = folder / "given" / f"model-{digest.hexdigest()[:16]}"
    keep.append((path, lambda new: (lm.save_pretrained(new), tokenizer.save_pretrained(new))))
    return {"name_or_path": str(path), "dtype": str(lm.dtype).removeprefix("torch.")}


def _prompts(rows: Any, argument: str, folder: Path, keep: Keep) -> str:
    """The config's `data.prompts_…`."""
    if isinstance(rows, str):
        return rows
    if not isinstance(rows, datasets.Dataset):
        raise UserError(f"{argument}: must be a datasets.Dataset or the name of one, not {type(rows).__name__}")
    if "prompt" not in rows.column_names:
        raise UserError(f"{argument}: no column 'prompt'{did_you_mean('prompt', rows.column_names)}")
    content = io.BytesIO()
    pq.write_table(rows.with_format("arrow")[:].replace_schema_metadata(None), content)
    path = folder / "given" / f"{argument}-{hashlib.sha256(content.getvalue()).hexdigest()[:16]}"
    keep.append((path, lambda new: (new / "prompts.parquet").write_bytes(content.getvalue())))
    return str(path / "prompts.parquet")


def _scorers(functions: Any, weights: list[float] | None, taken: set[str]) -> dict[str, Any]:
    """The config's `scorers`; what is to be maximised comes first, the sum of all where there are several or weights."""
    functions = functions if isinstance(functions, list) else [functions]
    if not functions:
        raise UserError("reward_funcs: is empty; give a function with TRL's signature")
    if weights is not None and len(weights) != len(functions):
        raise UserError(f"reward_weights: {len(weights)} for {len(functions)} reward_funcs; give one for each")
    summed = len(functions) > 1 or weights is not None
    taken, named = taken | RESERVED | ({"reward"} if summed else set()), dict[str, Any]()
    for function in functions:
        if not isinstance(function, str | dict) and (isinstance(function, torch.nn.Module) or not callable(function)):
            raise UserError(
                f"reward_funcs: {type(function).__name__} is not a function; a reward model is given by its folder or name"
            )
        base = re.sub(r"\W+", "_", _name(function)).strip("_") or "reward_func"
        names = (f"{base}{end}" for end in itertools.chain([""], (f"_{i}" for i in itertools.count(2))))
        name = next(n for n in names if n not in taken | named.keys())
        if isinstance(function, dict):
            named[name] = function
        elif isinstance(function, str):
            named[name] = {"name": "reward_model", "path": function}
        else:
            setattr(given, name, function)
            named[name] = {"name": "function", "path": _dotted_path(function) or f"{__name__}:given.{name}"}
    if not summed:
        return named
    return {"reward": {"name": "sum", "of": dict(zip(named, weights or [1.0] * len(named), strict=True))}, **named}


def _name(function: Any) -> str:
    if isinstance(function, str):
        return Path(function).name
    if isinstance(function, dict):
        return str(function.get("name"))
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def _dotted_path(function: Any) -> str | None:
    """Where any process can import the function from; None for one that only this process has."""
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
    try:
        found = operator.attrgetter(name)(sys.modules[module])
    except (AttributeError, KeyError):
        return None
    return f"{module}:{name}" if found is function and module != "__main__" else None
