"""How many numbers of a model one rank holds, and who else holds them: eve/parallel/sharding.py in sums."""

from __future__ import annotations

import math
from dataclasses import dataclass

from eve.config import Model, Recipe, Stage
from eve.model import parameter_shapes
from eve.objectives.coverage import uses
from eve.parallel.sharding import Kind, padded_vocabulary, placement
from eve.planning.layout import Layout
from eve.training.stages import learning


@dataclass(frozen=True)
class Weights:
    """Numbers of parameters on one rank.

    Attributes:
        dense: those that learn and are averaged over the data-parallel ranks.
        experts: those that learn and are averaged over the copies of an expert only (expert > 1).
        frozen: those that do not learn.
        largest, largest_expert: of the largest parameter of either.
        partial: of `dense`, those whose gradient is a part of the sum on each tensor rank.
        dense_of: stream -> of `dense`, those that its passes use; experts and the rest are used by all.
    """

    dense: int
    experts: int
    frozen: int
    largest: int
    largest_expert: int
    partial: int
    dense_of: dict[str, int]

    @property
    def learning(self) -> int:
        return self.dense + self.experts


class ModelWeights:
    """Shapes of the whole model, counted for any layout. `stage` says what learns and which streams run."""

    def __init__(self, recipe: Recipe, stage: Stage) -> None:
        self.model: Model = recipe.model
        self.stage = stage
        self.sizes = parameter_shapes(recipe.model)
        self.placements = {name: placement(name, self.sizes.keys()) for name in self.sizes}
        names = learning(recipe, stage)
        self.learns = {name: name in names for name in self.sizes}
        self.kinds = {stream.name: recipe.data.sources[stream.source].kind for stream in stage.streams}

    def held(self, name: str, tensor: int, expert: int) -> int:
        """Numbers of this parameter on one rank."""
        shape, kind = self.sizes[name], self.placements[name].kind
        if kind is Kind.VOCABULARY:
            return padded_vocabulary(shape[0], tensor) // tensor * math.prod(shape[1:])
        if kind in (Kind.COLUMN, Kind.ROW):
            return math.prod(shape) // tensor
        if kind is Kind.EXPERT:
            return math.prod(shape) // expert
        return math.prod(shape)

    def count(self, layout: Layout) -> Weights:
        dense = experts = frozen = partial = largest = largest_expert = 0
        dense_of = {stream.name: 0 for stream in self.stage.streams}
        for name, where in self.placements.items():
            size = self.held(name, layout.tensor, layout.expert)
            if not self.learns[name]:
                frozen += size
            elif where.kind is Kind.EXPERT and layout.expert > 1:
                experts += size
                largest_expert = max(largest_expert, size)
            else:
                dense += size
                largest = max(largest, size)
                partial += size if self._is_partial(name, where.kind, layout) else 0
                for stream in self.stage.streams:
                    dense_of[stream.name] += (
                        size if uses(stream, self.kinds[stream.name], self.model, name) else 0
                    )
        return Weights(dense, experts, frozen, largest, largest_expert, partial, dense_of)

    def _is_partial(self, name: str, kind: Kind, layout: Layout) -> bool:
        """As eve/parallel/tensor.py has it: used on a rank's own tokens only, or by one rank only."""
        if layout.tensor == 1:
            return False
        if kind in (Kind.ROW_BIAS, Kind.EXPERT) or ".router." in name:
            return True
        between = ".blocks." in name or name.startswith(("encoder.norm.", "class_token_head.norm."))
        return kind is Kind.REPLICATED and layout.sequence and between
