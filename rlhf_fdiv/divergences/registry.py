"""From a name in a config to an f, and from a user's class to a name."""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_fdiv.divergences.base import Divergence, Scaled, label, parameters
from rlhf_fdiv.divergences.family import FAMILY
from rlhf_fdiv.divergences.proofs import check
from rlhf_fdiv.parts import load, named

_REGISTRY: dict[str, type[Divergence]] = {cls.name: cls for cls in FAMILY}


def names() -> list[str]:
    """The registered names, in the order of the table in docs/mathematics.md."""
    return list(_REGISTRY)


def divergence_class(name: str) -> type[Divergence]:
    """The class of a registered name or of a dotted path `package.module:Class`."""
    if ":" in name:
        found = load(name)
        if not (isinstance(found, type) and issubclass(found, Divergence) and hasattr(found, "name")):
            raise ValueError(f"{name!r} is no subclass of rlhf_fdiv.divergences.Divergence with a name")
        return found
    if name not in _REGISTRY:
        near = difflib.get_close_matches(name, _REGISTRY, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown divergence {name!r}: {hint}Known: {', '.join(_REGISTRY)}, or package.module:Class")
    return _REGISTRY[name]


def get(spec: str | Mapping[str, Any] | Divergence, **params: Any) -> Divergence:
    """The f that `spec` names: `get("alpha", alpha=0.3)` or `get({"name": "alpha", "alpha": 0.3})`.

    `unit_curvature=True` divides f by f''(1) (smooth f only). Raises ValueError for an unknown name, parameter or
    value.
    """
    if isinstance(spec, Divergence):
        if params.keys() - {"unit_curvature"}:
            raise ValueError(f"{label(spec)} has its parameters already; give a name to set {', '.join(params)}")
        return _scaled(spec, params.get("unit_curvature", False))
    options = named(spec) | params
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(f"a divergence needs a name, one of: {', '.join(_REGISTRY)}; got {spec!r}")
    unit_curvature = options.pop("unit_curvature", False)
    cls = divergence_class(name)
    known = parameters(cls)
    for key in options.keys() - set(known):
        raise ValueError(f"{name} has no parameter {key!r}; it takes {', '.join(known) or 'none'}")
    types: dict[str, str] = (
        {x.name: str(x.type) for x in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
    )
    f = cls(**{key: _value(name, key, value, types[key]) for key, value in options.items()})
    return _scaled(f, unit_curvature)


def spec_of(f: Divergence) -> dict[str, Any]:
    """The mapping of which `get` makes this f, as a config has it. ValueError for one scaled by other than 1/f''(1)."""
    if type(f) is Scaled:
        if not math.isclose(f.factor * f.of.curvature, 1):
            raise ValueError(f"{label(f)}: a config can scale an f by 1/f''(1) alone, as unit_curvature")
        return spec_of(f.of) | {"unit_curvature": True}

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(x) for x in value]
        return spec_of(value) if isinstance(value, Divergence) else value

    cls = type(f)
    name = f.name if _REGISTRY.get(f.name) is cls else f"{cls.__module__}:{cls.__qualname__}"
    return {"name": name} | {key: plain(getattr(f, key)) for key in parameters(f)}


def _scaled(f: Divergence, unit_curvature: Any) -> Divergence:
    if not isinstance(unit_curvature, bool):
        raise ValueError(f"{f.name}: unit_curvature must be true or false, not {unit_curvature!r}")
    if not unit_curvature:
        return f
    if not f.curvature > 0:
        raise ValueError(f"{label(f)} has no positive f''(1) to divide by: unit_curvature is for smooth f")
    return Scaled(f, 1 / f.curvature)


def _value(name: str, key: str, value: Any, kind: str) -> Any:
    """A parameter's value, checked against the text of its annotation."""
    if "tuple" in kind:  # a mixture's weights, or its components
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name}: {key} must be a list, not {value!r}")
        inner = "Divergence" if "Divergence" in kind else "float"
        return tuple(_value(name, f"{key}[{i}]", x, inner) for i, x in enumerate(value))
    if kind == "Divergence":
        if not isinstance(value, str | Mapping | Divergence):
            raise ValueError(f"{name}: {key} must name a divergence, not {value!r}")
        return get(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name}: {key} must be a finite number, not {value!r}")
    return value


def register(cls: type[Divergence]) -> type[Divergence]:
    """Adds a user's f under its name; usable as a decorator. Raises ValueError, naming the failed proof, for
    a wrong f."""
    if cls.name in _REGISTRY and _REGISTRY[cls.name] is not cls:
        raise ValueError(f"a divergence named {cls.name!r} exists already: give {cls.__name__} another name")
    for params in cls.examples:
        if failures := check(cls(**params)):
            raise ValueError(f"{cls.name} is not registered: " + "; ".join(failures))
    _REGISTRY[cls.name] = cls
    return cls


def summary(f: Divergence) -> Sequence[str]:
    """One row of `rlhf-fdiv divergences`: name, formula, direction in words, f'(∞), f''(1)."""
    return label(f), f.formula, f.direction, f"{f.f_prime_at_infinity:.4g}", f"{f.curvature:.4g}"
