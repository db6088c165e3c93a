"""Image-text contrast (ITC; CLIP, ALBEF, VLMo): image and text go through the encoder alone, and each has to
find its partner among all samples of the step by the cosine of two projections.

Shape suffixes: B sample of this rank, N sample of the pool (eve/objectives/pool.py), D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eve import random
from eve.config import Model, Stream
from eve.data.batch import Batch, Masking, Sample
from eve.data.seeds import key_of
from eve.data.tokenizer import Tokenizer
from eve.model import VisionLanguageModel
from eve.model.encoder import EncoderOutput
from eve.objectives.output import ObjectiveOutput, with_routing
from eve.objectives.pool import Pool
from eve.packing import to_device

# Of random.mix: the text's pass drops other paths than the image's. Far from the counters of the model.
_TEXT_ALONE = 1 << 40


@dataclass(frozen=True)
class Similarity:
    """Logits of one path: row b is sample b of this rank, column n sample n of the pool."""

    image_to_text_BN: Tensor
    text_to_image_BN: Tensor


def similarity(
    image_BD: Tensor,
    text_BD: Tensor,
    scale: Tensor,
    images_ND: Tensor | None = None,
    texts_ND: Tensor | None = None,
) -> Similarity:
    """Cosines times `scale` of vectors of length 1; without those of the pool, the samples are all of it."""
    images_ND = image_BD if images_ND is None else images_ND
    texts_ND = text_BD if texts_ND is None else texts_ND
    return Similarity(scale * image_BD @ texts_ND.t(), scale * text_BD @ images_ND.t())


def contrast_loss(
    logits: Similarity, positive_BN: Tensor | None = None, first: int = 0, targets: str = "masked"
) -> Tensor:
    """(B,) nats: cross-entropy of each image's text and each text's image, the mean of both (CLIP, VLMo).

    Args:
        positive_BN: bool, samples that show or say the same; without it each is alone.
        first: sample 0 of this rank is sample `first` of the pool.
        targets: what other positives than the partner are, see Stream.targets.
    """
    both = (logits.image_to_text_BN, logits.text_to_image_BN)
    own_B = torch.arange(len(both[0]), device=both[0].device) + first
    if positive_BN is None:
        positive_BN = torch.zeros_like(both[0], dtype=torch.bool).scatter(1, own_B[:, None], True)
    image_B, text_B = (_cross_entropy(logits_BN, positive_BN, own_B, targets) for logits_BN in both)
    return (image_B + text_B) / 2


def _cross_entropy(logits_BN: Tensor, positive_BN: Tensor, own_B: Tensor, targets: str) -> Tensor:
    if targets == "soft":
        target_BN = positive_BN.float()
        target_BN = target_BN / target_BN.sum(-1, keepdim=True)
        return -(target_BN * logits_BN.log_softmax(-1)).sum(-1)
    if targets == "masked":
        others_BN = positive_BN.scatter(1, own_B[:, None], False)
        logits_BN = logits_BN.masked_fill(others_BN, -torch.inf)
    return F.cross_entropy(logits_BN, own_B, reduction="none")


def identities(batch: Batch, field: str | None) -> Tensor:
    """int64 (B, 2), on the batch's device: a hash of what the image shows (the value of that metadata field,
    or the sample's key where there is none) and one of the text's tokens."""
    rows = []
    for sample in batch.samples:
        shown = ("key", sample.key)
        if field is not None and field in sample.metadata:
            shown = ("value", repr(sample.metadata[field]))
        assert sample.tokens_N is not None
        said = np.ascontiguousarray(sample.tokens_N).tobytes().hex()
        rows.append([key_of(*shown) >> 65, key_of("text", said) >> 65])
    return to_device(torch.tensor(rows, dtype=torch.int64), batch.seed_B.device)


def positives(identity_B2: Tensor, identity_N2: Tensor) -> Tensor:
    """bool (B, N): image or text is the same."""
    return (identity_B2[:, None] == identity_N2[None]).any(-1)


def positives_in_pool(batch: Batch, field: str | None, pool: Pool) -> Tensor:
    """bool (B, N): the samples of the pool that show or say the same; `field` as of `identities`."""
    identity_B2 = identities(batch, field)
    return positives(identity_B2, pool.gather(identity_B2))


@dataclass(frozen=True)
class Comparison:
    """A pass compared with the pool.

    Attributes:
        paths: logits of each path (Contrast.paths), the first of which draws hard negatives.
        positive_BN: bool, the samples are positives of one another.
        first: sample 0 of this rank is sample `first` of the pool.
        encoded: image-only and text-only pass.
    """

    paths: list[Similarity]
    positive_BN: Tensor
    first: int
    encoded: tuple[EncoderOutput, EncoderOutput]


def compare(model: VisionLanguageModel, batch: Batch, stream: Stream, pool: Pool) -> Comparison:
    """Encodes images and texts alone and compares them with the pool; no wait of the host."""
    head = model.contrast
    assert head is not None
    paths = head.config.paths
    image, text = encode_alone(model, batch, paths)
    parts = []
    for path in paths:
        parts.append(head.project_images(_on_path(image, path).image_class_BD, path))
        parts.append(head.project_texts(_on_path(text, path).text_class_BD, path))
    gathered = pool.gather(torch.cat(parts, dim=-1)).chunk(len(parts), dim=-1)
    logits = [
        similarity(parts[2 * i], parts[2 * i + 1], head.scale(path), gathered[2 * i], gathered[2 * i + 1])
        for i, path in enumerate(paths)
    ]
    positive_BN = positives_in_pool(batch, stream.identity, pool)
    return Comparison(logits, positive_BN, pool.rank * batch.size, (image, text))


def encode_alone(
    model: VisionLanguageModel, batch: Batch, paths: tuple[str, ...]
) -> tuple[EncoderOutput, EncoderOutput]:
    """The images of a batch without its texts, and the texts without the images."""
    both_paths = "fusion" in paths
    image = model.encode(images_BCHW=batch.images_BCHW, seed_B=batch.seed_B, both_paths=both_paths)
    text = model.encode(
        tokens_N=batch.tokens_N,
        text_lengths=batch.text_lengths,
        seed_B=random.mix(batch.seed_B, _TEXT_ALONE),
        both_paths=both_paths,
    )
    return image, text


def _on_path(encoded: EncoderOutput, path: str) -> EncoderOutput:
    if path == "modality":
        return encoded
    assert encoded.fusion is not None
    return encoded.fusion


def no_masks(sample: Sample, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {}


class OfWholePairs:
    """What contrast and matching share: nothing is masked, and each pair counts once."""

    def __init__(self, stream: Stream, model: Model, pool: Pool):
        self.name = stream.name
        self.stream, self.pool = stream, pool

    def masking(self, tokenizer: Tokenizer | None) -> Masking:
        return no_masks

    def units(self, batch: Batch) -> Tensor:
        return torch.full((), batch.size, dtype=torch.float32, device=batch.seed_B.device)


class Contrast(OfWholePairs):
    """Mean over the pairs of the step, and over the paths (VLMo has two)."""

    def __call__(
        self, model: VisionLanguageModel, batch: Batch, units: Tensor, aux_weight: float
    ) -> ObjectiveOutput:
        compared = compare(model, batch, self.stream, self.pool)
        total, metrics = pair_loss(model, compared, self.stream)
        return with_routing(total / units, metrics, compared.encoded, aux_weight)


def pair_loss(
    model: VisionLanguageModel, compared: Comparison, stream: Stream
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Sum over the pairs of this rank, and the metrics: the accuracy counts any positive as right, both ways
    on the first path; the pool is how many samples a pair was compared with."""
    nats = [
        contrast_loss(path, compared.positive_BN, compared.first, stream.targets) for path in compared.paths
    ]
    total = torch.stack(nats).mean(0).sum()
    num_pairs, pool_size = compared.positive_BN.shape
    first = compared.paths[0]
    right = [
        compared.positive_BN.gather(1, logits_BN.detach().argmax(-1, keepdim=True)).sum()
        for logits_BN in (first.image_to_text_BN, first.text_to_image_BN)
    ]
    assert model.contrast is not None
    temperature = 1 / model.contrast.scale(model.contrast.config.paths[0]).detach()
    pairs, one = torch.full_like(total, num_pairs), torch.ones_like(total)
    return total, {
        "loss": (total.detach(), pairs),
        "accuracy": (torch.stack(right).sum() / 2, pairs),
        "temperature": (temperature, one),
        "pool": (one * pool_size, one),
    }
