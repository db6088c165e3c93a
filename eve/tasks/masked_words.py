"""Masked words with the right image and with a wrong one: have image and text met?

The *grounding gain* is what the right image is worth: accuracy on the same masked words of the same
texts, minus the accuracy when each text comes with the image of another sample. Only places where
the model read [MASK] are counted: where a chosen word was left or replaced, what stands there helps.

Shape suffixes: B sample, K masked word, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from eve.data.batch import Batch, Sample, collate
from eve.errors import UserError
from eve.model import VisionLanguageModel
from eve.objectives.masked_text import MaskedText
from eve.tasks.report import Table, Value
from eve.tasks.statistics import Interval, bootstrap_ratio, derangement, sum_by_sample


@dataclass(frozen=True)
class WordOutcomes:
    """What became of every masked word: right or wrong (1 or 0), cross-entropy in nats, the true word and the
    sample it belongs to."""

    hit_K: np.ndarray
    loss_K: np.ndarray
    label_K: np.ndarray
    sample_K: np.ndarray


@dataclass(frozen=True)
class Grounding:
    """Of one cell. `gain` in accuracy, `gain_nats` in cross-entropy, both right minus wrong image in the
    direction that is better; per masked word, intervals over samples."""

    num_samples: int
    num_words: int
    accuracy: float
    loss: float
    accuracy_wrong_image: float
    loss_wrong_image: float
    unigram_accuracy: float
    unigram_loss: float
    gain: Interval
    gain_nats: Interval


def grounding(right: WordOutcomes, wrong: WordOutcomes, num_samples: int, seed: int) -> Grounding:
    """Compares the outcomes of the same words. The unigram predictor knows the frequencies of the masked
    words of the cell itself: the most frequent is its answer, their entropy its loss."""
    assert np.array_equal(right.label_K, wrong.label_K)
    assert np.array_equal(right.sample_K, wrong.sample_K)
    num_words = len(right.label_K)
    words_B = sum_by_sample(np.ones(num_words), right.sample_K, num_samples)
    share_V = np.bincount(right.label_K) / num_words
    share_V = share_V[share_V > 0]

    def gain(value_K: np.ndarray) -> Interval:
        return bootstrap_ratio(sum_by_sample(value_K, right.sample_K, num_samples), words_B, seed=seed)

    return Grounding(
        num_samples=num_samples,
        num_words=num_words,
        accuracy=float(right.hit_K.mean()),
        loss=float(right.loss_K.mean()),
        accuracy_wrong_image=float(wrong.hit_K.mean()),
        loss_wrong_image=float(wrong.loss_K.mean()),
        unigram_accuracy=float(share_V.max()),
        unigram_loss=float(-(share_V * np.log(share_V)).sum()),
        gain=gain(right.hit_K - wrong.hit_K),
        gain_nats=gain(wrong.loss_K - right.loss_K),
    )


def with_wrong_images(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """The same texts and masks, each with the image of another sample, and never of the same concept where
    the metadata has a `label`. Raises UserError where one label holds more than half of the samples."""
    order = derangement([sample.metadata.get("label") for sample in samples], seed)
    return [
        replace(sample, image_CHW=samples[other].image_CHW)
        for sample, other in zip(samples, order, strict=True)
    ]


@torch.no_grad()
def measure_words(
    model: VisionLanguageModel,
    objective: MaskedText,
    samples: Sequence[Sample],
    batch_size: int,
    mask_id: int,
) -> WordOutcomes:
    """Predicts the masked words of all samples. Raises UserError where no word reads [MASK]."""
    device = next(model.parameters()).device
    parts: list[tuple[np.ndarray, ...]] = []
    for start in range(0, len(samples), batch_size):
        batch = collate(samples[start : start + batch_size])
        hidden_K = torch.from_numpy(_reads_mask(batch, objective.name, mask_id)).to(device)
        prediction = objective.predict(model, batch.to(device))
        logits_KV, label_K = prediction.logits_KV[hidden_K], prediction.labels_K[hidden_K]
        hit_K = (logits_KV.argmax(-1) == label_K).double()
        loss_K = F.cross_entropy(logits_KV, label_K, reduction="none").double()
        sample_K = prediction.sample_K[hidden_K] + start
        parts.append(tuple(tensor.cpu().numpy() for tensor in (hit_K, loss_K, label_K, sample_K)))
    outcomes = WordOutcomes(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    if not len(outcomes.label_K):
        raise UserError(
            "no masked word of the held-out samples reads [MASK]; stream.mask_share must be above 0"
        )
    return outcomes


def _reads_mask(batch: Batch, stream: str, mask_id: int) -> np.ndarray:
    """bool (K,): of the chosen words of the batch, those where the model reads [MASK]."""
    masks = [sample.masks[stream] for sample in batch.samples]
    return np.concatenate([mask["input_N"][mask["position_N"]] == mask_id for mask in masks])


def word_tables(of_cell: dict[str, Grounding]) -> list[Table]:
    accuracy: list[list[Value]] = [
        [
            cell,
            g.num_samples,
            g.num_words,
            g.accuracy,
            g.accuracy_wrong_image,
            g.unigram_accuracy,
            g.gain,
        ]
        for cell, g in of_cell.items()
    ]
    loss: list[list[Value]] = [
        [cell, g.loss, g.loss_wrong_image, g.unigram_loss, g.gain_nats] for cell, g in of_cell.items()
    ]
    return [
        Table(
            "Masked words: accuracy (top 1) and grounding gain",
            ["cell", "texts", "words", "right image", "wrong image", "unigram", "grounding gain [95 %]"],
            accuracy,
            [
                "Words that read [MASK] only. Wrong image: of another sample, of another label where there "
                "are labels; same texts, same masks.",
                "Unigram: always the most frequent masked word of the cell itself. Intervals: paired "
                "bootstrap over samples.",
            ],
        ),
        Table(
            "Masked words: loss in nats and grounding gain",
            ["cell", "right image", "wrong image", "unigram", "grounding gain [95 %]"],
            loss,
            ["Unigram: the entropy of the masked words of the cell."],
        ),
    ]
