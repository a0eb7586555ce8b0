"""The number ranges that config fields are checked against; a boolean is no number."""

from __future__ import annotations

from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BeforeValidator


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"must be a number, not {value!r}")
    return value


Integer = Annotated[int, BeforeValidator(_no_boolean)]
Number = Annotated[float, BeforeValidator(_no_boolean)]
Count = Annotated[Integer, Ge(1)]
CountOrZero = Annotated[Integer, Ge(0)]
Positive = Annotated[Number, Gt(0)]
NotNegative = Annotated[Number, Ge(0)]
Share = Annotated[Number, Ge(0), Le(1)]
BelowOne = Annotated[Number, Ge(0), Lt(1)]
BelowHalf = Annotated[Number, Ge(0), Lt(0.5)]
