"""A fixture: numbers of an official code, and what made them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from eve.conversion.foreign.formats import Imported, import_state
from eve.errors import UserError

# Of an output for which the fixture names no allowed difference: share of its largest number.
DEFAULT_TOLERANCE = 1e-5


class Named(dict[str, Any]):
    """Raises UserError for a name that is not there."""

    def __init__(self, values: Mapping[str, Any], what: str) -> None:
        super().__init__(values)
        self._what = what

    def __missing__(self, name: str) -> Any:
        raise UserError(f"{self._what}.{name} is missing, which this kind of fixture has")


@dataclass(frozen=True)
class Fixture:
    """Tensors by name without their prefixes `state.`, `input.`, `output.`; `hyper` is the json's.

    `tolerances`: largest difference that is allowed of each output; 0 for integers and booleans.
    """

    where: str
    name: str
    hyper: dict[str, Any]
    state: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    tolerances: dict[str, float]

    def imported(self, form: str, **sizes: Any) -> Imported:
        """Its state through the table of formats."""
        return import_state(self.state, form, sizes, where=self.where)


def read_fixture(path: Path) -> Fixture:
    """`path`.safetensors and the json beside it. Raises UserError."""
    about = path.with_suffix(".json")
    try:
        tree = json.loads(about.read_text())
        tensors = load_file(path) if path.is_file() else {}
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path} is no fixture: {error}") from None
    if not isinstance(tree, dict) or "fixture" not in tree:
        raise UserError(f"{about} is not about a fixture: it has no key 'fixture'")
    parts: dict[str, dict[str, Tensor]] = {"state": {}, "input": {}, "output": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part not in parts:
            raise UserError(f"{path}: {name} begins with neither state., input. nor output.")
        parts[part][rest] = tensor
    if tensors and (missing := sorted(set(tree.get("outputs", {})) - set(parts["output"]))):
        raise UserError(f"{path} has no output.{missing[0]}, which {about} describes")
    described = tree.get("outputs", {})
    return Fixture(
        where=str(path),
        name=tree["fixture"],
        hyper=Named(tree.get("hyper", {}), f"{about}: hyper"),
        state=parts["state"],
        inputs=Named(parts["input"], f"{path}: input"),
        outputs=parts["output"],
        tolerances={
            name: _tolerance(expected, described.get(name, {})) for name, expected in parts["output"].items()
        },
    )


def _tolerance(expected: Tensor, about: dict[str, Any]) -> float:
    if not expected.is_floating_point():
        return 0.0
    allowed = about.get("suggested_atol")
    if allowed is not None:
        return float(allowed)
    return DEFAULT_TOLERANCE * float(expected.abs().max()) if expected.numel() else 0.0
