"""What every source of a conversion gives: the parameters of a model, whole, by their names on one device."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from eve.config import Recipe

# A weight in fp32, and the two moments that AdamW keeps of it.
Kind = Literal["weight", "exp_avg", "exp_avg_sq"]
MOMENTS: tuple[Kind, Kind] = ("exp_avg", "exp_avg_sq")

# Of more than one dimension and yet without weight decay: tables, gains and biases.
_NO_DECAY = re.compile(
    r"(type_embedding|\.position|\.word\.weight|norm\d?\.(weight|bias)|modality_vector|table_TRH"
    r"|\.b1_E?F|\.b2_E?D)$"
)


@dataclass(frozen=True)
class Parameter:
    """`shape` is that of one device. `step` counts the updates of its moments; None: it does not learn."""

    name: str
    shape: tuple[int, ...]
    step: int | None

    @property
    def learns(self) -> bool:
        return self.step is not None

    @property
    def decays(self) -> bool:
        """Whether AdamW decays it, as eve/training/optimizer.py decides on the modules."""
        return len(self.shape) > 1 and not _NO_DECAY.search(self.name)


@dataclass(frozen=True)
class Run:
    """What a checkpoint holds beside its tensors, for training to go on.

    `state` is the state.json of eve/training/loop.py, `counters` the engine's own; `metrics` are the lines
    that the run had written by then.
    """

    state: dict[str, Any]
    counters: dict[str, int]
    metrics: bytes = b""


class Checkpoint(ABC):
    """`parameters` stand in the order of the model's modules. `run` is None where there are weights only."""

    where: Path
    recipe: Recipe
    tokenizer: bytes
    step: int
    parameters: tuple[Parameter, ...]
    run: Run | None

    @abstractmethod
    def read(self, name: str, kind: Kind) -> Tensor:
        """The whole tensor in fp32; moments of a parameter that learns only."""

    def copies_agree(self, name: str, weight: Tensor) -> bool:
        """Whether what else there is of a weight, cut or rounded, is that of the whole one in fp32."""
        return True
