"""From the sources of a stage to the forward passes of a step.

Every stream of the stage that reads a source gets the same samples of it; a source is cut into
micro-batches once, and each is packed once. The first all-reduce of a step is here too: it tells each
rank what the whole step counts (`units`), and that some rank wants to stop or has no data.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eve.config import Recipe, Stage, Stream
from eve.data.batch import Batch, collate
from eve.data.loader import SourceStream
from eve.data.tokenizer import Tokenizer
from eve.errors import UserError
from eve.objectives import Objective
from eve.packing import to_device
from eve.parallel.topology import Topology
from eve.training.ds_config import StepPlan


@dataclass(frozen=True)
class StepData:
    """One step of this rank, on the host.

    Attributes:
        passes: the forward passes in order.
        units: of each stream, what its loss is a mean over: the sum over the passes and shares of the step,
            over the number of shares. On the device.
        flags: on the device: (ranks that want to stop, ranks without data, groups of tensor ranks whose
            samples are not the same).
        states: the position of each source after this step, for this rank's readers.
        seconds: time spent waiting for samples.
    """

    passes: list[tuple[Stream, Batch]]
    units: dict[str, Tensor]
    flags: Tensor
    states: dict[str, Any]
    num_samples: int
    seconds: float


class StepFeed:
    """Steps of one stage; `states` are merged over ranks, as SourceStream.load_state takes them."""

    def __init__(
        self,
        recipe: Recipe,
        stage: Stage,
        plan: StepPlan,
        tokenizer: Tokenizer,
        objectives: Mapping[str, Objective],
        topology: Topology,
        states: Mapping[str, Any],
    ) -> None:
        self.stage, self.plan, self.objectives, self.topology = stage, plan, objectives, topology
        self.error: UserError | None = None
        self._states: dict[str, Any] = {}
        # Iterators of SourceStream, which have a `close` besides.
        self._sources: dict[str, Any] = {}
        for name in stage.sources:
            source = recipe.data.sources[name]
            stream = SourceStream(
                source,
                recipe.data,
                seed=recipe.seed,
                image_size=recipe.model.image_size,
                max_text_length=source.max_text_length or recipe.model.max_text_length,
                tokenizer=tokenizer,
                maskings={
                    stream.name: objectives[stream.name].masking(tokenizer)
                    for stream in stage.streams
                    if stream.source == name
                },
                rank=topology.data_rank,
                num_ranks=topology.data,
                num_workers=recipe.training.num_workers,
            )
            if name in states:
                stream.load_state(states[name])
            self._sources[name] = iter(stream)

    def next(self, step: int, *, stop: bool) -> StepData:
        """Step number `step` of the stage, from 0. `stop`: this rank wants no more. All ranks call it.

        Where this rank's data fails the error is kept in `error`, and the flags tell all ranks.
        """
        start = time.perf_counter()
        passes: list[tuple[Stream, Batch]] = []
        num_samples = 0
        try:
            batches: dict[str, list[Batch]] = {}
            for name in self.stage.sources_of(step):
                samples, self._states[name] = next(self._sources[name])
                num_samples += len(samples)
                size = self.plan.micro_batch[name]
                batches[name] = [collate(samples[i : i + size]) for i in range(0, len(samples), size)]
            for number in range(max(len(cut) for cut in batches.values())):
                for stream in self.stage.streams:
                    if number < len(batches.get(stream.source, ())):
                        passes.append((stream, batches[stream.source][number]))
        except UserError as error:
            self.error = error
        sums: dict[str, Tensor] = {}
        for stream, batch in passes:
            units = self.objectives[stream.name].units(batch)
            sums[stream.name] = sums[stream.name] + units if stream.name in sums else units
        seconds = time.perf_counter() - start
        samples = [(sample.key, sample.epoch) for _, batch in passes for sample in batch.samples]
        return StepData(passes, *self._agree(sums, stop, samples), dict(self._states), num_samples, seconds)

    def _agree(
        self, sums: dict[str, Tensor], stop: bool, samples: list[tuple[str, int]]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """One small all-reduce for all that ranks have to agree on; (units, flags) of StepData."""
        topology = self.topology
        flags = torch.tensor([float(stop), float(self.error is not None)])
        # Tensor ranks read for themselves. Of each group, a sum of whole numbers, 0 where they read alike.
        differing = torch.zeros(topology.data if topology.tensor > 1 else 0)
        if topology.tensor > 1:
            digest = zlib.crc32(repr(samples).encode()) % (1 << 24) // topology.tensor
            differing[topology.data_rank] = digest * (topology.tensor - 1) if topology.is_counted else -digest
        sizes = {stream.name: _num_units(stream) for stream in self.stage.streams}
        parts = [sums.get(name, torch.zeros(size)).reshape(-1) for name, size in sizes.items()]
        if not self.topology.is_counted:
            parts = [torch.zeros_like(part) for part in parts]
        vector = to_device(torch.cat([*parts, flags, differing]), topology.device)
        lengths = [*sizes.values(), len(flags), len(differing)]
        *parts, flags, differing = topology.all_reduce_sum(vector).split(lengths)
        flags = torch.cat([flags, differing.count_nonzero()[None].to(flags.dtype)])
        per_rank = [part / self.topology.data for part in parts]
        units = {
            name: part if size > 1 else part[0]
            for (name, size), part in zip(sizes.items(), per_rank, strict=True)
        }
        return units, flags

    def close(self) -> None:
        """Ends the worker processes."""
        for source in self._sources.values():
            source.close()


def _num_units(stream: Stream) -> int:
    """Parts of the stream's loss: a masked pair counts patches and words."""
    return 2 if stream.objective == "masked_pair" else 1
