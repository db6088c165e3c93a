"""Floating-point operations of a step, from the recipe and the true numbers of tokens; MFU.

Counted: all matrix products (a multiply and an add are two operations). Per token only the experts
it goes to, per sample only its own tokens: what a padded or dense implementation would waste is not
credited. Not counted: norms, activations, softmax, embeddings, sums of the routers over groups, the
optimizer, the visual tokenizer. Backward is twice forward, as usual (PaLM, appendix B), although pixels need
no gradient.

`model` operations are what the mathematics needs, and MFU is taken of them; `hardware` adds the second
forward pass of the blocks under activation checkpointing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from eve.config import Model, Stream
from eve.data.batch import Batch

# Dense bf16 (V100, T4: fp16) tensor-core peaks in FLOP/s, from the vendors' data sheets. The first name that
# is in the device's name as whole words counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 150e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
    "MI300X": 1307e12,
    "MI250X": 383e12,
}


@dataclass(frozen=True)
class StepFlops:
    """Forward and backward. They add up: `sum(parts, start=StepFlops())`."""

    model: int = 0
    hardware: int = 0

    def __add__(self, other: StepFlops) -> StepFlops:
        return StepFlops(self.model + other.model, self.hardware + other.hardware)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of one device in FLOP/s; None where it is not known, such as for a CPU."""
    return next((peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)


def mfu(model_flops: float, seconds: float, num_devices: int, device_name: str) -> float | None:
    """Model FLOP utilisation: the share of the bf16 peak of all devices; None where the peak is not known."""
    peak = peak_flops(device_name)
    return None if peak is None else model_flops / seconds / (peak * num_devices)


def batch_flops(model: Model, stream: Stream, batch: Batch, *, checkpointing: bool = False) -> StepFlops:
    """Forward and backward of one stream on one (micro-)batch of this rank. Reads shapes only."""
    if stream.is_pooled:
        return _backward_too(_pair_flops(model, stream, batch), checkpointing)
    masks = batch.masks[stream.name]
    num_visible = num_masked_patches = 0
    if batch.images_BCHW is not None:
        num_visible = model.num_patches
    if "masked_M" in masks:
        num_masked_patches = masks["masked_M"].shape[1]
    if "visible_V" in masks and stream.image_input == "visible":
        num_visible = masks["visible_V"].shape[1]
    codes = stream.image_target == "codes"
    parts = forward_flops(
        model,
        num_samples=batch.size,
        num_visible=num_visible,
        text_lengths=batch.text_lengths,
        num_masked_patches=0 if codes else num_masked_patches,
        mask_tokens=stream.image_input == "mask_token",
        num_masked_codes=batch.size * num_masked_patches if codes else 0,
        num_masked_words=len(masks["target_N"]) if "target_N" in masks else 0,
    )
    return _backward_too(parts, checkpointing)


def _backward_too(parts: dict[str, int], checkpointing: bool) -> StepFlops:
    forward = sum(parts.values())
    again = parts["blocks"] if checkpointing else 0
    return StepFlops(model=3 * forward, hardware=3 * forward + again)


def _pair_flops(model: Model, stream: Stream, batch: Batch) -> dict[str, int]:
    """Forward of contrast (image and text alone, on each path, and the projections) and of matching (three
    fused pairs, negative texts taken to be as long as the batch's). The logits of contrast are left out: they
    depend on the pool, and are few."""
    size, texts, width = batch.size, batch.text_lengths, model.width
    parts = {"blocks": 0, "others": 0}

    def add(num_visible: int, lengths: Sequence[int]) -> None:
        one = forward_flops(model, num_samples=len(lengths), num_visible=num_visible, text_lengths=lengths)
        parts["blocks"] += one.pop("blocks")
        parts["others"] += sum(one.values())

    if model.contrast is not None and "contrast" in stream.objective:
        add(model.num_patches, [0] * size)
        add(0, texts)
        parts["others"] += len(model.contrast.paths) * 2 * 2 * size * width * model.contrast.width
        if "fusion" in model.contrast.paths:
            again = range(model.first_fusion, model.depth)
            for lengths in ([1 + model.num_patches] * size, texts):
                parts["blocks"] += blocks_flops(model, lengths, again)
    if model.matching is not None and "matching" in stream.objective:
        add(model.num_patches, [*texts, *texts, *texts])
        pooler = width * width if model.matching.pooler else 0
        parts["others"] += 2 * 3 * size * (pooler + 2 * width)
    return parts


def forward_flops(
    model: Model,
    *,
    num_samples: int,
    num_visible: int,
    text_lengths: Sequence[int],
    num_masked_patches: int = 0,
    mask_tokens: bool = False,
    num_masked_codes: int = 0,
    num_masked_words: int = 0,
) -> dict[str, int]:
    """Operations of one forward pass: `embedding`, `blocks` (encoder), `decoder`, `code_head`, `word_head`.

    Args:
        num_samples: samples of the batch.
        num_visible: patches of each sample that enter the encoder; 0 where there is no image.
        text_lengths: text tokens of each sample, [CLS] and [SEP] included; zeros where there is no text.
        num_masked_patches: patches of each sample that the decoder predicts; 0 runs no decoder.
        mask_tokens: the encoder has seen mask tokens, and the decoder adds none.
        num_masked_codes: patches of the whole batch whose codes are predicted.
        num_masked_words: words of the whole batch that the word head predicts.
    """
    pixels, width = 3 * model.patch_size**2, model.width
    num_image = 1 + num_visible if num_visible else 0
    lengths = [num_image + text for text in text_lengths]
    blocks = blocks_flops(model, lengths, range(model.depth))
    decoder = 0
    if num_masked_patches:
        assert model.decoder is not None
        narrow, seen = model.decoder.width, num_samples * num_image
        length = num_image + (0 if mask_tokens else num_masked_patches)
        # Multiply-adds per token: projections of attention 4 W^2, feed-forward 2 W F.
        per_token = 4 * narrow**2 + 2 * narrow * model.decoder.hidden_width
        attention = _attention_flops(narrow, [length] * num_samples)
        per_block = 2 * per_token * num_samples * length + attention
        decoder = (
            2 * seen * width * narrow
            + model.decoder.depth * per_block
            + 2 * num_samples * num_masked_patches * narrow * pixels
        )
    return {
        "embedding": 2 * num_samples * num_visible * pixels * width,
        "blocks": blocks,
        "decoder": decoder,
        "code_head": _code_flops(model, num_samples, num_image, num_masked_codes),
        "word_head": 2 * num_masked_words * (width * width + width * model.vocab_size),
    }


def blocks_flops(model: Model, lengths: Sequence[int], blocks: range) -> int:
    """Forward of samples of so many tokens through these blocks of the encoder."""
    attention = _attention_flops(model.width, lengths)
    return sum(sum(lengths) * _token_flops(model, block) + attention for block in blocks)


def _code_flops(model: Model, num_samples: int, num_image: int, num_codes: int) -> int:
    """The head of masked patches' codes, and BEiT v2's second one with its blocks over the image tokens."""
    if not num_codes:
        return 0
    assert model.visual_codes is not None
    output = 2 * num_codes * model.width * model.visual_codes
    if model.class_token_head is None:
        return output
    per_token = 2 * (4 * model.width**2 + 2 * model.width * model.hidden)
    block = num_samples * num_image * per_token + _attention_flops(model.width, [num_image] * num_samples)
    return 2 * output + model.class_token_head.depth * block


def _token_flops(model: Model, block: int) -> int:
    """Linear layers of one token in one block: query, key, value, projection, its experts, the gate."""
    feed_forward = model.feed_forward_of(block)
    attention = 4 * model.width**2
    expert = 2 * model.width * model.hidden
    if feed_forward.router != "topk":
        return 2 * (attention + expert)
    gate = model.width * feed_forward.num_experts
    return 2 * (attention + feed_forward.k * expert + gate)


def _attention_flops(width: int, lengths: Sequence[int]) -> int:
    """Logits and weighted sum: two products of L x L x width a sample."""
    return sum(4 * length * length * width for length in lengths)
