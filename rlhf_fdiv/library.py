"""`align`: a model, data, reward functions and an f from Python, through the very stages that `rlhf-fdiv run` takes.

What was given in memory goes into the run's folder first, named by a hash of its contents, and stands in the config by path:
a second call with the same is the same run, and one with anything else is told so, as on the command line.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import operator
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pandas as pd
import pyarrow.parquet as pq
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl.trainer.utils import get_callable_name

from rlhf_fdiv import divergences
from rlhf_fdiv.assets import build_once
from rlhf_fdiv.config import RunConfig, parse
from rlhf_fdiv.config.files import merge
from rlhf_fdiv.errors import UserError, told_as
from rlhf_fdiv.model_options import LoraOptions
from rlhf_fdiv.models import load_tokenizer, merged, under_adapter
from rlhf_fdiv.rewards import RESERVED
from rlhf_fdiv.stages.common import execute, prepare_process
from rlhf_fdiv.tracking import RunFolder
from rlhf_fdiv.weights import from_safetensors

Keep = dict[Path, Callable[[Path], Any]]  # a folder of the run and what saves into it


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
    peft_config: dict[str, Any] | LoraConfig | None = None,
    reward_weights: list[float] | None = None,
    reward_processing_classes: Any = None,
    eval_dataset: str | datasets.Dataset | None = None,
    **config: Any,
) -> Aligned:
    """Trains `model` on the prompts of `train_dataset` and, with an `eval_dataset`, measures it before and after.

    `model` is a folder, a hub name, a config's `model` section or a model in memory, which stays as it is; `reward_funcs`
    one or a list of functions with TRL's signature, reward models by name or in memory (with a tokenizer or None for each
    in `reward_processing_classes`), or scorers as a config has them; `divergence` a name, a mapping or an f; `peft_config`
    peft's or the keys of `model.lora`; `output_dir` the run's folder. `config` takes any other keys of a config file:
    `policy={"max_steps": 20}`, `objective="regularise"`. Raises UserError as the command line does.
    """
    prepare_process()
    folder, keep = Path(output_dir).parent / str(config.get("name", Path(output_dir).name)), Keep()
    functions = _rewards(reward_funcs, reward_processing_classes, folder, keep)
    scorers = _scorers(functions, reward_weights, {*(config.get("scorers") or {})})
    data = {k: rows for k, rows in (("train", train_dataset), ("eval", eval_dataset)) if rows is not None}
    if isinstance(divergence, divergences.Divergence):
        with told_as("divergence"):
            divergence = divergences.spec_of(divergence)
    raw = {
        "name": folder.name,
        "output_dir": str(folder.parent),
        "model": _model(model, processing_class, folder, keep),
        "data": {f"prompts_{k}": _prompts(rows, f"{k}_dataset", folder, keep) for k, rows in data.items()},
        "scorers": scorers,
        "target": {"name": "tilted", "reward": next(iter(scorers))},
        "policy": {"logged_scorers": list(scorers)[1:]},
        "divergence": divergence,
        "stages": ["policy", "evaluate"][: len(data)],
    }
    lora = {"model": {"lora": _lora(peft_config)}} if peft_config else {}
    tilt = {"target": {"beta": beta}} if beta is not None else {}
    checked = parse(functools.reduce(merge, (raw, lora, config, tilt), {}))
    if checked.resume is None:
        RunFolder(checked).require_same_config()
    for path, save in keep.items():
        build_once(path, save)
    return Aligned(execute(checked, checked.stages).path, checked)


def _model(model: Any, tokenizer: Any, folder: Path, keep: Keep) -> Any:
    """The config's `model`."""
    section = {"name_or_path": model} if isinstance(model, str) else model if isinstance(model, dict) else {}
    if section and tokenizer is None:
        return model
    if "name_or_path" in section:
        model = from_safetensors(AutoModelForCausalLM, section["name_or_path"], dtype="auto")
    if not isinstance(model, torch.nn.Module):
        return model
    path = _saved(model, tokenizer, "processing_class", folder, keep)
    return {"dtype": str(model.dtype).removeprefix("torch."), **section, "name_or_path": path}


def _saved(model: Any, tokenizer: Any, argument: str, folder: Path, keep: Keep) -> str:
    """Where a model in memory will be, its adapter merged, beside its tokenizer, for which there is an `argument`."""
    lm: Any = merged(model)
    if tokenizer is None and not lm.config.name_or_path:
        raise UserError(f"{argument}: is required, since the {type(lm).__name__} in memory was loaded from nowhere")
    tokenizer = tokenizer or load_tokenizer(lm.config.name_or_path)
    path = folder / "given" / f"{argument.replace('processing_class', 'model')}-{_digest(lm, tokenizer)[:16]}"
    keep[path] = lambda new: (lm.save_pretrained(new), tokenizer.save_pretrained(new))
    return str(path)


def _digest(lm: Any, tokenizer: Any) -> str:
    """Of all that could change a result, and of nothing that saving or tokenizing sets."""
    rules: Any = sorted(tokenizer.get_vocab().items())
    if own := getattr(tokenizer, "backend_tokenizer", None):
        rules = json.loads(own.to_str()) | {"padding": None, "truncation": None}
    words = (rules, tokenizer.special_tokens_map, tokenizer.chat_template)
    settings = {k: v for k, v in lm.config.to_dict().items() if k not in ("architectures", "dtype")}
    stops = getattr(getattr(lm, "generation_config", None), "eos_token_id", None)
    digest = hashlib.sha256(repr((type(lm).__name__, sorted(settings.items()), stops, words)).encode())
    for name, weight in lm.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _rewards(rewards: Any, tokenizers: Any, folder: Path, keep: Keep) -> list[Any]:
    """What `_scorers` takes: reward models in memory as scorers, anything else as it is."""
    rewards = [*rewards] if isinstance(rewards, list | tuple) else [rewards]
    tokenizers = tokenizers if isinstance(tokenizers, list) else [tokenizers] * len(rewards)
    if not rewards:
        raise UserError("reward_funcs: is empty; give at least one")
    if len(tokenizers) != len(rewards):
        raise UserError(
            f"reward_processing_classes: {len(tokenizers)} for {len(rewards)} reward_funcs; give one for each"
        )
    for i, (reward, tokenizer) in enumerate(zip(rewards, tokenizers, strict=True)):
        if isinstance(reward, PreTrainedModel | PeftModel):
            kind = type(under_adapter(reward)).__name__
            if "SequenceClassification" not in kind or reward.config.num_labels != 1:
                raise UserError(
                    f"reward_funcs: {kind} is no sequence classifier with one label, which a reward model is"
                )
            path = _saved(reward, tokenizer, "reward_processing_classes", folder, keep)
            rewards[i] = {"name": "reward_model", "path": path}
    return rewards


def _lora(config: dict[str, Any] | LoraConfig) -> dict[str, Any]:
    """The config's `model.lora`."""
    if isinstance(config, dict):
        return config
    plain, given = LoraConfig(task_type="CAUSAL_LM").to_dict(), config.to_dict()
    ours = {x.name for x in fields(LoraOptions)}
    if other := sorted(key for key in given.keys() - ours - {"task_type"} if given[key] != plain[key]):
        raise UserError(f"peft_config: {', '.join(other)} cannot be set; model.lora takes {', '.join(sorted(ours))}")
    modules = config.target_modules
    return {key: given[key] for key in ours} | {
        "target_modules": sorted(modules) if isinstance(modules, set) else modules
    }


def _prompts(rows: Any, argument: str, folder: Path, keep: Keep) -> str:
    """The config's `data.prompts_…`."""
    if isinstance(rows, str):
        return rows
    if not isinstance(rows, datasets.Dataset) or "prompt" not in rows.column_names:
        found = getattr(rows, "column_names", type(rows).__name__)
        raise UserError(
            f"{argument}: must be a datasets.Dataset with a column 'prompt', or the name of one, not {found}"
        )
    content = io.BytesIO()
    with told_as(f"{argument}: cannot be written as Parquet"):  # which has no column of empty mappings
        pq.write_table(rows.with_format("arrow")[:].replace_schema_metadata(None), content)
    path = folder / "given" / f"{argument}-{hashlib.sha256(content.getvalue()).hexdigest()[:16]}"
    keep[path] = lambda new: (new / "prompts.parquet").write_bytes(content.getvalue())
    return str(path / "prompts.parquet")


def _scorers(functions: list[Any], weights: list[float] | None, taken: set[str]) -> dict[str, Any]:
    """The config's `scorers`; what is to be maximised comes first, the sum of all where there are several or weights."""
    weights = None if weights is None else [float(weight) for weight in weights]  # of an array, too
    if weights is not None and len(functions) != len(weights):
        raise UserError(f"reward_weights: {len(weights)} for {len(functions)} reward_funcs; give one for each")
    summed = len(functions) > 1 or weights is not None
    taken, named = taken | RESERVED | ({"reward"} if summed else set()), dict[str, Any]()

    def free(name: str) -> str:
        word = re.sub(r"\W+", "_", name).strip("_")
        words = itertools.chain([word], (f"{word}_{i}" for i in itertools.count(2)))
        return next(x for x in words if x not in taken | named.keys())

    for function in functions:
        if isinstance(function, dict):
            named[free(str(function.get("name")))] = function
        elif isinstance(function, str) and ":" in function:
            named[free(function.rpartition(":")[2])] = {"name": function}
        elif isinstance(function, str):
            named[free(Path(function).name)] = {"name": "reward_model", "path": function}
        elif callable(function) and not isinstance(function, torch.nn.Module):
            setattr(given, name := free(get_callable_name(function)), function)
            named[name] = {"name": "function", "path": _dotted_path(function) or f"{__name__}:given.{name}"}
        else:
            raise UserError(
                f"reward_funcs: {type(function).__name__} is no function; give a reward model by its folder"
            )
    total = {"name": "sum", "of": dict(zip(named, weights or [1.0] * len(named), strict=True))}
    return {"reward": total, **named} if summed else named


def _dotted_path(function: Any) -> str | None:
    """Where any process can import the function from; None for one that only this process has."""
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
    try:
        found = operator.attrgetter(name)(sys.modules[module])
    except (AttributeError, KeyError):
        return None
    return f"{module}:{name}" if found is function and module != "__main__" else None
