"""What all sections of a recipe are made of."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


def _parse_blocks(value: Any) -> Any:
    """`0-9,11` or `3` or a list of numbers -> tuple of block indices."""
    if isinstance(value, int):
        return (value,)
    if not isinstance(value, str):
        return value
    blocks: list[int] = []
    for part in value.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+))?\s*", part)
        if not match:
            raise ValueError(f"'{value}' is not a list of blocks such as 0-9,11")
        first, last = int(match[1]), int(match[2] or match[1])
        blocks.extend(range(first, last + 1))
    return tuple(blocks)


Blocks = Annotated[tuple[int, ...], BeforeValidator(_parse_blocks)]


# From 0 to below 1.
Share = Annotated[float, Field(ge=0, lt=1)]


def _parse_weight(value: Any) -> Any:
    pair = isinstance(value, list | tuple)
    try:
        weights = [float(weight) for weight in (value if pair else [value])]
    except (TypeError, ValueError):
        weights = []
    if len(weights) != 1 + pair or not all(0 <= weight < math.inf for weight in weights):
        raise ValueError(
            f"{value!r} is no weight; expected a number from 0 on, or [image, text], one for each pool"
        )
    return tuple(weights) if pair else weights[0]


# One number, or one for image and one for text tokens. Checked here: of a union pydantic would name a mistake
# by its own types.
LossWeight = Annotated[float | tuple[float, float], BeforeValidator(_parse_weight)]
