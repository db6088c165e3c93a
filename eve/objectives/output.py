"""What every objective returns, and the interface the training loop calls.

An objective is a loss over `units` (masked patches, masked words, pairs). A step's loss is the mean over
the units of all its micro-batches and ranks, so it does not depend on how the batch was cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from eve.data.batch import Batch, Masking
from eve.data.tokenizer import Tokenizer
from eve.model import VisionLanguageModel
from eve.model.encoder import EncoderOutput
from eve.moe.plan import RouterStats


@dataclass(frozen=True)
class ObjectiveOutput:
    """`loss` has the gradient; `metrics` are (sum, count) pairs, detached, to be added over
    micro-batches and ranks before they are divided."""

    loss: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]]
    router_stats: list[RouterStats] = field(default_factory=list)


class Objective(Protocol):
    """`name` is the stream's: the key of its masks in the batch."""

    name: str

    def masking(self, tokenizer: Tokenizer | None) -> Masking:
        """What draws this objective's masks, in the worker processes of the stream."""
        ...

    def units(self, batch: Batch) -> Tensor:
        """fp32, on the batch's device: the number of things that the loss of this micro-batch is a sum
        over; a vector where the loss has several parts."""
        ...

    def __call__(
        self, model: VisionLanguageModel, batch: Batch, units: Tensor, aux_weight: float
    ) -> ObjectiveOutput:
        """`units`: (units of the whole step over all ranks) / (number of ranks). `aux_weight`: what
        the auxiliary losses of the routers are multiplied by, 1 / (number of their forward passes)."""
        ...


def with_routing(
    loss: Tensor,
    metrics: dict[str, tuple[Tensor, Tensor]],
    encoded: EncoderOutput | Sequence[EncoderOutput],
    aux_weight: float,
) -> ObjectiveOutput:
    """`encoded`: of each pass through the encoder; the auxiliary loss is the mean over them."""
    passes = [encoded] if isinstance(encoded, EncoderOutput) else encoded
    aux_loss = torch.stack([encoded.aux_loss() for encoded in passes]).mean()
    return ObjectiveOutput(
        loss=loss + aux_weight * aux_loss,
        metrics=metrics,
        router_stats=[routing.stats for encoded in passes for routing in encoded.routing],
    )


class PretrainModule(nn.Module):
    """Model and objectives as the one module whose forward the engine runs."""

    def __init__(self, model: VisionLanguageModel, objectives: dict[str, Objective]):
        super().__init__()
        self.model = model
        self.objectives = objectives

    def forward(self, stream: str, batch: Batch, units: Tensor, aux_weight: float = 1.0) -> ObjectiveOutput:
        return self.objectives[stream](self.model, batch, units, aux_weight)
