"""All layouts of a recipe on so many devices, each with its cost, and the one to take."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

from eve.config import Recipe, Stage
from eve.errors import UserError
from eve.planning.layout import Layout, Pass, check_layout, passes_of
from eve.planning.memory import Memory, memory_of
from eve.planning.step_time import Assumptions, Gpu, StepTime, step_time
from eve.planning.traffic import Transfer, transfers
from eve.planning.weights import ModelWeights, Weights
from eve.training.ds_config import routing_group

Choice = TypeVar("Choice", int, bool)

# Of two layouts whose predicted time differs by less, the simpler one is taken.
EQUAL = 0.05


@dataclass(frozen=True)
class Plan:
    layout: Layout
    weights: Weights
    passes: list[Pass]
    memory: Memory
    transfers: list[Transfer]
    time: StepTime
    samples: int
    fits: bool

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.time.total

    @property
    def complexity(self) -> tuple[int, ...]:
        layout = self.layout
        crossing = layout.expert > layout.host
        experts = (crossing, layout.expert)
        return layout.tensor, layout.checkpointing, *experts, layout.zero_stage, -layout.micro_batch


@dataclass(frozen=True)
class Fixed:
    """What the user has decided; None is free."""

    tensor: int | None = None
    sequence: bool | None = None
    expert: int | None = None
    zero_stage: int | None = None
    micro_batch: int | None = None
    checkpointing: bool | None = None


class Planner:
    def __init__(
        self, recipe: Recipe, stage: Stage, gpu: Gpu, gpus: int, host: int, given: Assumptions
    ) -> None:
        if gpus > host and gpus % host:
            raise UserError(f"--gpus {gpus} is not a multiple of --gpus_per_host {host}")
        self.recipe, self.stage, self.given = recipe, stage, given
        self.gpu, self.gpus, self.host = gpu, gpus, min(host, gpus)
        self.weights = ModelWeights(recipe, stage)
        self.samples = sum(
            recipe.data.sources[name].batch_size for name in {stream.source for stream in stage.streams}
        )

    def cost(self, layout: Layout) -> Plan:
        """Raises UserError where a run with this layout would be refused."""
        check_layout(layout, self.recipe, self.stage)
        model = self.recipe.model
        weights = self.weights.count(layout)
        passes = passes_of(layout, self.recipe, self.stage, self.given.text_length)
        memory = memory_of(model, layout, weights, passes)
        found = transfers(model, layout, weights, passes)
        time = step_time(model, layout, weights, passes, found, self.gpu, self.given)
        fits = memory.total <= self.gpu.memory
        return Plan(layout, weights, passes, memory, found, time, self.samples, fits)

    def all(self, fixed: Fixed) -> tuple[list[Plan], dict[str, Layout]]:
        """Every layout that is possible, fastest first; and why others are not, each reason with the first
        layout it is true of. Raises UserError, with the first reason, where none is possible."""
        plans: list[Plan] = []
        refused: dict[str, Layout] = {}
        for layout in self._candidates(fixed):
            try:
                plans.append(self.cost(layout))
            except UserError as error:
                refused.setdefault(str(error), layout)
        if not plans:
            raise UserError(next(iter(refused)))
        return sorted(plans, key=lambda plan: plan.time.total), refused

    def _candidates(self, fixed: Fixed) -> Iterator[Layout]:
        pools = [ff.num_experts for ff in self.recipe.model.feed_forward if ff.router == "topk"]
        common = math.gcd(self.gpus, *pools) if pools else 1
        for tensor, sequence, expert, zero_stage, again in product(
            _free(fixed.tensor, [n for n in (1, 2, 4, 8) if self.host % n == 0]),
            _free(fixed.sequence, [True]),
            _free(fixed.expert, [n for n in range(1, common + 1) if common % n == 0]),
            _free(fixed.zero_stage, [1, 2] if pools else [1, 2, 3]),
            _free(fixed.checkpointing, [False, True]),
        ):
            # What cannot be is left out here, but said where the user asks for it.
            if fixed.expert is None and expert > 1 and expert % tensor:
                continue
            if fixed.zero_stage is None and zero_stage == 3 and tensor > 1:
                continue
            for micro_batch in _free(fixed.micro_batch, self._micro_batches(tensor)):
                yield Layout(
                    gpus=self.gpus,
                    host=self.host,
                    tensor=tensor,
                    sequence=sequence and tensor > 1,
                    expert=expert,
                    zero_stage=zero_stage,
                    micro_batch=micro_batch,
                    checkpointing=again,
                )

    def _micro_batches(self, tensor: int) -> list[int]:
        """Those that divide the share of every source and are whole groups of the learned routers."""
        sizes = {self.recipe.data.sources[stream.source].batch_size for stream in self.stage.streams}
        share = math.gcd(*sizes) * tensor // self.gpus
        unit = routing_group(self.recipe)
        # The smallest stands for "refused" where none is possible.
        return [n for n in range(unit, share + 1, unit) if share % n == 0] or [unit]


def _free(decided: Choice | None, others: list[Choice]) -> list[Choice]:
    return others if decided is None else [decided]


def best(plans: list[Plan]) -> Plan:
    """The simplest of those that fit and are about as fast as the fastest. Raises UserError if
    none fits."""
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        least = min(plans, key=lambda plan: plan.memory.total)
        moments = least.memory.optimizer + least.memory.expert_optimizer
        raise UserError(
            f"no layout fits: the smallest needs {least.memory.total / 2**30:.1f} GiB on each GPU "
            f"({least.layout.describe()}), {moments / 2**30:.1f} of which a "
            "ds_configs/*_offload.json would keep on the host"
        )
    limit = min(plan.time.total for plan in fitting) * (1 + EQUAL)
    return min(
        (plan for plan in fitting if plan.time.total <= limit),
        key=lambda plan: (plan.complexity, plan.time.total),
    )
