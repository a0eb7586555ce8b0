"""From plain values to a RunConfig, with every mistake named at once, and back to plain values."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from rlhf_fdiv import divergences
from rlhf_fdiv.config.files import read_yaml, with_overrides
from rlhf_fdiv.config.options import (
    STAGES,
    DataOptions,
    EvaluateOptions,
    PolicyOptions,
    RewardOptions,
    RunConfig,
    SftOptions,
)
from rlhf_fdiv.errors import UserError, did_you_mean
from rlhf_fdiv.estimators import ESTIMATORS
from rlhf_fdiv.model_options import ModelOptions
from rlhf_fdiv.objectives import OBJECTIVES
from rlhf_fdiv.rewards import SCORERS, check_scorers
from rlhf_fdiv.targets import TARGETS

_SECTIONS: dict[str, Any] = {
    "model": ModelOptions,
    "data": DataOptions,
    "sft": SftOptions,
    "reward": RewardOptions,
    "policy": PolicyOptions,
    "evaluate": EvaluateOptions,
}
_CHOICES: dict[str, dict[str, Any]] = {"objective": OBJECTIVES, "target": TARGETS, "estimator": ESTIMATORS}
_PLAIN: dict[str, Any] = {
    "name": str,
    "seed": int,
    "output_dir": str,
    "stages": list[Literal["sft", "reward", "policy", "evaluate"]],
    "reuse": str | None,
    "resume": Literal["sft", "reward", "policy", "evaluate"] | None,
    "report_to": Literal["tensorboard", "none"],
}
TOP_LEVEL = ("name", "base", *_PLAIN, *_SECTIONS, *_CHOICES, "divergence", "scorers")

for _cls in (*_SECTIONS.values(), *(c for r in (*_CHOICES.values(), SCORERS) for c in r.values())):
    _cls.__pydantic_config__ = ConfigDict(extra="forbid")


def load(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Reads, composes and checks a config. Raises UserError with every problem, each naming its key and the mend."""
    path = Path(path)
    raw = with_overrides(read_yaml(path), overrides or [])
    raw.setdefault("name", path.stem)
    try:
        return parse(raw)
    except UserError as error:
        raise UserError(*(f"{path}: {p}" for p in error.problems)) from error


def parse(raw: dict[str, Any]) -> RunConfig:
    """From plain values to a RunConfig. Raises UserError with every problem."""
    problems = [f"{key}: unknown key{did_you_mean(str(key), TOP_LEVEL)}" for key in raw if key not in TOP_LEVEL]
    values: dict[str, Any] = {}
    for key, kind in _PLAIN.items():
        if key in raw:
            values[key] = _validate(kind, raw[key], key, problems)
    for key, cls in _SECTIONS.items():
        values[key] = _validate(cls, {} if raw.get(key) is None else raw[key], key, problems)
    for key, registry in _CHOICES.items():
        default = {"objective": "match", "target": "tilted", "estimator": "rloo"}[key]
        values[key] = _choice(registry, raw.get(key, default), key, problems)
    scorers = raw.get("scorers", {"reward": {"name": "reward_model"}})
    if not isinstance(scorers, dict):
        problems.append(f"scorers: must map names to scorers, not {scorers!r}")
        scorers = {}
    values["scorers"] = {str(n): _choice(SCORERS, s, f"scorers.{n}", problems) for n, s in scorers.items()}
    values["divergence"] = _divergence(raw.get("divergence", "reverse_kl"), "divergence", problems)
    values.setdefault("stages", list(STAGES))
    if "name" in values and not re.fullmatch(r"[\w.+=-]+", str(values["name"])):
        problems.append(f"name: {values['name']!r} must be letters, digits and . _ + = -, since it names a folder")
    if problems:
        raise UserError(*problems)
    if isinstance(values["objective"], OBJECTIVES["regularise"]) and "beta" not in _as_dict(raw.get("objective")):
        beta = getattr(values["target"], "beta", values["objective"].beta)
        values["objective"] = dataclasses.replace(values["objective"], beta=beta)
    config = RunConfig(**values)
    if problems := _conflicts(config):
        raise UserError(*problems)
    return config


def _as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {"name": value}


def _validate(kind: Any, value: Any, key: str, problems: list[str]) -> Any:
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        fields = [x.name for x in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
        for e in error.errors():
            where = ".".join([key, *(str(part) for part in e["loc"])])
            if e["type"] in ("unexpected_keyword_argument", "extra_forbidden") and len(e["loc"]) == 1:
                problems.append(f"{where}: unknown key{did_you_mean(str(e['loc'][0]), fields)}")
            elif e["type"] in ("missing", "missing_argument"):
                problems.append(f"{where}: is required")
            else:
                message = e["msg"].removeprefix("Value error, ")
                problems.append(
                    f"{where}: {message}, not {e['input']!r}" if e["type"] != "value_error" else f"{key}: {message}"
                )
    except (ValueError, TypeError) as error:
        problems.append(f"{key}: {error}")
    return None


def _choice(registry: dict[str, Any], value: Any, key: str, problems: list[str]) -> Any:
    options = dict(_as_dict(value))
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in registry:
        problems.append(f"{key}.name: {name!r} is not known{did_you_mean(str(name), registry)}")
        return None
    if name == "product" and isinstance(options.get("of"), list):
        options["of"] = [_choice(registry, part, f"{key}.of.{i}", problems) for i, part in enumerate(options["of"])]
    return _validate(registry[name], options, key, problems)


def _divergence(value: Any, key: str, problems: list[str]) -> dict[str, Any]:
    try:
        divergences.get(value)
    except (ValueError, TypeError, ImportError, AttributeError) as error:
        problems.append(f"{key}: {error}")
    return _as_dict(value)


def _conflicts(config: RunConfig) -> list[str]:
    """What each key allows but the whole does not, for the stages that will run."""
    problems = check_scorers(config.scorers, config.target.scorers if "policy" in config.stages else ())
    losses = {"sft": config.sft.divergence, "reward": config.reward.divergence}
    for stage, spec in losses.items():
        _divergence(spec, f"{stage}.divergence", problems)
    for i, spec in enumerate(config.evaluate.divergences):
        _divergence(spec, f"evaluate.divergences.{i}", problems)
    if problems:
        return problems
    if "sft" in config.stages and divergences.get(config.sft.divergence).f_prime_at_infinity == float("inf"):
        problems.append(
            f"sft.divergence: {config.sft.divergence} is infinite on data (f'(∞) = ∞): use forward_kl, js, tv, hellinger, "
            "neyman_chi2, skew_js or alpha < 1"
        )
    for stage in config.stages:
        for need in {"sft": ["sft_train"], "reward": ["preferences_train"], "policy": ["prompts_train"]}.get(
            stage, ["prompts_eval"]
        ):
            if getattr(config.data, need) is None:
                problems.append(f"data.{need}: is required by the {stage} stage")
    if "policy" in config.stages:
        if message := config.objective.conflicts(config.f, config.target.has_zeros):
            problems.append(f"divergence: {message}")
        elif config.objective.name == "prefer":
            problems.append(
                "objective: prefer learns offline from pairs; the policy stage is on-policy: match or regularise"
            )
        if config.policy.num_generations < config.estimator.min_generations:
            problems.append(
                f"policy.num_generations: {config.estimator.name} needs at least {config.estimator.min_generations} "
                f"completions a prompt, not {config.policy.num_generations}"
            )
        for key in (
            "max_steps",
            "num_prompts",
            "num_generations",
            "max_completion_length",
            "per_device_train_batch_size",
        ):
            if getattr(config.policy, key) < 1:
                problems.append(f"policy.{key}: must be at least 1, not {getattr(config.policy, key)}")
        if config.policy.per_device_train_batch_size % config.policy.num_generations:
            problems.append("policy.per_device_train_batch_size: must be a multiple of policy.num_generations")
    return problems


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain values that `parse` turns into the same config."""
    return {x.name: _plain(getattr(config, x.name)) for x in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        name = getattr(type(value), "name", None)  # a choice says which of its kind it is, a section does not
        named = {"name": name} if isinstance(name, str) else {}
        return named | {x.name: _plain(getattr(value, x.name)) for x in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def dump(config: RunConfig) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def differences(old: dict[str, Any], new: dict[str, Any], ignore: tuple[str, ...] = ()) -> list[str]:
    """`a.b: old → new` for each key that differs."""
    lines = []
    for key in dict.fromkeys([*old, *new]):
        if key in ignore or old.get(key) == new.get(key):
            continue
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict) and a.get("name") == b.get("name"):
            lines += [f"{key}.{line}" for line in differences(a, b)]
        else:
            lines.append(f"{key}: {a!r} → {b!r}")
    return lines


def schema() -> dict[str, Any]:
    """JSON schema of every section and choice, for editors and for reading."""
    sections = {k: TypeAdapter(v).json_schema() for k, v in {**_PLAIN, **_SECTIONS}.items()}
    choices = {
        k: {n: TypeAdapter(c).json_schema() for n, c in r.items()} for k, r in {**_CHOICES, "scorers": SCORERS}.items()
    }
    return {**sections, **choices, "divergence": divergences.names()}
