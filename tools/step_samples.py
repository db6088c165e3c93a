"""Batches to measure a step with: held-out pairs of the recipe where it has them, else generated ones.

Shape suffixes: V vocabulary, N token of one text; C channel, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import cast

import numpy as np
import torch

from eve.config import Recipe
from eve.data.batch import Batch, Sample, collate
from eve.data.tokenizer import SPECIALS, Tokenizer
from eve.errors import UserError
from eve.objectives import build_objective
from tools.benchmark_step import held_out_samples

CAPTION_TOKENS = (8, 20)  # [CLS] and [SEP] included


@dataclass(frozen=True)
class GeneratedVocabulary:
    """What masking needs of a tokenizer; every third piece begins a word."""

    vocab_size: int

    @property
    def mask_id(self) -> int:
        return SPECIALS.index("[MASK]")

    @property
    def special_V(self) -> np.ndarray:
        return np.arange(self.vocab_size) < len(SPECIALS)

    @property
    def word_start_V(self) -> np.ndarray:
        return np.arange(self.vocab_size) % 3 == 0


def generated_samples(recipe: Recipe, indices: range) -> list[Sample]:
    """Noise for pictures, and captions of random words; from the recipe's seed and the sample's index."""
    model, stage = recipe.model, recipe.stages[0]
    vocabulary = cast(Tokenizer, GeneratedVocabulary(model.vocab_size))
    codes = recipe.data.visual_tokenizer
    maskings = {
        s.name: build_objective(s, model, visual_tokenizer=codes).masking(vocabulary) for s in stage.streams
    }
    shortest, longest = (min(tokens, model.max_text_length) for tokens in CAPTION_TOKENS)
    cls, sep = SPECIALS.index("[CLS]"), SPECIALS.index("[SEP]")
    samples = []
    for index in indices:
        rng = np.random.default_rng([recipe.seed, index])
        words = rng.integers(len(SPECIALS), model.vocab_size, rng.integers(shortest, longest + 1) - 2)
        image = rng.integers(0, 256, (3, model.image_size, model.image_size), dtype=np.uint8)
        sample = Sample(
            str(index),
            0,
            index,
            index,
            image_CHW=image,
            tokens_N=np.array([cls, *words, sep], dtype=np.int64),
        )
        masks = {name: masking(sample, rng) for name, masking in maskings.items()}
        samples.append(Sample(**{**vars(sample), "masks": masks}))
    return samples


class Samples:
    """Batches of any size on the device; the first `limit` real samples, repeated where they are too few."""

    def __init__(self, recipe: Recipe, device: torch.device, limit: int = 4096):
        self.recipe, self.device = recipe, device
        self.samples: list[Sample] = []
        try:
            tokenizer = Tokenizer.load(recipe.data.tokenizer)
            self.samples = list(islice(held_out_samples(recipe, tokenizer), limit))
            self.kind = f"{len(self.samples)} real pairs"
        except UserError as error:
            self.kind = (
                f"generated pictures and captions of {CAPTION_TOKENS[0]} to {CAPTION_TOKENS[1]} tokens"
            )
            self.kind += f" ({error})"
        self.real = bool(self.samples)

    def batch(self, size: int, number: int = 0) -> Batch:
        first, last = number * size, (number + 1) * size
        if not self.real and len(self.samples) < last:
            self.samples += generated_samples(self.recipe, range(len(self.samples), last))
        chosen = [self.samples[index % len(self.samples)] for index in range(first, last)]
        return collate(chosen).to(self.device)
