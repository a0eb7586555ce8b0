"""From plain values to a RunConfig, with every mistake named at once, and back to plain values."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from rlhf_fdiv import divergences
from rlhf_fdiv.config.files import Dumper, find_config, merge, read_yaml, with_overrides
from rlhf_fdiv.config.options import STAGES, RunConfig
from rlhf_fdiv.errors import UserError, did_you_mean, told_as
from rlhf_fdiv.estimators import ESTIMATORS
from rlhf_fdiv.objectives import OBJECTIVES
from rlhf_fdiv.parts import load as load_part
from rlhf_fdiv.parts import named
from rlhf_fdiv.rewards import SCORERS, Function, check_scorers
from rlhf_fdiv.targets import TARGETS

_KINDS: dict[str, Any] = get_type_hints(RunConfig, include_extras=True)
_SECTIONS = {key: kind for key, kind in _KINDS.items() if dataclasses.is_dataclass(kind)}
_CHOICES: dict[str, dict[str, Any]] = {"objective": OBJECTIVES, "target": TARGETS, "estimator": ESTIMATORS}
_NEEDED = {  # what a user's own class must have, by what it is chosen for; docs/your_own_parts.md tells of it
    "target": ("scorers", "has_zeros", "potential"),
    "estimator": ("num_epochs", "clip_range", "value_head", "min_generations", "__call__"),
    "scorers": ("open",),
}
_DEFAULTS = {"objective": "match", "target": "tilted", "estimator": "rloo"}
TOP_LEVEL = tuple(_KINDS)
_PLAIN = {key: _KINDS[key] for key in TOP_LEVEL if key not in (*_SECTIONS, *_CHOICES, "divergence", "scorers")}

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
for _cls in (*_SECTIONS.values(), *(c for r in (*_CHOICES.values(), SCORERS) for c in r.values())):
    _cls.__pydantic_config__ = STRICT


def load(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Reads, composes and checks a config. Raises UserError with every problem, each naming its key and the mend."""
    path = find_config(path)
    raw = {"name": path.stem, **with_overrides(read_yaml(path), overrides or [])}
    try:
        return parse(raw)
    except UserError as error:
        raise UserError(*(f"{path}: {p}" for p in error.problems)) from error


def parse(raw: dict[str, Any]) -> RunConfig:
    """From plain values to a RunConfig. Raises UserError with every problem."""
    raw = merge({}, raw)  # every choice spelled out
    problems = [f"{key}: unknown key{did_you_mean(str(key), TOP_LEVEL)}" for key in raw if key not in TOP_LEVEL]
    values = {key: validate(kind, raw[key], key, problems) for key, kind in _PLAIN.items() if key in raw}
    if "name" not in raw:
        problems.append("name: is required, the name of the run's folder")
    elif values["name"] is not None and not re.fullmatch(r"(?!\.+$)[\w.+=-]+", values["name"]):
        problems.append(f"name: {values['name']!r} must be letters, digits and . _ + = -, since it names a folder")
    for key, cls in _SECTIONS.items():
        values[key] = validate(cls, {} if raw.get(key) is None else raw[key], key, problems)
    for key, default in _DEFAULTS.items():
        values[key] = _choice(_CHOICES[key], raw.get(key, default), key, problems, default)
    scorers = validate(dict[Any, Any], raw.get("scorers", {"reward": "reward_model"}), "scorers", problems)
    chosen = {str(n): _choice(SCORERS, s, f"scorers.{n}", problems) for n, s in (scorers or {}).items()}
    values["scorers"] = {"": None} if scorers is None else chosen
    fs = {key: _divergence(spec, key, problems) for key, spec in _divergences(raw).items()}
    values["divergence"] = fs["divergence"]
    stages = values.get("stages", ("sft", "reward", getattr(values["objective"], "stage", "policy"), "evaluate")) or ()
    values["stages"] = [stage for stage in STAGES if stage in stages]
    parts = [*(values.get(key) for key in ("name", *_SECTIONS, *_CHOICES)), *values["scorers"].values(), *fs.values()]
    if all(part is not None for part in parts):  # what contradicts what can only be told of whole parts
        if isinstance(values["objective"], OBJECTIVES["regularise"]) and hasattr(values["target"], "beta"):
            said, other = ("objective", "target") if "beta" in raw.get("objective", ()) else ("target", "objective")
            if "beta" not in raw.get(other, ()):  # r/β is the potential and r − β·f' the pseudo-reward: they are one
                values[other] = dataclasses.replace(values[other], beta=values[said].beta)
        config = RunConfig(**values)
        problems += _conflicts(config)
    if problems:
        raise UserError(*problems)
    return config


def validate(kind: Any, value: Any, key: str, problems: list[str]) -> Any:
    """The value as `kind`, or None where that adds problems, at most one a key."""
    found: dict[str, str] = {}
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        for e in error.errors():
            loc = e["loc"] if e["type"] == "missing" else _inside(value, e["loc"])
            message = f"{e['msg']}, not {e['input']!r}"
            if e["type"] == "missing":
                message = "is required"
            elif e["type"] == "unexpected_keyword_argument":
                message = f"unknown key{did_you_mean(str(loc[-1]), _keys(kind, loc[:-1]))}"
            elif e["type"] == "value_error":  # of a __post_init__, which names its field, or of a range
                *field, message = str(e["ctx"]["error"]).split(": ", 1)
                loc = (*loc, *field)
            found.setdefault(".".join(map(str, (key, *loc))), message)
    problems += [f"{where}: {message}" for where, message in found.items()]
    return None


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    """To build one takes some ms, most of what reading a config took."""
    return TypeAdapter(kind)


def _inside(value: Any, loc: tuple[Any, ...]) -> tuple[Any, ...]:
    """The part of pydantic's location that is in the config; where it names the branch of a union, it ends."""
    for i, part in enumerate(loc):
        try:
            value = value[part]
        except (TypeError, KeyError, IndexError):
            return loc[:i]
    return loc


def _keys(section: Any, path: tuple[Any, ...]) -> list[str]:
    """The keys of a section, or of the `X | None` that `path` leads to in it."""
    for part in path:
        section = get_args(get_type_hints(section)[part])[0]
    return [x.name for x in dataclasses.fields(section)]


def _choice(registry: dict[str, Any], value: Any, key: str, problems: list[str], default: str | None = None) -> Any:
    """One of a registry or a user's own, or None where that adds problems."""
    options = {"name": default, **named(value, key)}
    name, choice = options.pop("name"), key.partition(".")[0]
    if isinstance(name, str) and ":" in name and choice in _NEEDED:
        try:
            registry = {name: _own(name, choice)}
        except UserError as error:
            problems.append(f"{key}: {error}")
            return None
        if registry[name] is Function and options.setdefault("path", name) != name:
            problems.append(f"{key}: `path` and the name are one key here, and say {options['path']!r} and {name!r}")
            return None
    if not isinstance(name, str) or name not in registry:
        problems.append(f"{key}.name: {name!r} is not known{did_you_mean(str(name), registry)}")
        return None
    if name == "product" and isinstance(options.get("of"), list):
        options["of"] = [_choice(registry, part, f"{key}.of.{i}", problems) for i, part in enumerate(options["of"])]
        if None in options["of"]:
            return None
    return validate(registry[name], options, key, problems)


def _own(path: str, choice: str) -> Any:
    """A user's class, which is called by its path from now on, or the scorer of a user's function. Raises UserError where it
    is not of the right kind."""
    found = load_part(path)
    if choice == "scorers" and callable(found) and not isinstance(found, type):
        return Function
    has = {*dir(found), *(x.name for x in dataclasses.fields(found))} if dataclasses.is_dataclass(found) else set()
    if lacking := [name for name in _NEEDED[choice] if name not in has]:
        raise UserError(f"{path!r} is no dataclass with {', '.join(lacking)}")
    if not found.__module__.startswith("rlhf_fdiv."):
        found.name, found.__pydantic_config__ = path, STRICT
    with told_as(f"{path!r} has a field that cannot be checked"):
        TypeAdapter(found)
    return found


def _divergences(raw: dict[str, Any]) -> dict[str, Any]:
    """Every f that a config names, by key."""
    sections = {key: raw[key] for key in ("sft", "reward", "evaluate") if isinstance(raw.get(key), dict)}
    measured = sections.pop("evaluate", {}).get("divergences")
    return {
        "divergence": raw.get("divergence", "reverse_kl"),
        **{f"{key}.divergence": section["divergence"] for key, section in sections.items() if "divergence" in section},
        **{f"evaluate.divergences.{i}": f for i, f in enumerate(measured if isinstance(measured, list) else [])},
    }


def _divergence(value: Any, key: str, problems: list[str]) -> dict[str, Any] | None:
    """An f as a mapping, or None where that adds problems."""
    spec, found = {}, []
    try:
        spec = named(value, key)
        if not isinstance(spec.get("name"), str):
            raise ValueError(f"must be a name or a mapping with one, not {value!r}")
        known = (*divergences.parameters(divergences.divergence_class(spec["name"])), "unit_curvature")
        found = [f"{key}.{k}: unknown key{did_you_mean(str(k), known)}" for k in spec if k not in ("name", *known)]
        if not found:
            divergences.get(spec)
    except ValueError as error:
        found = [f"{key}: {error}"]
    problems += found
    return None if found else spec


def _conflicts(config: RunConfig) -> Iterator[str]:
    """What each key allows but the whole does not, for the stages that will run."""
    policy, estimator, objective, target = config.policy, config.estimator, config.objective, config.target
    yield from check_scorers(config.scorers, target.scorers if "policy" in config.stages else ())
    unknown = [name for name in policy.logged_scorers if name not in config.scorers]
    yield from (f"policy.logged_scorers: no scorer named {n!r}{did_you_mean(n, config.scorers)}" for n in unknown)
    f = divergences.get(config.sft.divergence)
    if "sft" in config.stages and f.f_prime_at_infinity == float("inf"):
        yield (
            f"sft.divergence: {divergences.label(f)} is infinite on data (f'(∞) = ∞): use forward_kl, js, tv, hellinger, "
            "neyman_chi2, skew_js or alpha < 1"
        )
    for stage in config.stages:
        missing = [key for key in data_needs(config, stage) if getattr(config.data, key) is None]
        yield from (f"data.{key}: is required by the {stage} stage" for key in missing)
        if stage in {cls.stage for cls in OBJECTIVES.values()} - {objective.stage}:
            fitting = " or ".join(name for name, cls in OBJECTIVES.items() if cls.stage == stage)
            yield f"objective: {objective.name} is not trained by the {stage} stage, but {fitting} is"
    if isinstance(objective, OBJECTIVES["regularise"]) and objective.beta != getattr(target, "beta", objective.beta):
        yield f"objective.beta: {objective.beta:g}, and target.beta is {target.beta:g}; they are one β, set one"
    if objective.stage in config.stages and (message := objective.conflicts(config.f, target.has_zeros)):
        yield f"divergence: {message}"
    if "distil" in config.stages and config.distil.teacher is None:
        yield "distil.teacher: is required by the distil stage, a model folder or hub name"
    if "policy" in config.stages:
        name, count, least = estimator.name, policy.num_generations, estimator.min_generations
        if count < least:
            yield f"policy.num_generations: {name} needs at least {least} completions a prompt, not {count}"
        if policy.num_prompts * count < 2:
            yield "policy.num_generations: a step needs at least 2 completions in all; raise this or num_prompts"
        if (policy.engine == "vllm") != (policy.vllm is not None):
            yield "policy.vllm: is what policy.engine=vllm needs, {url: http://HOST:PORT}, and no other engine takes"
        if policy.engine == "vllm" and policy.reference_share:
            yield "policy.reference_share: what the reference drew has no density under the engine vllm; set it to 0"
        if policy.per_device_train_batch_size % count:
            yield "policy.per_device_train_batch_size: must be a multiple of policy.num_generations"


def data_needs(config: RunConfig, stage: str) -> list[str]:
    """The keys of `data` without which a stage cannot run."""
    if stage == "distil":
        share = getattr(config.objective, "on_policy", 1.0)
        return [key for key, used in (("prompts_train", share > 0), ("sft_train", share < 1)) if used]
    return [{"sft": "sft_train", "policy": "prompts_train", "evaluate": "prompts_eval"}.get(stage, "preferences_train")]


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
        a, b = old.get(key), new.get(key)
        if key in ignore or a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict) and a.get("name") == b.get("name"):
            inside = tuple(x.removeprefix(f"{key}.") for x in ignore if x.startswith(f"{key}."))
            lines += [f"{key}.{line}" for line in differences(a, b, inside)]
        else:
            lines.append(f"{key}: {a!r} → {b!r}")
    return lines


def schema() -> dict[str, Any]:
    """JSON schema of every section and choice, for editors and for reading."""

    def schemas(kinds: dict[str, Any]) -> dict[str, Any]:
        return {key: TypeAdapter(kind).json_schema() for key, kind in kinds.items()}

    choices = {key: schemas(registry) for key, registry in (_CHOICES | {"scorers": SCORERS}).items()}
    return {**schemas(_PLAIN | _SECTIONS), **choices, "divergence": divergences.names()}
