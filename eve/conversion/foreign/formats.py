"""The table of official layouts that can be imported, and what importing one gives.

tools/convert_checkpoint.py and tools/verify_import.py both go through `import_state`. A further layout is a
module with a FORMAT, and a line in FORMATS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from eve.config import Model
from eve.conversion.foreign import beit, beit3, eve, mae, vlmo
from eve.conversion.foreign.format import Format
from eve.conversion.foreign.names import Names
from eve.errors import UserError
from eve.model import VisionLanguageModel, build_model, parameter_shapes

FORMATS: dict[str, Format] = {
    "vlmo": vlmo.FORMAT,
    "eve": eve.FORMAT,
    "beit": beit.FORMAT,
    "beit2": beit.FORMAT_2,
    "beit3": beit3.FORMAT,
    "mae": mae.FORMAT,
    "timm": mae.FORMAT_TIMM,
    "timm_imagenet": mae.FORMAT_TIMM_IMAGENET,
}


@dataclass(frozen=True)
class Imported:
    """Weights of another project as a model of ours.

    Attributes:
        model: its own architecture.
        weights: of this model, by name, in fp32; NaN where a name was missing and ignored.
        heads: of tasks, by name; a model of ours has none.
    """

    model: Model
    weights: dict[str, Tensor]
    heads: dict[str, nn.Module]

    @property
    def lacking(self) -> list[str]:
        """Parameters of `model` that the source does not have, or has no value for."""
        have = {name for name, tensor in self.weights.items() if not bool(tensor.isnan().any())}
        return [name for name in parameter_shapes(self.model) if name not in have]

    @torch.no_grad()
    def build(self, seed: int = 0) -> VisionLanguageModel:
        """The model in evaluation mode; what the source lacks is what a run of that seed starts with."""
        model = build_model(self.model, seed)
        for name, parameter in model.named_parameters():
            if name in self.weights:
                parameter.copy_(fill(self.weights[name], parameter))
        return model.eval()


def fill(weight: Tensor, initial: Tensor) -> Tensor:
    """`weight`, where it is NaN `initial`."""
    return torch.where(weight.isnan(), initial, weight)


class _Read(dict[str, Tensor]):
    """Remembers which of its tensors were asked for."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__(weights)
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.asked.add(name)
        return super().__getitem__(name)


def export_state(
    weights: Mapping[str, Tensor], name: str, model: Model
) -> tuple[dict[str, Tensor], list[str]]:
    """The official state of weights of ours, and the names of those it has no place for: heads of objectives
    that the other project does not have. Raises UserError for a model that computes otherwise there."""
    make = FORMATS[name].state
    assert make is not None
    read = _Read(weights)
    return make(read, model), [key for key in weights if key not in read.asked]


def import_state(
    state: Mapping[str, Tensor],
    name: str,
    sizes: Mapping[str, Any] | None = None,
    *,
    ignore: Sequence[str] = (),
    where: str = "the checkpoint",
) -> Imported:
    """The model that an official state is of.

    `sizes` say what its names and shapes do not (Format.sizes). Raises UserError for names that are unknown
    or missing, but for patterns in `ignore`, and for shapes that do not fit together.
    """
    form = FORMATS[name]
    for key in sizes or {}:
        if key not in form.sizes:
            raise UserError(f"{key} is no size of the format {name}; those are {', '.join(form.sizes)}")
    names = Names(state, where, ignore)
    tree = form.read_model(names, {**form.sizes, **(sizes or {})})
    try:
        model = Model.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = "".join(f"{part}: " for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{where} is not a model of ours: {key}{message}") from None
    weights = form.weights(names, model)
    heads = {} if form.heads is None else form.heads(names, model)
    names.skip(*form.buffers)
    names.check()
    shapes = parameter_shapes(model)
    for key, tensor in weights.items():
        assert tensor.shape == shapes[key], f"{key}: {tuple(tensor.shape)}, expected {tuple(shapes[key])}"
    return Imported(model, weights, heads)
