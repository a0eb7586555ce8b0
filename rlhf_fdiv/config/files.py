"""Reading a config: YAML files that build on each other by `base`, and `a.b=value` overrides."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from rlhf_fdiv.errors import UserError

CHOICES = ("objective", "target", "estimator", "divergence")  # a bare string in their place is their name


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-6 is a number and a key given twice is an error."""


_FLOAT = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


class Dumper(yaml.SafeDumper):
    """Safe YAML that quotes whatever the loader would not read back as text."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    breaks = any(c in text for c in "\x85\u2028\u2029")  # line ends to YAML, which only double quotes keep
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if breaks else None)


Dumper.add_representer(str, _text)
Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
    for key in keys:
        if isinstance(key, dict | list) or keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key!r} is given twice or is no name", node.start_mark
            )
    loader.flatten_mapping(node)
    return {loader.construct_object(k): loader.construct_object(v, deep=True) for k, v in node.value}


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A config file with everything its `base` files give, the nearer file winning."""
    try:
        resolved = path.resolve()
        if resolved in seen:
            raise UserError(f"{path}: its `base` leads back to itself")
        raw = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such config file") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a config is a mapping of keys, not {type(raw).__name__}")
    bases = raw.pop("base", None)
    bases = [] if bases is None else bases if isinstance(bases, list) else [bases]
    if wrong := [base for base in bases if not isinstance(base, str) or "\0" in base]:
        raise UserError(*(f"{path}: base must be a file name or a list of them, not {base!r}" for base in wrong))
    config: dict[str, Any] = {}
    for base in bases:
        config = merge(config, read_yaml(path.parent / base, (*seen, resolved)))
    return merge(config, raw)


def merge(under: dict[str, Any], over: dict[str, Any], at: tuple[str, ...] = ()) -> dict[str, Any]:
    """`over` wins; sections merge key by key, a choice of another name replaces the whole choice. `at` is their path."""
    out = dict(under)
    for key, value in over.items():
        old = out.get(key)
        if at == () and key == "model":
            old, value = ({"name_or_path": x} if isinstance(x, str) else x for x in (old, value))
        elif key in CHOICES or at == ("scorers",):
            old, value = ({"name": x} if isinstance(x, str) else x for x in (old, value))
        if (
            isinstance(old, dict)
            and isinstance(value, dict)
            and value.get("name", old.get("name")) == old.get("name", value.get("name"))
        ):
            value = merge(old, value, (*at, key))
        out[key] = value
    return out


def with_overrides(raw: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Applies `a.b=value`, the value read as YAML."""
    problems = []
    for item in overrides:
        dotted, sign, text = item.partition("=")
        if not sign or not all(dotted.split(".")):
            problems.append(f"override {item[:200]!r}: write key=value, for example policy.learning_rate=1e-5")
            continue
        try:
            value = yaml.load(text, _Loader)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            problems.append(f"override {item[:200]!r}: the value is not YAML: {' '.join(str(error).split())}")
            continue
        for key in reversed(dotted.split(".")):
            value = {key: value}
        raw = merge(raw, value)
    if problems:
        raise UserError(*problems)
    return raw
