"""From plain values to a RunConfig, with every mistake named at once, and back to plain values."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from rlhf_fdiv import divergences
from rlhf_fdiv.config.files import Dumper, read_yaml, with_overrides
from rlhf_fdiv.config.options import (
    STAGES,
    DataOptions,
    DistilOptions,
    EvaluateOptions,
    PolicyOptions,
    PreferOptions,
    RewardOptions,
    RunConfig,
    SftOptions,
)
from rlhf_fdiv.errors import UserError, did_you_mean
from rlhf_fdiv.estimators import ESTIMATORS
from rlhf_fdiv.model_options import ModelOptions
from rlhf_fdiv.objectives import OBJECTIVES
from rlhf_fdiv.ranges import Integer
from rlhf_fdiv.rewards import SCORERS, check_scorers
from rlhf_fdiv.targets import TARGETS

_SECTIONS: dict[str, Any] = {
    "model": ModelOptions,
    "data": DataOptions,
    "sft": SftOptions,
    "reward": RewardOptions,
    "policy": PolicyOptions,
    "prefer": PreferOptions,
    "distil": DistilOptions,
    "evaluate": EvaluateOptions,
}
_CHOICES: dict[str, dict[str, Any]] = {"objective": OBJECTIVES, "target": TARGETS, "estimator": ESTIMATORS}
_PLAIN: dict[str, Any] = {
    "name": str,
    "seed": Annotated[Integer, Field(ge=0, lt=2**32)],
    "output_dir": Annotated[str, Field(min_length=1)],
    "stages": Annotated[list[Literal[STAGES]], Field(min_length=1)],  # type: ignore[valid-type]
    "reuse": str | None,
    "resume": Literal[STAGES] | None,  # type: ignore[valid-type]
    "report_to": Literal["tensorboard", "none"],
}
TOP_LEVEL = (*_PLAIN, *_SECTIONS, *_CHOICES, "divergence", "scorers")

for _cls in (*_SECTIONS.values(), *(c for r in (*_CHOICES.values(), SCORERS) for c in r.values())):
    _cls.__pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)


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
        values[key] = _choice(registry, raw.get(key, default), key, problems, default)
    scorers = raw.get("scorers", {"reward": {"name": "reward_model"}})
    if not isinstance(scorers, dict):
        problems.append(f"scorers: must map names to scorers, not {scorers!r}")
        scorers = {}
        values["target"] = None  # which names them
    values["scorers"] = {str(n): _choice(SCORERS, s, f"scorers.{n}", problems) for n, s in scorers.items()}
    wrong_f: list[str] = []
    values["divergence"] = _divergence(raw.get("divergence", "reverse_kl"), "divergence", wrong_f)
    trains = getattr(values["objective"], "stage", "policy")
    stages = values.get("stages", ("sft", "reward", trains, "evaluate")) or ()
    values["stages"] = [stage for stage in STAGES if stage in stages]
    for stage in ("sft", "reward"):
        if values[stage] is not None:
            _divergence(values[stage].divergence, f"{stage}.divergence", wrong_f)
        elif isinstance(raw.get(stage), dict) and "divergence" in raw[stage]:
            _divergence(raw[stage]["divergence"], f"{stage}.divergence", wrong_f)
    measured = raw["evaluate"].get("divergences") if isinstance(raw.get("evaluate"), dict) else None
    for i, spec in enumerate(measured if isinstance(measured, list) else []):
        _divergence(spec, f"evaluate.divergences.{i}", wrong_f)
    if isinstance(values.get("name"), str) and not re.fullmatch(r"(?!\.+$)[\w.+=-]+", str(values["name"])):
        problems.append(f"name: {values['name']!r} must be letters, digits and . _ + = -, since it names a folder")
    if "name" not in raw:
        problems.append("name: is required, the name of the run's folder")
    parts = [*(values.get(key) for key in ("name", *_SECTIONS, *_CHOICES)), *values["scorers"].values()]
    if any(part is None for part in parts) or wrong_f:  # what contradicts what can only be told of whole parts
        raise UserError(*problems, *wrong_f)
    if isinstance(values["objective"], OBJECTIVES["regularise"]) and "beta" not in _as_dict(raw.get("objective")):
        beta = getattr(values["target"], "beta", values["objective"].beta)
        values["objective"] = dataclasses.replace(values["objective"], beta=beta)
    config = RunConfig(**values)
    if problems := problems + _conflicts(config):
        raise UserError(*problems)
    return config


def _as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {"name": value}


def _validate(kind: Any, value: Any, key: str, problems: list[str]) -> Any:
    found: dict[str, str] = {}
    made = None
    try:
        made = TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        for e in error.errors():
            where, cls, rest = key, kind, value
            for part in e["loc"]:
                fields = _fields(cls)
                unknown = e["type"] in ("unexpected_keyword_argument", "extra_forbidden") and part == e["loc"][-1]
                missing = e["type"] in ("missing", "missing_argument") and part == e["loc"][-1]
                try:
                    rest = rest[part]
                except (TypeError, KeyError, IndexError):
                    if not missing:
                        break
                where = f"{where}.{part}"
                if unknown:
                    found[where] = f"unknown key{did_you_mean(str(part), fields)}"
                elif missing:
                    found[where] = "is required"
                cls = fields.get(part)
            message = e["msg"].removeprefix("Value error, ")
            if e["type"] == "value_error":
                inner, colon, message = message.partition(": ")
                found.setdefault(f"{where}.{inner}" if colon else where, message if colon else inner)
            else:
                found.setdefault(where, f"{message}, not {e['input']!r}")
    except (ValueError, TypeError) as error:
        found[key] = str(error)
    problems += [f"{where}: {message}" for where, message in found.items()]
    return None if found else made


def _fields(kind: Any) -> dict[Any, Any]:
    """The fields of a dataclass, or of the dataclass in `X | None`, with their types."""
    for cls in (kind, *get_args(kind)):
        if dataclasses.is_dataclass(cls):
            return {f.name: get_type_hints(cls)[f.name] for f in dataclasses.fields(cls)}
    return {}


def _choice(registry: dict[str, Any], value: Any, key: str, problems: list[str], default: str | None = None) -> Any:
    options = dict(_as_dict(value))
    name = options.pop("name", default)
    if not isinstance(name, str) or name not in registry:
        problems.append(f"{key}.name: {name!r} is not known{did_you_mean(str(name), registry)}")
        return None
    if name == "product" and isinstance(options.get("of"), list):
        options["of"] = [_choice(registry, part, f"{key}.of.{i}", problems) for i, part in enumerate(options["of"])]
        if None in options["of"]:
            return None
    return _validate(registry[name], options, key, problems)


def _divergence(value: Any, key: str, problems: list[str]) -> dict[str, Any]:
    spec = _as_dict(value)
    name = spec.get("name")
    if not isinstance(name, str):
        problems.append(f"{key}: must be a name or a mapping with one, not {value!r}")
        return spec
    try:
        known = (*divergences.parameters(divergences.divergence_class(name)), "unit_curvature")
        if unknown := [k for k in spec if k != "name" and k not in known]:
            problems += [f"{key}.{k}: unknown key{did_you_mean(str(k), known)}" for k in unknown]
        else:
            divergences.get(spec)
    except ValueError as error:
        problems.append(f"{key}: {error}")
    return spec


def _conflicts(config: RunConfig) -> list[str]:
    """What each key allows but the whole does not, for the stages that will run."""
    problems = check_scorers(config.scorers, config.target.scorers if "policy" in config.stages else ())
    parts = getattr(config.target, "of", [config.target])
    if sum(isinstance(part, TARGETS["moments"]) for part in parts) > 1:
        problems.append("target.of: put all moments of a product into one `moments` target; they share one λ vector")
    if "sft" in config.stages and divergences.get(config.sft.divergence).f_prime_at_infinity == float("inf"):
        problems.append(
            f"sft.divergence: {config.sft.divergence} is infinite on data (f'(∞) = ∞): use forward_kl, js, tv, hellinger, "
            "neyman_chi2, skew_js or alpha < 1"
        )
    for stage in config.stages:
        for need in data_needs(config, stage):
            if getattr(config.data, need) is None:
                problems.append(f"data.{need}: is required by the {stage} stage")
    for stage in {"policy", "prefer", "distil"} & set(config.stages):
        if config.objective.stage != stage:
            fitting = " or ".join(name for name, cls in OBJECTIVES.items() if cls.stage == stage)
            problems.append(f"objective: {config.objective.name} is not trained by the {stage} stage, but {fitting} is")
        elif message := config.objective.conflicts(config.f, config.target.has_zeros):
            problems.append(f"divergence: {message}")
    if "distil" in config.stages and config.distil.teacher is None:
        problems.append("distil.teacher: is required by the distil stage, a model folder or hub name")
    if "policy" in config.stages:
        if config.policy.num_generations < config.estimator.min_generations:
            problems.append(
                f"policy.num_generations: {config.estimator.name} needs at least {config.estimator.min_generations} "
                f"completions a prompt, not {config.policy.num_generations}"
            )
        if config.policy.num_prompts * config.policy.num_generations < 2:
            problems.append(
                "policy.num_generations: a step needs at least 2 completions in all; raise this or num_prompts"
            )
        if config.policy.per_device_train_batch_size % config.policy.num_generations:
            problems.append("policy.per_device_train_batch_size: must be a multiple of policy.num_generations")
    return problems


def data_needs(config: RunConfig, stage: str) -> list[str]:
    """The keys of `data` without which a stage cannot run."""
    if stage == "distil":
        share = getattr(config.objective, "on_policy", 1.0)
        return [key for key, used in (("prompts_train", share > 0), ("sft_train", share < 1)) if used]
    return {
        "sft": ["sft_train"],
        "reward": ["preferences_train"],
        "policy": ["prompts_train"],
        "prefer": ["preferences_train"],
        "evaluate": ["prompts_eval"],
    }[stage]


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
    return yaml.dump(to_dict(config), Dumper=Dumper, sort_keys=False, allow_unicode=True)


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
