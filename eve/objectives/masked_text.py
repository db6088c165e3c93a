"""Masked language modelling within a pair (EVE): the complete image and the text with
masked words through the encoder, a small head predicts the words.

Shape suffixes: B sample, N text token, K masked token, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eve.config import Model, Stream
from eve.data.batch import Batch, Masking
from eve.data.tokenizer import Tokenizer
from eve.model import VisionLanguageModel
from eve.model.encoder import EncoderOutput
from eve.objectives.masking import TextMasking
from eve.objectives.output import ObjectiveOutput, with_routing
from eve.packing import to_device


@dataclass(frozen=True)
class TextPrediction:
    """Of the masked words of a batch: logits, what stood there, and their sample in the batch."""

    logits_KV: Tensor
    labels_K: Tensor
    sample_K: Tensor


def text_masking(stream: Stream, tokenizer: Tokenizer | None) -> TextMasking:
    assert tokenizer is not None
    return TextMasking(
        ratio=stream.text_ratio,
        kind=stream.text_masking,
        mask_share=stream.mask_share,
        random_share=stream.random_share,
        mask_id=tokenizer.mask_id,
        special_V=tokenizer.special_V,
        word_start_V=tokenizer.word_start_V,
    )


def masked_rows(batch: Batch, stream: str) -> tuple[Tensor, Tensor]:
    """Rows of the masked tokens among the packed text tokens, and their samples; computed on the host,
    because their number is needed there."""
    positions = [sample.masks[stream]["position_N"] for sample in batch.samples]
    counts = [len(position) for position in positions]
    starts = np.cumsum([0, *batch.text_lengths[:-1]])
    rows = np.concatenate(positions) + np.repeat(starts, counts)
    samples = np.repeat(np.arange(len(counts)), counts)
    device = batch.seed_B.device
    return to_device(torch.from_numpy(rows), device), to_device(torch.from_numpy(samples), device)


class MaskedText:
    def __init__(self, stream: Stream, model: Model):
        self.name = stream.name
        self.stream = stream

    def masking(self, tokenizer: Tokenizer | None) -> Masking:
        return text_masking(self.stream, tokenizer)

    def units(self, batch: Batch) -> Tensor:
        target_K = batch.masks[self.name]["target_N"]
        return torch.full((), target_K.numel(), dtype=torch.float32, device=target_K.device)

    def _encode(self, model: VisionLanguageModel, batch: Batch) -> EncoderOutput:
        return model.encode(
            images_BCHW=batch.images_BCHW,
            tokens_N=batch.masks[self.name]["input_N"],
            text_lengths=batch.text_lengths,
            seed_B=batch.seed_B,
        )

    def __call__(
        self, model: VisionLanguageModel, batch: Batch, units: Tensor, aux_weight: float
    ) -> ObjectiveOutput:
        encoded = self._encode(model, batch)
        total, metrics = text_loss(model, encoded, batch, self.stream)
        return with_routing(total / units, metrics, encoded, aux_weight)

    @torch.no_grad()
    def predict(self, model: VisionLanguageModel, batch: Batch) -> TextPrediction:
        """Of a model in evaluation mode."""
        encoded = self._encode(model, batch)
        row_K, sample_K = masked_rows(batch, self.name)
        logits_KV = model.word_head(encoded.texts_ND[row_K]).float()
        return TextPrediction(logits_KV, batch.masks[self.name]["target_N"], sample_K)


def text_loss(
    model: VisionLanguageModel, encoded: EncoderOutput, batch: Batch, stream: Stream
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Sum over masked words of the loss, and the metrics: `loss` is the plain cross-entropy in nats."""
    target_K = batch.masks[stream.name]["target_N"]
    row_K, _ = masked_rows(batch, stream.name)
    hidden_KD = encoded.texts_ND.index_select(0, row_K)
    found = model.word_head.cross_entropy(hidden_KD, target_K, stream.label_smoothing, stream.z_loss_weight)
    nats = found.nats_K.sum()
    count = torch.full_like(nats, target_K.numel())
    return found.loss_K.sum(), {"loss": (nats, count), "accuracy": (found.right_K.sum(), count)}
