"""How fast a run goes: what the machine decides, and nothing of the result."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from eve.config import Model, Recipe, Stream
from eve.data.batch import Batch
from eve.parallel.topology import Topology
from eve.training.feed import StepData
from eve.training.flops import batch_flops, mfu
from eve.training.monitor import memory_gib


class Meter:
    """Speed between two log lines; nothing of it changes the result."""

    def __init__(self, recipe: Recipe, topology: Topology) -> None:
        self.recipe, self.topology = recipe, topology
        self._restart()

    def _restart(self) -> None:
        self.start = time.perf_counter()
        self.steps = 0
        # Of this rank: samples, tokens, operations, seconds of waiting for data.
        self.sums = [0.0, 0.0, 0.0, 0.0]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Checkpoints and pictures do not count as training."""
        start = time.perf_counter()
        yield
        self.start += time.perf_counter() - start

    def count(self, data: StepData) -> None:
        checkpointing = self.recipe.training.activation_checkpointing
        self.steps += 1
        self.sums[0] += data.num_samples
        self.sums[3] += data.seconds
        for stream, batch in data.passes:
            flops = batch_flops(self.recipe.model, stream, batch, checkpointing=checkpointing)
            self.sums[1] += num_tokens(self.recipe.model, stream, batch)
            self.sums[2] += flops.model

    def read(self) -> dict[str, float]:
        """Rates over all ranks since the last call. All ranks call it."""
        sums = self.sums if self.topology.is_counted else [0.0] * len(self.sums)
        sums = torch.tensor(sums, dtype=torch.float64, device=self.topology.device)
        samples, tokens, operations, waiting = self.topology.all_reduce_sum(sums).tolist()
        seconds = time.perf_counter() - self.start
        timing = {
            "pairs_per_second": samples / seconds,
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds / self.steps,
            "data_seconds": waiting / self.topology.data / self.steps,
            "tflops": operations / seconds / 1e12,
            "memory_gib": memory_gib(self.topology.device),
        }
        if self.topology.device.type == "cuda":
            share = mfu(
                operations,
                seconds,
                self.topology.world_size,
                torch.cuda.get_device_name(self.topology.device),
            )
            if share is not None:
                timing["mfu"] = share
        self._restart()
        return timing


def num_tokens(model: Model, stream: Stream, batch: Batch) -> int:
    """Tokens that enter the encoder: visible patches, one class token an image, and the words; those of
    matching are three pairs for each."""
    tokens = sum(batch.text_lengths)
    if batch.images_BCHW is not None:
        visible = batch.masks[stream.name].get("visible_V")
        num_visible = model.num_patches if visible is None else visible.shape[1]
        tokens += batch.size * (1 + num_visible)
    return tokens * {"matching": 3, "contrast_matching": 4}.get(stream.objective, 1)
