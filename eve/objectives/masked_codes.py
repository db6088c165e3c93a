"""Masked image modelling with visual words (BEiT, BEiT v2, VL-MoE): the encoder sees the picture with mask
tokens in place of the masked patches, and says which codes of a frozen visual tokenizer those patches have.

With `model.class_token_head` (BEiT v2) the same codes are predicted a second time, from the last class token
and early patches; the two losses are added.

Shape suffixes: B sample, P patch, M masked patch, K masked patch of the batch, V code.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eve.config import Model, Stream
from eve.data.batch import Batch, Masking
from eve.data.tokenizer import Tokenizer
from eve.errors import UserError
from eve.model import VisionLanguageModel
from eve.model.embeddings import pick
from eve.model.encoder import EncoderOutput
from eve.objectives.masked_image import ImagePrediction
from eve.objectives.masking import ImageMasking, masked_patches
from eve.objectives.output import ObjectiveOutput, with_routing
from eve.visual_tokenizer import VisualTokenizer, VisualTokenizerConfig, load_config
from kernels.masked_pixel_loss import masked_pixels, pixel_target

Metrics = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class CodePrediction:
    """Of the masked patches of a batch, sample by sample: logits, and the codes of the whole pictures."""

    logits_BMV: Tensor
    codes_BP: Tensor
    masked_BM: Tensor

    @property
    def labels_BM(self) -> Tensor:
        return self.codes_BP.gather(1, self.masked_BM)


class PatchCodes:
    """The frozen visual tokenizer of a run, on the device of the pictures; no part of the model."""

    def __init__(self, directory: str, model: Model) -> None:
        check_visual_tokenizer(directory, model)
        self.tokenizer = VisualTokenizer.load(directory)

    def __call__(self, batch: Batch) -> Tensor:
        """int64 (B, P): the codes of the true pictures."""
        assert batch.images_BCHW is not None
        device = batch.images_BCHW.device
        if self.tokenizer.quantiser.codes_KW.device != device:
            self.tokenizer.to(device)
        return self.tokenizer.encode(batch.images_BCHW)


def check_visual_tokenizer(directory: str | Path, model: Model) -> VisualTokenizerConfig:
    """Its sizes. Raises UserError where it is missing, or its codes are not those that the model predicts."""
    config = load_config(directory)
    where = f"the visual tokenizer {directory}"
    if config.codes != model.visual_codes:
        raise UserError(f"{where} has {config.codes} codes, model.visual_codes is {model.visual_codes}")
    sizes = (config.image_size, config.patch_size)
    if sizes != (model.image_size, model.patch_size):
        raise UserError(
            f"{where} is for images of {sizes[0]} pixels in patches of {sizes[1]}, the model for images of "
            f"{model.image_size} in patches of {model.patch_size}"
        )
    return config


class MaskedCodes:
    def __init__(self, stream: Stream, model: Model, codes: PatchCodes | None):
        assert codes is not None
        self.name = stream.name
        self.stream = stream
        self.side = model.image_size // model.patch_size
        self.codes = codes

    def masking(self, tokenizer: Tokenizer | None) -> Masking:
        return ImageMasking.of(self.stream, self.side)

    def units(self, batch: Batch) -> Tensor:
        masked_BM = batch.masks[self.name]["masked_M"]
        return torch.full((), masked_BM.numel(), dtype=torch.float32, device=masked_BM.device)

    def _encode(self, model: VisionLanguageModel, batch: Batch) -> EncoderOutput:
        return model.encode(
            images_BCHW=batch.images_BCHW,
            tokens_N=batch.tokens_N,
            text_lengths=batch.text_lengths,
            seed_B=batch.seed_B,
            **code_inputs(model, batch, self.name),
        )

    def __call__(
        self, model: VisionLanguageModel, batch: Batch, units: Tensor, aux_weight: float
    ) -> ObjectiveOutput:
        encoded = self._encode(model, batch)
        total, metrics = code_loss(model, encoded, batch, self.name, self.codes(batch))
        return with_routing(total / units, metrics, encoded, aux_weight)

    @torch.no_grad()
    def predict(self, model: VisionLanguageModel, batch: Batch) -> CodePrediction:
        """Of a model in evaluation mode."""
        masked_BM = batch.masks[self.name]["masked_M"]
        hidden_KD = masked_hidden(self._encode(model, batch).images_BID, masked_BM)
        assert model.code_head is not None
        logits_BMV = model.code_head(hidden_KD).float().unflatten(0, masked_BM.shape)
        return CodePrediction(logits_BMV, self.codes(batch), masked_BM)

    @torch.no_grad()
    def predict_pixels(self, model: VisionLanguageModel, batch: Batch) -> ImagePrediction | None:
        """What the likeliest codes stand for, decoded among the true codes of the visible patches; None where
        the codes stand for features. Of a model in evaluation mode."""
        tokenizer = self.codes.tokenizer
        if tokenizer.config.target == "features":
            return None
        found = self.predict(model, batch)
        codes_BP = found.codes_BP.scatter(1, found.masked_BM, found.logits_BMV.argmax(-1))
        pred_BMC = pick(tokenizer.decode(codes_BP), found.masked_BM)
        assert batch.images_BCHW is not None
        raw_BMC = masked_pixels(batch.images_BCHW, found.masked_BM, model.config.patch_size)
        normalised = tokenizer.config.target == "normalised_pixels"
        target_BMC = pixel_target(raw_BMC, normalised)
        return ImagePrediction(pred_BMC, target_BMC, raw_BMC, found.masked_BM, normalised)


def code_inputs(model: VisionLanguageModel, batch: Batch, stream: str) -> dict[str, Any]:
    """What the encoder is told to hide, and which block the class-token head reads."""
    head = model.config.class_token_head
    return {
        "masked_BP": masked_patches(batch.masks[stream]["masked_M"], model.config.num_patches),
        "early": None if head is None else head.early,
    }


def code_loss(
    model: VisionLanguageModel, encoded: EncoderOutput, batch: Batch, stream: str, codes_BP: Tensor
) -> tuple[Tensor, Metrics]:
    """Sum over masked patches of the cross-entropy (of both heads), and the metrics."""
    masked_BM = batch.masks[stream]["masked_M"]
    target_K = codes_BP.gather(1, masked_BM).flatten()
    assert model.code_head is not None
    found = model.code_head.cross_entropy(masked_hidden(encoded.images_BID, masked_BM), target_K)
    total, count = found.loss_K.sum(), torch.full_like(found.nats_K[0], target_K.numel())
    metrics = {"loss": (found.nats_K.sum(), count), "accuracy": (found.right_K.sum(), count)}
    if model.class_token_head is not None:
        hidden_KD = masked_hidden(model.class_token_hidden(encoded), masked_BM)
        again = model.class_token_codes.cross_entropy(hidden_KD, target_K)
        total = total + again.loss_K.sum()
        metrics |= {
            "class_token_loss": (again.nats_K.sum(), count),
            "class_token_accuracy": (again.right_K.sum(), count),
        }
    return total, metrics


def masked_hidden(images_BID: Tensor, masked_BM: Tensor) -> Tensor:
    """(B, 1 + P, D) -> (B * M, D): the hidden states of the masked patches."""
    patches_BPD = images_BID[:, 1:]
    place_BMD = masked_BM[..., None].expand(-1, -1, patches_BPD.shape[-1])
    return patches_BPD.gather(1, place_BMD).flatten(0, 1)
