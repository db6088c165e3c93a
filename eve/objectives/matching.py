"""Image-text matching (ITM; ALBEF, VLMo): fused, does this image belong to this text?

Each pair gives three examples: itself, its text with a hard negative image, its image with a hard negative
text. Hard negatives are drawn from the softmax of the contrast's logits over the pool (flattened by
Stream.negative_hardness), never from the pair's positives (same image or equal caption); without contrast all
others are as likely.

The host waits for the device once: it has to know which texts were drawn, as their lengths lay out the packed
batch. Shape suffixes: B sample of this rank, N sample of the pool, X example (3 B), L longest text, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eve import random
from eve.data.batch import Batch
from eve.model import VisionLanguageModel
from eve.model.encoder import EncoderOutput
from eve.objectives.contrast import OfWholePairs, compare, pair_loss, positives_in_pool
from eve.objectives.output import ObjectiveOutput, with_routing
from eve.objectives.pool import Pool
from eve.packing import to_device

# Of random.mix; far from the counters of the model. The fused passes take those from _FUSED on.
_NEGATIVE_IMAGE, _NEGATIVE_TEXT, _FUSED = (1 << 40) + 1, (1 << 40) + 2, (1 << 40) + 3


def negative_weights(logits_BN: Tensor, excluded_BN: Tensor) -> Tensor:
    """(B, N): what negatives are drawn by, not of sum 1: softmax of the logits, 0 where excluded (VLMo)."""
    return logits_BN.softmax(-1).masked_fill(excluded_BN, 0.0)


def draw_negatives(logits_BN: Tensor, excluded_BN: Tensor, seed_B: Tensor) -> tuple[Tensor, Tensor]:
    """One sample of the pool for each row by `negative_weights`: (int64 (B,), bool (B,): there was one).

    The largest of logit + Gumbel noise is a draw from the softmax. The noise is a hash of (seed of the row,
    number in the pool), so a draw does not depend on the machine, and no weight is too small to be drawn.
    """
    number_N = torch.arange(logits_BN.shape[1], device=logits_BN.device)
    noise_BN = random.gumbel(seed_B[:, None], number_N)
    score_BN = (logits_BN.float() + noise_BN).masked_fill(excluded_BN, -torch.inf)
    return score_BN.argmax(-1), ~excluded_BN.all(-1)


@dataclass(frozen=True)
class Drawn:
    """Negatives of this rank's pairs, by number in the pool, and whether there are any."""

    image_B: Tensor
    text_B: Tensor
    has_image_B: Tensor
    has_text_B: Tensor


def draw(image_to_text_BN: Tensor, text_to_image_BN: Tensor, excluded_BN: Tensor, seed_B: Tensor) -> Drawn:
    image_B, has_image_B = draw_negatives(text_to_image_BN, excluded_BN, random.mix(seed_B, _NEGATIVE_IMAGE))
    text_B, has_text_B = draw_negatives(image_to_text_BN, excluded_BN, random.mix(seed_B, _NEGATIVE_TEXT))
    return Drawn(image_B, text_B, has_image_B, has_text_B)


@dataclass(frozen=True)
class Examples:
    """Three pairs of each: as they are, with a negative image, with a negative text.

    `counts_X` is 0 where there was no negative to draw, and the pair stands again; `number` counts the
    others over the whole pool.
    """

    images_XCHW: Tensor
    tokens_N: Tensor
    text_lengths: list[int]
    seed_X: Tensor
    counts_X: Tensor
    label_X: Tensor
    number: int


def make_examples(batch: Batch, drawn: Drawn, pool: Pool) -> Examples:
    """Brings the negatives from their ranks; each pixel and word that is sent is used."""
    images, tokens, size = batch.images_BCHW, batch.tokens_N, batch.size
    assert images is not None
    assert tokens is not None
    device = tokens.device
    lengths_B = to_device(torch.tensor(batch.text_lengths), device)
    facts_B5 = torch.stack([drawn.image_B, drawn.text_B, lengths_B, drawn.has_image_B, drawn.has_text_B], 1)
    facts = np.asarray(pool.gather(facts_B5).tolist())  # the wait
    wanted_images, wanted_texts = (facts[:, i].reshape(pool.size, size) for i in (0, 1))
    negative_lengths = facts[wanted_texts[pool.rank], 2].tolist()
    longest = int(facts[:, 2].max())
    padded_BL = tokens.new_zeros(size, longest)
    padded_BL.view(-1)[_slots(batch.text_lengths, longest, device)] = tokens
    fetched_BL = pool.fetch(padded_BL, wanted_texts)
    negative_tokens = fetched_BL.flatten()[_slots(negative_lengths, longest, device)]
    seeds = [random.mix(batch.seed_B, _FUSED + part) for part in range(3)]
    ones_B = torch.ones(size, device=device)
    return Examples(
        images_XCHW=torch.cat([images, pool.fetch(images, wanted_images), images]),
        tokens_N=torch.cat([tokens, tokens, negative_tokens]),
        text_lengths=[*batch.text_lengths, *batch.text_lengths, *negative_lengths],
        seed_X=torch.cat(seeds),
        counts_X=torch.cat([ones_B, drawn.has_image_B.float(), drawn.has_text_B.float()]),
        label_X=torch.cat([ones_B, ones_B * 0, ones_B * 0]).long(),
        number=len(facts) + int(facts[:, 3:].sum()),
    )


def _slots(lengths: list[int], longest: int, device: torch.device) -> Tensor:
    """Where each of the packed tokens stands in rows of `longest`."""
    starts = np.cumsum(lengths) - lengths
    rows = np.repeat(np.arange(len(lengths)), lengths)
    within = np.arange(sum(lengths)) - np.repeat(starts, lengths)
    return to_device(torch.from_numpy(rows * longest + within), device)


def matching_loss(logits_X2: Tensor, label_X: Tensor) -> Tensor:
    """(X,) nats of the two logits (no match, match); label 1 is a match."""
    return F.cross_entropy(logits_X2.float(), label_X, reduction="none")


def match(
    model: VisionLanguageModel, batch: Batch, drawn: Drawn, pool: Pool
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]], EncoderOutput]:
    """(number of pairs of the pool times the mean over its examples, this rank's part of it; metrics; the
    fused pass).

    So divided by the pairs of the step it is the mean over the examples of the pass by its share of the step.
    """
    assert model.matching is not None
    examples = make_examples(batch, drawn, pool)
    encoded = model.encode(
        images_BCHW=examples.images_XCHW,
        tokens_N=examples.tokens_N,
        text_lengths=examples.text_lengths,
        seed_B=examples.seed_X,
    )
    logits_X2 = model.matching(encoded.text_class_BD)
    nats_X = matching_loss(logits_X2, examples.label_X) * examples.counts_X
    total = nats_X.sum() * (pool.size * batch.size / examples.number)
    right_X = (logits_X2.detach().argmax(-1) == examples.label_X) * examples.counts_X
    count = examples.counts_X.sum()
    return (
        total,
        {
            "loss": (nats_X.detach().sum(), count),
            "accuracy": (right_X.sum(), count),
            # Share of the examples that had no negative to draw: all of the pool were positives.
            "left_out": (3 * batch.size - count, torch.full_like(count, 3 * batch.size)),
        },
        encoded,
    )


def excluded(positive_BN: Tensor, first: int, negatives: str) -> Tensor:
    """bool (B, N): the positives, and with `local` negatives what other ranks hold."""
    if negatives == "global":
        return positive_BN
    number_N = torch.arange(positive_BN.shape[1], device=positive_BN.device)
    return positive_BN | (number_N < first) | (number_N >= first + len(positive_BN))


class Matching(OfWholePairs):
    """Without contrast: negatives are drawn alike of all that are no positives."""

    def __call__(
        self, model: VisionLanguageModel, batch: Batch, units: Tensor, aux_weight: float
    ) -> ObjectiveOutput:
        positive_BN = positives_in_pool(batch, self.stream.identity, self.pool)
        excluded_BN = excluded(positive_BN, self.pool.rank * batch.size, self.stream.negatives)
        alike_BN = torch.zeros_like(positive_BN, dtype=torch.float32)
        drawn = draw(alike_BN, alike_BN, excluded_BN, batch.seed_B)
        total, metrics, encoded = match(model, batch, drawn, self.pool)
        return with_routing(total / units, metrics, [encoded], aux_weight)


class ContrastMatching(OfWholePairs):
    """Both from one comparison, as VLMo has it: the logits of contrast draw the negatives of matching."""

    def __call__(
        self, model: VisionLanguageModel, batch: Batch, units: Tensor, aux_weight: float
    ) -> ObjectiveOutput:
        compared = compare(model, batch, self.stream, self.pool)
        contrast, contrast_metrics = pair_loss(model, compared, self.stream)
        first, hardness = compared.paths[0], self.stream.negative_hardness
        drawn = draw(
            hardness * first.image_to_text_BN.detach(),
            hardness * first.text_to_image_BN.detach(),
            excluded(compared.positive_BN, compared.first, self.stream.negatives),
            batch.seed_B,
        )
        matching, matching_metrics, fused = match(model, batch, drawn, self.pool)
        metrics = {f"contrast_{name}": metric for name, metric in contrast_metrics.items()}
        metrics |= {f"matching_{name}": metric for name, metric in matching_metrics.items()}
        total = contrast + self.stream.matching_weight * matching
        return with_routing(total / units, metrics, [*compared.encoded, fused], aux_weight)
