"""Both inputs of a pair masked in one pass: the ablation of EVE's Table 5, with pixels, and the objective of
VL-MoE and BEiT-3 for pairs, with codes."""

from __future__ import annotations

import torch
from torch import Tensor

from eve.config import Model, Stream
from eve.data.batch import Batch, Masking
from eve.data.tokenizer import Tokenizer
from eve.model import VisionLanguageModel
from eve.objectives.masked_codes import PatchCodes, code_inputs, code_loss
from eve.objectives.masked_image import decode_pixels, image_loss, pixel_inputs
from eve.objectives.masked_text import text_loss, text_masking
from eve.objectives.masking import ImageMasking, PairMasking
from eve.objectives.output import ObjectiveOutput, with_routing
from eve.packing import to_device


class MaskedPair:
    """The sum of the two means; its units are a vector, (masked patches, masked words). `codes`: where these,
    and not pixels, are the target."""

    def __init__(self, stream: Stream, model: Model, codes: PatchCodes | None = None):
        self.name = stream.name
        self.stream = stream
        self.side = model.image_size // model.patch_size
        self.codes = codes

    def masking(self, tokenizer: Tokenizer | None) -> Masking:
        image = ImageMasking.of(self.stream, self.side)
        return PairMasking(image, text_masking(self.stream, tokenizer))

    def units(self, batch: Batch) -> Tensor:
        mask = batch.masks[self.name]
        numbers = [mask["masked_M"].numel(), mask["target_N"].numel()]
        return to_device(torch.tensor(numbers, dtype=torch.float32), batch.seed_B.device)

    def __call__(
        self, model: VisionLanguageModel, batch: Batch, units: Tensor, aux_weight: float
    ) -> ObjectiveOutput:
        mask = batch.masks[self.name]
        if self.codes is None:
            hidden = pixel_inputs(model, batch, self.stream)
        else:
            hidden = code_inputs(model, batch, self.name)
        encoded = model.encode(
            images_BCHW=batch.images_BCHW,
            tokens_N=mask["input_N"],
            text_lengths=batch.text_lengths,
            seed_B=batch.seed_B,
            **hidden,
        )
        if self.codes is None:
            pred_BMC = decode_pixels(model, encoded, batch, self.stream)
            patch_size = model.config.patch_size
            image, image_metrics = image_loss(pred_BMC, batch, mask["masked_M"], patch_size, self.stream)
        else:
            image, image_metrics = code_loss(model, encoded, batch, self.name, self.codes(batch))
        text, text_metrics = text_loss(model, encoded, batch, self.stream)
        metrics = {f"image_{k}": v for k, v in image_metrics.items()}
        metrics |= {f"text_{k}": v for k, v in text_metrics.items()}
        return with_routing(image / units[0] + text / units[1], metrics, encoded, aux_weight)
