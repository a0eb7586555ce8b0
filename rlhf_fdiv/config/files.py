"""Reading a config: YAML files that build on each other by `base`, and `a.b=value` overrides."""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from rlhf_fdiv.errors import UserError, one_line, told_as
from rlhf_fdiv.parts import named

CHOICES = ("objective", "target", "estimator", "divergence")  # a bare string in their place is their name
_PACKAGE = Path(__file__).parent.parent
_FLOAT = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
_LIMIT = 2**17  # characters of a file, and values with all that aliases repeat
_YAML_ERRORS = (OSError, yaml.YAMLError, ValueError, RecursionError)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-6 is a number and a key given twice is an error, as are aliases of aliases without end."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.values, self.sizes = 0, dict[int, int]()

    def compose_node(self, parent: Any, index: Any) -> Any:
        alias, before = self.check_event(yaml.AliasEvent), self.values
        node = super().compose_node(parent, index)
        self.values += self.sizes.get(id(node), 1) if alias else 1
        if self.values > _LIMIT:
            raise yaml.composer.ComposerError(None, None, f"more than {_LIMIT:,} values with what aliases repeat")
        if not alias:
            self.sizes[id(node)] = self.values - before
        return node


class Dumper(yaml.SafeDumper):
    """Safe YAML that quotes whatever the loader would not read back as text."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
    made = loader.construct_mapping(node, deep=True)  # which refuses keys that cannot be counted
    if twice := [key for key, count in Counter(keys).items() if count > 1]:
        raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} is given twice", node.start_mark)
    return made


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    if re.fullmatch("[-+]?0[0-9_]+|.*:.*", node.value):  # which YAML 1.1 takes for octal, and for minutes and seconds
        raise yaml.constructor.ConstructorError(
            None, None, f"{node.value} is no decimal number; write one, or quote it as text"
        )
    value: int = loader.construct_yaml_int(node)
    if abs(value) >= 2**1000:  # beyond what a float can hold, or Python will print
        raise yaml.constructor.ConstructorError(None, None, "a number too large", node.start_mark)
    return value


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    breaks = any(c in text for c in "\x85\u2028\u2029")  # line ends to YAML, which only double quotes keep
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if breaks else None)


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
Dumper.add_representer(str, _text)
for _cls in (_Loader, Dumper):
    _cls.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def find_config(path: str | Path) -> Path:
    """The file itself or, where it is none, that of this name among the configs that come with the package:
    `quickstart`, `ablation/toy`, `configs/quickstart.yaml`."""
    path = Path(path)
    if os.path.exists(path) or path.is_absolute():  # of os.path, for which no name is too long
        return path
    # of a wheel, of the sources
    own = next(f for f in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if f.is_dir())
    inside = (own / path.relative_to("configs") if path.parts[:1] == ("configs",) else own / path).with_suffix(".yaml")
    return inside if os.path.isfile(inside) else path


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A config file with everything its `base` files give, the nearer file winning. Raises UserError, naming the file."""
    if path.resolve() in seen:
        raise UserError(f"{path}: its `base` leads back to itself")
    if not os.path.exists(path):
        raise UserError(f"{path}: no such config file")
    with told_as(f"{path}: not readable as YAML", _YAML_ERRORS), path.open(encoding="utf-8-sig") as file:
        text = file.read(_LIMIT + 1)
        if len(text) > _LIMIT:
            raise ValueError(f"longer than {_LIMIT:,} characters; is it a config at all?")
        raw = yaml.load(text, _Loader)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a config is a mapping of keys, not {type(raw).__name__}")
    bases = raw.pop("base", None)
    bases = [] if bases is None else bases if isinstance(bases, list) else [bases]
    if wrong := [base for base in bases if not isinstance(base, str) or "\0" in base]:
        raise UserError(*(f"{path}: base must be a file name or a list of them, not {base!r}" for base in wrong))
    below = [read_yaml(path.parent / base, (*seen, path.resolve())) for base in bases]
    return functools.reduce(merge, [*below, raw], {})


def merge(under: dict[str, Any], over: dict[str, Any], at: tuple[str, ...] = ()) -> dict[str, Any]:
    """`over` wins; sections merge key by key, a choice of another name replaces the whole choice. `at` is their path."""
    out = dict(under)
    for key, value in over.items():
        old, new = _spelled_out(under.get(key), (*at, key)), _spelled_out(value, (*at, key))
        if isinstance(new, dict):
            another = not isinstance(old, dict) or ("name" in old and "name" in new and old["name"] != new["name"])
            new = merge({} if another else old, new, (*at, key))
        out[key] = new
    return out


def _spelled_out(value: Any, at: tuple[str, ...]) -> Any:
    """A model or a choice that is given by its name alone, as a mapping."""
    if isinstance(value, str) and at == ("model",):
        return {"name_or_path": value}
    is_choice = at[:-1] == ("scorers",) or (at[-1] in CHOICES and at[:-1] in ((), ("sft",), ("reward",)))
    if is_choice and isinstance(value, str | dict):
        return named(value, ".".join(map(str, at)))
    return value


def with_overrides(raw: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Applies `a.b=value`, the value read as YAML. Raises UserError with every override that is none."""
    problems = []
    for item in overrides:
        dotted, sign, text = item.partition("=")
        keys = dotted.split(".")
        if not sign or not all(keys):
            problems.append(f"override {item[:200]!r}: write key=value, for example policy.learning_rate=1e-5")
            continue
        try:
            value = yaml.load(text, _Loader)
        except _YAML_ERRORS as error:
            problems.append(f"override {item[:200]!r}: the value is not YAML: {one_line(error)}")
        else:
            raw = merge(raw, functools.reduce(lambda inner, key: {key: inner}, reversed(keys), value))
    if problems:
        raise UserError(*problems)
    return raw
