"""A checkpoint with other experts than it was trained with: weights to start a run of another recipe from.

Dense to mixture (sparse upcycling, Komatsuzaki et al. 2023): the experts of a learned router are copies of
the feed-forward that stood there, its router is new. A bank of another number of experts: experts and their
rows of the router are copied in turn, or are means. All else is taken over as it is.

What becomes of the function that the model computes, without `noise` and drops by capacity:

    copies of one expert              the same, as the weights of a token's choices add up to 1 (renormalise)
    copies of the image and the text  not the same: a new router mixes them without regard to modality
      expert in turn ("alternate")
    E -> c E experts, k -> c k        the same: each chosen expert's copies share its weight
    E -> c E experts, k as it was     not the same: a token's choices are copies of its best expert
    E -> fewer                        not the same: tokens of the experts left out go to others

New parameters are those that the target's recipe and seed would start with.
"""

from __future__ import annotations

import re
from typing import Literal

import torch
from torch import Tensor

from eve.config import Recipe
from eve.conversion.checkpoint import Checkpoint, Kind, Parameter
from eve.errors import UserError
from eve.model import parameter_shapes
from eve.model.initialisation import generator_for, initial_value
from eve.moe.hard_experts import KINDS

ExpertsFrom = Literal["alternate", "image", "text", "mean"]

_BLOCK = re.compile(r"^encoder\.blocks\.(\d+)\.(feed_forward\.experts|feed_forward\.router|norm2)\.(\w+)$")
_EXPERT = re.compile(r"^encoder\.blocks\.(\d+)\.feed_forward\.experts\.\w+\.\w+$")
# Where a row comes from: a parameter of the source, and its row; None: the whole of it.
Row = tuple[str, int | None]


class Upcycled(Checkpoint):
    """`source` as weights of the model of `recipe`.

    `experts_from` says what expert j of E' is made of, of the E there were: `alternate` expert j % E;
    `image` or `text` that expert of a bank by modality; `mean` the mean of all, or where E' of a learned
    router's experts are left, of those i with i % E' = j. A norm with weights for each modality becomes one
    of its rows, or for `alternate` and `mean` their mean.

    `noise` is added to the matrices of the experts, and to rows of a router that are copied: normal, by the
    given share of the tensor's standard deviation.
    """

    run = None

    def __init__(self, source: Checkpoint, recipe: Recipe, experts_from: ExpertsFrom, noise: float) -> None:
        self.where, self.tokenizer, self.step = source.where, source.tokenizer, source.step
        self.recipe = recipe
        self.parameters = tuple(
            Parameter(name, tuple(shape), 0) for name, shape in parameter_shapes(recipe.model).items()
        )
        self._source = source
        self._experts_from: ExpertsFrom = experts_from
        self._noise = noise
        self._shapes = {parameter.name: parameter.shape for parameter in source.parameters}
        # Raises where a parameter can be had from nowhere.
        self._makes = {parameter.name: self._how(parameter) for parameter in self.parameters}
        for name in self._shapes:
            if name not in self._makes and not self._is_left_out(name):
                raise UserError(f"{self.where} has {name}, the model of the recipe {recipe.name} has none")

    def _is_left_out(self, name: str) -> bool:
        """An expert of a hard router where now a learned one stands, be it copied or not."""
        match = _EXPERT.match(name)
        return match is not None and self.recipe.model.feed_forward_of(int(match[1])).router == "topk"

    def read(self, name: str, kind: Kind) -> Tensor:
        assert kind == "weight"
        sources = self._makes[name]
        if sources is None:
            model, shape = self.recipe.model, parameter_shapes(self.recipe.model)[name]
            value = initial_value(name, shape, self.recipe.seed, model.init_std, model.rescale_init)
            assert value is not None, name
            return value
        if not sources:
            return self._source.read(name, kind)
        made = torch.stack([self._mean(rows, kind) for rows in sources])
        if name.endswith(("norm2.weight", "norm2.bias")):
            return made[0]
        if self._noise and (made.ndim == 3 or ".router.weight" in name):
            generator = generator_for(self.recipe.seed, f"upcycling.{name}")
            one = self._source.read(sources[0][0][0], kind)
            made += torch.randn(made.shape, generator=generator) * (self._noise * float(one.std()))
        return made

    def _mean(self, rows: list[Row], kind: Kind) -> Tensor:
        tensors = [self._source.read(name, kind) for name, _ in rows]
        parts = [t if row is None else t[row] for t, (_, row) in zip(tensors, rows, strict=True)]
        return torch.stack(parts).mean(0) if len(parts) > 1 else parts[0]

    def _how(self, parameter: Parameter) -> list[list[Row]] | None:
        """For each row of the first dimension the rows that it is the mean of; empty: the tensor as it is;
        None: new."""
        name, shape = parameter.name, parameter.shape
        found = self._shapes.get(name)
        match = _BLOCK.match(name)
        after = self.recipe.model.feed_forward_of(int(match[1])).router if match else None
        if match and after == "topk":
            before = self._source.recipe.model.feed_forward_of(int(match[1])).router
            slot, dense = match[2], before != "topk"
            if dense and slot == "feed_forward.router":
                return None
            if dense and slot == "norm2" and found != shape:
                return self._rows([(name, row) for row in range(len(KINDS[before]))], 1, before)
            if dense and slot == "feed_forward.experts":
                # w1_EDF is made of w1_DF of each.
                single = match[3].replace("_E", "_")
                rows: list[Row] = [
                    (f"{name[: -len(match[3])]}{kind}.{single}", None) for kind in KINDS[before]
                ]
                found = self._shapes.get(rows[0][0])
                if found == shape[1:]:
                    return self._rows(rows, shape[0], before)
            per_expert = slot == "feed_forward.experts" or name.endswith("router.weight")
            if not dense and per_expert and found and found[1:] == shape[1:] and found != shape:
                return self._rows([(name, row) for row in range(found[0])], shape[0], before)
        if found != shape:
            raise UserError(
                f"{self.where}: {name} is {found or 'missing'}, the model of the recipe "
                f"{self.recipe.name} has {shape}; only a learned router and its experts may be new"
            )
        return []

    def _rows(self, rows: list[Row], after: int, before: str) -> list[list[Row]]:
        """Of which of `rows`, those of a router `before`, each of `after` is made."""
        dense, number = before != "topk", len(rows)
        if self._experts_from in ("image", "text"):
            if before not in ("modality", "fusion"):
                what = "one expert" if dense else f"{number} experts of a learned router"
                raise UserError(f"--experts-from {self._experts_from} is for banks by modality, found {what}")
            return [[rows[KINDS[before].index(self._experts_from)]]] * after
        if self._experts_from == "mean":
            if dense:
                return [rows] * after
            if after > number:
                raise UserError(f"--experts-from mean makes fewer experts, not {after} of {number}")
            return [rows[first::after] for first in range(after)]
        if dense and after == 1:
            # A norm of two modalities has no turns to take.
            return [rows]
        return [[rows[row % number]] for row in range(after)]
