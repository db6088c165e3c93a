"""Held-out retrieval: recall at 1, 5 and 10 of texts by image and of images by text.

By contrast the score is the cosine of the two projections, each made alone. By matching, the first candidates
by contrast are put in order by the log-odds of a match, fused; the others stay behind them.

All captions of an image are candidates. One is right for an image where it is its own, that of an image that
shows the same (`identity` of the recipe's stream), or of the same words as either.

Shape suffixes: I image, C caption, Q query, K candidate, N packed text token, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lgamma

import numpy as np
import torch
from torch import Tensor

from eve.config import Recipe
from eve.data.batch import Sample
from eve.data.loader import read_captions, read_samples
from eve.data.tokenizer import Tokenizer
from eve.errors import UserError
from eve.model import VisionLanguageModel
from eve.tasks.checkpoint import Checkpoint
from eve.tasks.report import Table, Value
from eve.tasks.statistics import Interval, bootstrap_ratio

RANKS = (1, 5, 10)
COLUMNS = (
    *("cell", "images", "captions"),
    *(f"text R@{k}" for k in RANKS),
    *(f"image R@{k}" for k in RANKS),
)


def check(recipe: Recipe) -> None:
    """Raises UserError where the model compares nothing."""
    if recipe.model.contrast is None:
        raise UserError("model.contrast of the checkpoint is null: nothing compares images with texts")


@dataclass(frozen=True)
class Candidates:
    """Images and captions of a cell; `relevant_IC`: bool, the caption is right for the image."""

    images: Sequence[Sample]
    texts: list[np.ndarray]
    owner_C: np.ndarray
    relevant_IC: Tensor


def evaluate(checkpoint: Checkpoint, cells: dict[str, str]) -> list[Table]:
    """Measures every cell (name -> shards)."""
    recipe = checkpoint.recipe
    model, tokenizer = checkpoint.model(), checkpoint.tokenizer()
    settings = recipe.evaluation
    contrast: list[list[Value]] = []
    matching: list[list[Value]] = []
    chance: list[list[Value]] = []
    for cell, shards in cells.items():
        found = read_candidates(recipe, tokenizer, shards)
        print(f"{cell}: {len(found.images)} images, {len(found.texts)} captions", flush=True)
        start: list[Value] = [cell, len(found.images), len(found.texts)]
        score_IC = score_by_contrast(model, found, settings.batch_size)
        chance.append([*start, *_chances(found.relevant_IC)])
        contrast.append([*start, *_recalls(score_IC, score_IC.t(), found, recipe.seed)])
        if model.matching is not None:
            odds_IC, odds_CI = (
                score_by_matching(
                    model, found, first, settings.rerank, settings.batch_size, by_image=by_image
                )
                for first, by_image in ((score_IC, True), (score_IC.t(), False))
            )
            matching.append([*start, *_recalls(odds_IC, odds_CI, found, recipe.seed)])
    note = (
        "text R@k: share of the images that have a right caption among the first k; image R@k: the other "
        "way. In brackets the 95 % interval of a bootstrap over the images."
    )
    tables = [Table("Retrieval by contrast", COLUMNS, contrast, [note])]
    if matching:
        title = f"Retrieval by matching of the first {settings.rerank} by contrast"
        tables.append(Table(title, COLUMNS, matching))
    return [*tables, Table("Retrieval by chance", COLUMNS, chance)]


def read_candidates(recipe: Recipe, tokenizer: Tokenizer, shards: str) -> Candidates:
    """The first `evaluation.max_samples` images with all their captions. Raises UserError without any."""
    length = recipe.model.max_text_length
    images = list(
        read_samples(
            shards,
            image_size=recipe.model.image_size,
            max_text_length=length,
            tokenizer=tokenizer,
            maskings={},
            seed=recipe.seed,
            limit=recipe.evaluation.max_samples,
        )
    )
    if not images:
        raise UserError(f"the held-out shards {shards} hold no sample that can be used")
    wanted = {sample.index: number for number, sample in enumerate(images)}
    texts: list[np.ndarray] = []
    owners: list[int] = []
    for index, captions in read_captions(shards, max_text_length=length, tokenizer=tokenizer):
        if index in wanted:
            texts += captions
            owners += [wanted[index]] * len(captions)
    owner_C = np.array(owners, dtype=np.int64)
    pooled = [stream for stage in recipe.stages for stream in stage.streams if stream.is_pooled]
    field = pooled[-1].identity if pooled else None
    shown = [sample.metadata.get(field, ("key", sample.key)) if field else sample.key for sample in images]
    relevant_IC = relevant(
        _codes([repr(value) for value in shown]), _codes([t.tobytes() for t in texts]), owner_C
    )
    return Candidates(images, texts, owner_C, relevant_IC)


def relevant(image_I: np.ndarray, text_C: np.ndarray, owner_C: np.ndarray) -> Tensor:
    """bool (I, C) from codes of what images show and captions say, and the image of each caption."""
    said = np.zeros((int(image_I.max(initial=-1)) + 1, int(text_C.max(initial=-1)) + 1), dtype=bool)
    said[image_I[owner_C], text_C] = True
    return torch.from_numpy(said[image_I][:, text_C])


def _codes(values: Sequence[str | bytes]) -> np.ndarray:
    known: dict[str | bytes, int] = {}
    return np.array([known.setdefault(value, len(known)) for value in values], dtype=np.int64)


@torch.no_grad()
def score_by_contrast(model: VisionLanguageModel, found: Candidates, batch_size: int) -> Tensor:
    """(I, C) cosines on the first path of the contrast (VLMo: each with the experts of its modality)."""
    head = model.contrast
    assert head is not None
    path = head.config.paths[0]
    both = path == "fusion"
    device = next(model.parameters()).device
    images, texts = [], []
    for some in _chunks(range(len(found.images)), batch_size):
        encoded = model.encode(images_BCHW=_pixels(found, some, device), both_paths=both)
        images.append(head.project_images((encoded.fusion or encoded).image_class_BD, path))
    for some in _chunks(range(len(found.texts)), batch_size):
        tokens_N, lengths = _words(found, some, device)
        encoded = model.encode(tokens_N=tokens_N, text_lengths=lengths, both_paths=both)
        texts.append(head.project_texts((encoded.fusion or encoded).text_class_BD, path))
    return (torch.cat(images) @ torch.cat(texts).t()).cpu()


@torch.no_grad()
def score_by_matching(
    model: VisionLanguageModel,
    found: Candidates,
    first_QK: Tensor,
    rerank: int,
    batch_size: int,
    *,
    by_image: bool,
) -> Tensor:
    """(Q, K) log-odds of a match of the `rerank` candidates that `first_QK` puts first, -inf of the others.
    Queries are the images, or the captions."""
    assert model.matching is not None
    best_QR = first_QK.topk(min(rerank, first_QK.shape[1]), dim=1).indices
    pairs = [(query, candidate) for query, row in enumerate(best_QR.tolist()) for candidate in row]
    device = next(model.parameters()).device
    odds = []
    for some in _chunks(pairs, batch_size):
        images, captions = zip(*some if by_image else ((c, q) for q, c in some), strict=True)
        tokens_N, lengths = _words(found, captions, device)
        encoded = model.encode(
            images_BCHW=_pixels(found, images, device), tokens_N=tokens_N, text_lengths=lengths
        )
        logits_B2 = model.matching(encoded.text_class_BD).float()
        odds.append((logits_B2[:, 1] - logits_B2[:, 0]).cpu())
    scores_QK = torch.full(first_QK.shape, -torch.inf)
    return scores_QK.scatter_(1, best_QR, torch.cat(odds).view(best_QR.shape))


def _chunks(items: Sequence, size: int) -> list[Sequence]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _pixels(found: Candidates, numbers: Sequence[int], device: torch.device) -> Tensor:
    return torch.from_numpy(np.stack([found.images[i].image_CHW for i in numbers])).to(device)  # pyright: ignore


def _words(found: Candidates, numbers: Sequence[int], device: torch.device) -> tuple[Tensor, list[int]]:
    texts = [found.texts[i] for i in numbers]
    return torch.from_numpy(np.concatenate(texts)).to(device), [len(text) for text in texts]


def best_ranks(score_QK: Tensor, relevant_QK: Tensor) -> Tensor:
    """int64 (Q,): how many candidates stand before the first relevant one.

    Others of the same score, or of none, stand before it: a model that says nothing finds nothing.

    >>> best_ranks(torch.tensor([[0.9, 0.5, 0.7]]), torch.tensor([[False, True, True]])).tolist()
    [1]
    """
    best_Q1 = score_QK.masked_fill(~relevant_QK, -torch.inf).amax(1, keepdim=True)
    return (~(score_QK < best_Q1) & ~relevant_QK).sum(1)


def recalls(score_QK: Tensor, relevant_QK: Tensor) -> dict[int, Tensor]:
    """k -> bool (Q,): a relevant candidate is among the first k, for k of 1, 5 and 10."""
    rank_Q = best_ranks(score_QK, relevant_QK)
    return {k: rank_Q < k for k in RANKS}


def chance(relevant_QK: Tensor) -> dict[int, float]:
    """k -> mean recall of a random order: 1 - C(K - r, k) / C(K, k) for r relevant of K candidates."""
    number = relevant_QK.shape[1]
    relevant_Q = relevant_QK.sum(1).tolist()

    def missed(k: int, right: int) -> float:
        if k > number - right:
            return 0.0
        wrong = number - right
        logs = lgamma(wrong + 1) - lgamma(wrong - k + 1) - lgamma(number + 1) + lgamma(number - k + 1)
        return float(np.exp(logs))

    return {k: 1 - float(np.mean([missed(k, right) for right in relevant_Q])) for k in RANKS}


def _chances(relevant_IC: Tensor) -> list[float]:
    return [*chance(relevant_IC).values(), *chance(relevant_IC.t()).values()]


def _recalls(score_IC: Tensor, score_CI: Tensor, found: Candidates, seed: int) -> list[Interval]:
    """Of texts by image, then of images by text. The captions of an image are resampled together."""
    number = len(found.images)
    texts = recalls(score_IC, found.relevant_IC).values()
    images = recalls(score_CI, found.relevant_IC.t()).values()
    one_I = np.ones(number)
    captions_I = np.bincount(found.owner_C, minlength=number).astype(np.float64)
    return [
        *(bootstrap_ratio(hit_I.double().numpy(), one_I, seed=seed) for hit_I in texts),
        *(
            bootstrap_ratio(
                np.bincount(found.owner_C, weights=hit_C.double().numpy(), minlength=number),
                captions_I,
                seed=seed,
            )
            for hit_C in images
        ),
    ]
