"""The number ranges that config fields are checked against; a boolean is no number."""

from __future__ import annotations

from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BeforeValidator


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"must be a number, not {value!r}")
    return value


def _steps(value: int) -> int:
    if value < 1 and value != -1:
        raise ValueError(f"must be at least 1, or -1 for as many as num_train_epochs makes, not {value}")
    return value


Integer = Annotated[int, BeforeValidator(_no_boolean), Lt(2**53)]
Number = Annotated[float, BeforeValidator(_no_boolean)]
Count = Annotated[Integer, Ge(1)]
CountOrZero = Annotated[Integer, Ge(0)]
Steps = Annotated[Integer, AfterValidator(_steps)]
Positive = Annotated[Number, Gt(0)]
NotNegative = Annotated[Number, Ge(0)]
Share = Annotated[Number, Ge(0), Le(1)]
BelowOne = Annotated[Number, Ge(0), Lt(1)]
BelowHalf = Annotated[Number, Ge(0), Lt(0.5)]
