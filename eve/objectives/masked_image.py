"""Masked image modelling (MAE within EVE): the encoder sees the visible patches and the complete text, the
decoder predicts the pixels of the masked patches. Or the encoder sees mask tokens among the visible patches,
as EVE's ablation of its speed has it, and the decoder only says what the encoder has made of them.

Shape suffixes: B sample, V visible patch, M masked patch, C pixels of a patch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eve.config import Model, Stream
from eve.data.batch import Batch, Masking
from eve.data.tokenizer import Tokenizer
from eve.model import VisionLanguageModel
from eve.model.encoder import EncoderOutput
from eve.objectives.masking import ImageMasking, masked_patches
from eve.objectives.output import ObjectiveOutput, with_routing
from kernels.masked_pixel_loss import masked_pixel_loss, masked_pixels, patch_moments, pixel_target


@dataclass(frozen=True)
class ImagePrediction:
    """Of the masked patches, in the target's space; `raw_BMC` are their true pixels in [-1, 1]."""

    pred_BMC: Tensor
    target_BMC: Tensor
    raw_BMC: Tensor
    masked_BM: Tensor
    normalised: bool

    def to_pixels(self) -> Tensor:
        """Predicted pixels in [-1, 1]. Where targets are normalised, the mean and deviation of each
        patch are taken from the true picture: the model does not predict them."""
        if not self.normalised:
            return self.pred_BMC
        mean_BM1, deviation_BM1 = patch_moments(self.raw_BMC)
        return self.pred_BMC * deviation_BM1 + mean_BM1


class MaskedImage:
    def __init__(self, stream: Stream, model: Model):
        self.name = stream.name
        self.stream = stream
        self.side = model.image_size // model.patch_size

    def masking(self, tokenizer: Tokenizer | None) -> Masking:
        return ImageMasking.of(self.stream, self.side)

    def units(self, batch: Batch) -> Tensor:
        masked_BM = batch.masks[self.name]["masked_M"]
        return torch.full((), masked_BM.numel(), dtype=torch.float32, device=masked_BM.device)

    def _decode(self, model: VisionLanguageModel, batch: Batch) -> tuple[Tensor, EncoderOutput]:
        encoded = model.encode(
            images_BCHW=batch.images_BCHW,
            tokens_N=batch.tokens_N,
            text_lengths=batch.text_lengths,
            seed_B=batch.seed_B,
            **pixel_inputs(model, batch, self.stream),
        )
        return decode_pixels(model, encoded, batch, self.stream), encoded

    def __call__(
        self, model: VisionLanguageModel, batch: Batch, units: Tensor, aux_weight: float
    ) -> ObjectiveOutput:
        pred_BMC, encoded = self._decode(model, batch)
        masked_BM = batch.masks[self.name]["masked_M"]
        total, metrics = image_loss(pred_BMC, batch, masked_BM, model.config.patch_size, self.stream)
        return with_routing(total / units, metrics, encoded, aux_weight)

    @torch.no_grad()
    def predict(self, model: VisionLanguageModel, batch: Batch) -> ImagePrediction:
        """Of a model in evaluation mode."""
        pred_BMC, _ = self._decode(model, batch)
        masked_BM = batch.masks[self.name]["masked_M"]
        assert batch.images_BCHW is not None
        raw_BMC = masked_pixels(batch.images_BCHW, masked_BM, model.config.patch_size)
        normalised = self.stream.normalise_pixels
        target_BMC = pixel_target(raw_BMC, normalised)
        return ImagePrediction(pred_BMC.float(), target_BMC, raw_BMC, masked_BM, normalised)


def pixel_inputs(model: VisionLanguageModel, batch: Batch, stream: Stream) -> dict[str, Tensor]:
    """What the encoder is told of the mask of a stream that predicts pixels."""
    mask = batch.masks[stream.name]
    if stream.image_input == "visible":
        return {"visible_BV": mask["visible_V"]}
    return {"masked_BP": masked_patches(mask["masked_M"], model.config.num_patches)}


def decode_pixels(model: VisionLanguageModel, encoded: EncoderOutput, batch: Batch, stream: Stream) -> Tensor:
    """(B, M, C)."""
    mask = batch.masks[stream.name]
    visible_BV = mask["visible_V"] if stream.image_input == "visible" else None
    assert model.decoder is not None
    return model.decoder(encoded.images_BID, visible_BV, mask["masked_M"])


def image_loss(
    pred_BMC: Tensor, batch: Batch, masked_BM: Tensor, patch_size: int, stream: Stream
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Sum over masked patches of the mean squared error of their pixels, and the metric."""
    assert batch.images_BCHW is not None
    total = masked_pixel_loss(
        pred_BMC, batch.images_BCHW, masked_BM, patch_size, stream.normalise_pixels
    ).sum()
    count = torch.full_like(total, masked_BM.numel())
    return total, {"loss": (total.detach(), count.detach())}
