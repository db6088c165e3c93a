"""What the stream hands to the model: a `Sample`, and the `Batch` that packs samples.

Shape suffixes: B sample, N packed text token (all samples of the batch one after another, no
padding), C channel, H height, W width. The suffix of an array decides how it is batched: a name
that ends in `_N` is concatenated, any other is stacked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eve.packing import to_device


@dataclass(frozen=True)
class Sample:
    """One image-text pair, image or text, decoded, augmented, tokenised and masked.

    `index` is the position of the sample in its source, `seed` the key of everything random that
    the model draws for it (dropout, drop path): a hash of (run seed, epoch, index), so that it does
    not depend on the machine. `tokens_N` holds [CLS] and [SEP]; `is_cut` says that the text has more than
    that. `masks` holds one dictionary of arrays for each stream that reads the source.
    """

    key: str
    epoch: int
    index: int
    seed: int
    image_CHW: np.ndarray | None = None
    tokens_N: np.ndarray | None = None
    text: str | None = None
    is_cut: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)
    masks: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)


# Draws the masks of one stream for a sample; the generator is seeded by (seed, epoch, sample, stream).
Masking = Callable[[Sample, np.random.Generator], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Batch:
    """Samples packed. `text_lengths` stays on the host: layouts are computed there, without a sync."""

    samples: list[Sample]
    seed_B: Tensor
    images_BCHW: Tensor | None
    tokens_N: Tensor | None
    text_lengths: list[int]
    masks: dict[str, dict[str, Tensor]]

    @property
    def size(self) -> int:
        return len(self.samples)

    def to(self, device: torch.device | str) -> Batch:
        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else to_device(tensor, device)

        return replace(
            self,
            seed_B=to_device(self.seed_B, device),
            images_BCHW=move(self.images_BCHW),
            tokens_N=move(self.tokens_N),
            masks={
                stream: {name: to_device(array, device) for name, array in arrays.items()}
                for stream, arrays in self.masks.items()
            },
        )


def collate(samples: Sequence[Sample]) -> Batch:
    """Packs samples of one source (all with an image or none, all with a text or none)."""
    first = samples[0]
    images = tokens = None
    if first.image_CHW is not None:
        images = torch.from_numpy(np.stack([sample.image_CHW for sample in samples]))  # pyright: ignore
    if first.tokens_N is not None:
        tokens = torch.from_numpy(np.concatenate([sample.tokens_N for sample in samples]))  # pyright: ignore
    return Batch(
        samples=list(samples),
        seed_B=torch.tensor([sample.seed for sample in samples], dtype=torch.int64),
        images_BCHW=images,
        tokens_N=tokens,
        text_lengths=[0 if sample.tokens_N is None else len(sample.tokens_N) for sample in samples],
        masks={
            stream: {
                name: torch.from_numpy(
                    (np.concatenate if name.endswith("_N") else np.stack)(
                        [sample.masks[stream][name] for sample in samples]
                    )
                )
                for name in first.masks[stream]
            }
            for stream in first.masks
        },
    )
