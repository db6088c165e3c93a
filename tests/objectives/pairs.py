"""Pairs and a small VLMo for the tests of contrast and matching."""

from __future__ import annotations

import numpy as np

from eve.config import Contrast, FeedForward, Matching, Model, Stream
from eve.data.batch import Sample

CONFIG = Model(
    image_size=12,
    patch_size=4,
    width=24,
    depth=3,
    heads=3,
    hidden=40,
    vocab_size=50,
    max_text_length=12,
    text_positions=16,
    init_std=0.3,
    drop_path=0.0,
    text_dropout=0.0,
    absolute_positions=False,
    relative_positions="blocks",
    text_norm="after_positions",
    decoder=None,
    contrast=Contrast(width=16, paths=("modality", "fusion"), initial_temperature=0.5),
    matching=Matching(),
    feed_forward=(
        FeedForward(blocks=(0, 1), router="modality"),
        FeedForward(blocks=(2,), router="fusion"),
    ),
)


def stream(objective: str, **more) -> Stream:
    return Stream(name="pairs", source="pairs", objective=objective, **more)  # pyright: ignore


def make_samples(number: int) -> list[Sample]:
    """Texts of different lengths. The metadata field `thing` is alike of 1 and 3, the captions of 0 and 4."""
    draw = np.random.default_rng(5)
    samples = []
    for i in range(number):
        words = draw.integers(5, 50, draw.integers(2, 9))
        tokens = samples[0].tokens_N if i == 4 else np.concatenate([[1], words, [2]])
        image = draw.integers(0, 256, (3, 12, 12), dtype=np.uint8)
        thing = {"thing": "same" if i in (1, 3) else f"thing {i}"}
        samples.append(Sample(f"k{i}", 0, i, int(draw.integers(1 << 60)), image, tokens, metadata=thing))
    return samples
