"""What to hide: random and block-wise patches, tokens and whole words.

Pure functions of (shape, ratio, generator), and the picklable `Masking` objects that worker
processes call for each sample. The number of masked patches of an image is always the same, so
that a batch is rectangular. Shape suffixes: P patch, V visible, M masked, N token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eve.config import Stream
from eve.data.batch import Sample

# Least area of a block: of EVE's masks, and of BEiT's, in patches of its grid.
EVE_BLOCK_MIN = 4
BEIT_BLOCK_MIN, BEIT_PATCHES = 16, 14 * 14


def num_masked_patches(num_patches: int, ratio: float) -> int:
    """MAE keeps int(P * (1 - ratio)) of P > 1 patches; at least one is kept and one masked."""
    return min(num_patches - 1, max(1, num_patches - int(num_patches * (1 - ratio))))


def random_patches(num_patches: int, num_masked: int, rng: np.random.Generator) -> np.ndarray:
    """bool_P: uniformly random, exactly `num_masked` true (MAE)."""
    masked_P = np.zeros(num_patches, dtype=bool)
    masked_P[rng.permutation(num_patches)[:num_masked]] = True
    return masked_P


def block_patches(
    grid: tuple[int, int],
    num_masked: int,
    rng: np.random.Generator,
    *,
    min_patches: int = 4,
    max_patches: int | None = None,
    min_aspect: float = 0.3,
    max_aspect: float | None = None,
    exact: bool = True,
) -> np.ndarray:
    """bool_P: rectangles until `num_masked` are true (BEiT, Bao et al. 2022; arguments as `rectangles`).

    BEiT stops after ten misses in a row: it may mask fewer, in a third of the draws of 75 of 14 x 14. `exact`
    adds what is missing as single patches, drawn uniformly (BEiT v2).
    """
    masked = np.zeros(grid, dtype=bool)
    for top, left, height, width in rectangles(
        grid,
        num_masked,
        rng,
        min_patches=min_patches,
        max_patches=max_patches,
        min_aspect=min_aspect,
        max_aspect=max_aspect,
    ):
        masked[top : top + height, left : left + width] = True
    masked_P = masked.ravel()
    if exact:
        missing = num_masked - int(masked_P.sum())
        masked_P[rng.permutation(np.flatnonzero(~masked_P))[:missing]] = True
    return masked_P


def rectangles(
    grid: tuple[int, int],
    num_masked: int,
    rng: np.random.Generator,
    *,
    min_patches: int,
    max_patches: int | None,
    min_aspect: float,
    max_aspect: float | None,
) -> list[tuple[int, int, int, int]]:
    """BEiT's blocks as (top, left, height, width) in the order in which they are placed.

    The area is uniform between `min_patches` and the missing number (or `max_patches`, if that is less), also
    where the former is larger; the aspect is log-uniform in [min_aspect, max_aspect or 1 / min_aspect]. A
    block is smaller than the grid in both directions; it is placed if it adds at least one patch and at most
    that number, and ten misses in a row are the end.
    """
    masked = np.zeros(grid, dtype=bool)
    log_aspect = math.log(min_aspect), math.log(max_aspect or 1 / min_aspect)
    placed: list[tuple[int, int, int, int]] = []
    misses = 0
    while (missing := num_masked - int(masked.sum())) > 0 and misses < 10:
        most = missing if max_patches is None else min(missing, max_patches)
        area = rng.uniform(min(min_patches, most), max(min_patches, most))
        aspect = math.exp(rng.uniform(*log_aspect))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        misses += 1
        if not (0 < height < grid[0] and 0 < width < grid[1]):
            continue
        top = int(rng.integers(0, grid[0] - height + 1))
        left = int(rng.integers(0, grid[1] - width + 1))
        window = masked[top : top + height, left : left + width]
        if 0 < window.size - int(window.sum()) <= most:
            window[:] = True
            placed.append((top, left, height, width))
            misses = 0
    return placed


def masked_patches(masked_BM: Tensor, num_patches: int) -> Tensor:
    """bool (B, P): true at the patches of that index."""
    masked_BP = torch.zeros(len(masked_BM), num_patches, dtype=torch.bool, device=masked_BM.device)
    return masked_BP.scatter_(1, masked_BM, True)


@dataclass(frozen=True)
class ImageMasking:
    """-> {"visible_V", "masked_M"}: int64 patch indices in ascending order.

    `block_min`: least area from which a block is drawn.
    """

    side: int
    ratio: float
    kind: str
    block_min: int = EVE_BLOCK_MIN

    @classmethod
    def of(cls, stream: Stream, side: int) -> ImageMasking:
        """That of a stream, for pictures of side * side patches."""
        block_min = stream.image_block_min or EVE_BLOCK_MIN
        if stream.image_block_min is None and stream.image_target == "codes":
            block_min = max(EVE_BLOCK_MIN, round(BEIT_BLOCK_MIN * side**2 / BEIT_PATCHES))
        return cls(side, stream.image_ratio, stream.image_masking, block_min)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> dict[str, np.ndarray]:
        num_masked = num_masked_patches(self.side**2, self.ratio)
        if self.kind == "block":
            masked_P = block_patches((self.side, self.side), num_masked, rng, min_patches=self.block_min)
        else:
            masked_P = random_patches(self.side**2, num_masked, rng)
        return {"visible_V": np.flatnonzero(~masked_P), "masked_M": np.flatnonzero(masked_P)}


@dataclass(frozen=True, eq=False)
class TextMasking:
    """-> {"input_N", "position_N", "target_N"}, all int64: the corrupted text, the places that were
    chosen and what stood there.

    Of n maskable tokens (all but the special ones) max(1, round(ratio * n)) are chosen; in `word`
    mode whole words in random order, up to the word that would pass that number by more than half of
    itself (skipping it would spare long words). Of the chosen, `mask_share` become [MASK],
    `random_share` a random ordinary token, the rest stays as it is (BERT).
    """

    ratio: float
    kind: str
    mask_share: float
    random_share: float
    mask_id: int
    special_V: np.ndarray
    word_start_V: np.ndarray

    def __call__(self, sample: Sample, rng: np.random.Generator) -> dict[str, np.ndarray]:
        tokens_N = sample.tokens_N
        assert tokens_N is not None
        # [UNK] is special but stands for a word.
        maskable = np.arange(1, len(tokens_N) - 1)
        number = max(1, round(self.ratio * len(maskable))) if len(maskable) else 0
        if self.kind == "word":
            chosen = self._whole_words(tokens_N, maskable, number, rng)
        else:
            chosen = rng.permutation(maskable)[:number]
        chosen = np.sort(chosen)
        corrupted_N = tokens_N.copy()
        fate = rng.random(len(chosen))
        ordinary = np.flatnonzero(~self.special_V)
        noise = ordinary[rng.integers(0, len(ordinary), len(chosen))]
        corrupted_N[chosen] = np.where(
            fate < self.mask_share,
            self.mask_id,
            np.where(fate < self.mask_share + self.random_share, noise, tokens_N[chosen]),
        )
        return {"input_N": corrupted_N, "position_N": chosen, "target_N": tokens_N[chosen]}

    def _whole_words(
        self, tokens_N: np.ndarray, maskable: np.ndarray, number: int, rng: np.random.Generator
    ) -> np.ndarray:
        if not len(maskable):
            return maskable
        starts = self.word_start_V[tokens_N[maskable]].copy()
        starts[0] = True
        words = np.split(maskable, np.flatnonzero(starts)[1:])
        chosen: list[int] = []
        for index in rng.permutation(len(words)):
            # The first word always: no text goes without a loss.
            if chosen and len(chosen) + len(words[index]) / 2 > number:
                break
            chosen.extend(words[index])
        return np.asarray(chosen, dtype=np.int64)


@dataclass(frozen=True)
class PairMasking:
    """Both inputs of a pair at once."""

    image: ImageMasking
    text: TextMasking

    def __call__(self, sample: Sample, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {**self.image(sample, rng), **self.text(sample, rng)}
