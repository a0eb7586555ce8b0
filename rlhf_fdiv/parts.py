"""A part that a config chooses: by its name or, a user's own, by the dotted path `package.module:Name`."""

from __future__ import annotations

import importlib
import operator
from typing import Any

from rlhf_fdiv.errors import UserError, did_you_mean, told_as


def named(value: Any, key: str = "a choice") -> dict[str, Any]:
    """A choice as a mapping: given alone, it is its name; `type` says the same as `name`. UserError where they differ."""
    options = dict(value) if isinstance(value, dict) else {"name": value}
    if "type" in options and options.setdefault("name", options["type"]) != options.pop("type"):
        raise UserError(f"{key}: `name` and `type` are one key, and say {options['name']!r} and {value['type']!r} here")
    return options


def load(path: str) -> Any:
    """What `package.module:Name` names. Raises UserError, whatever the module raises, and where it has no such name."""
    module, _, name = path.partition(":")
    with told_as(f"cannot load {path!r}", (Exception, SystemExit)):  # a user's own module may raise anything
        found = importlib.import_module(module)
    try:
        return operator.attrgetter(name)(found)
    except AttributeError as error:
        own = [key for key, x in vars(found).items() if getattr(x, "__module__", None) == module]
        raise UserError(f"cannot load {path!r}: {error}{did_you_mean(name, own)}") from error
