"""Which parameters a stream uses.

What no stream of a stage uses is frozen (eve/training/stages.py): it gets no gradient, and the decay of
weights would shrink it all the same (AdamW under ZeRO).
"""

from __future__ import annotations

import re

from eve.config import Model, Stream

_BLOCK = re.compile(r"^encoder\.blocks\.(\d+)\.(.*)$")


def uses(stream: Stream, kind: str, model: Model, name: str) -> bool:
    """Whether a parameter takes part in the stream's loss on samples of a kind: pair, image or text.

    It may still get a gradient of zeros: in the last block, of tokens from which nothing is predicted.
    """
    if name.startswith("encoder."):
        return _in_encoder(stream, kind, model, name)
    objective = stream.objective
    codes = objective in ("masked_codes", "masked_pair") and stream.image_target == "codes"
    pixels = objective in ("masked_image", "masked_pair") and not codes
    head = name.partition(".")[0]
    if name == "decoder.mask_token":
        return pixels and stream.image_input == "visible"
    if name.startswith("class_token_head.") and model.class_token_head is not None:
        return codes and ".text." not in name
    return {
        "decoder": pixels,
        "word_head": objective in ("masked_text", "masked_pair"),
        "code_head": codes,
        "contrast": "contrast" in objective,
        "matching": "matching" in objective,
    }[head]


def _in_encoder(stream: Stream, kind: str, model: Model, name: str) -> bool:
    image, text = kind != "text", kind != "image"
    if name == "encoder.image_embedding.mask_token":
        return image and stream.image_input == "mask_token" and not stream.is_pooled
    if name.startswith("encoder.image_embedding."):
        return image
    if name.startswith("encoder.text_embedding."):
        return text
    match = _BLOCK.match(name)
    if match is None:
        return True
    feed_forward, rest = model.feed_forward_of(int(match[1])), match[2]
    if re.match(r"attention\.(qkv|proj)\.(image|text)\.", rest):
        return image if ".image." in rest else text
    if not rest.startswith("feed_forward.") or feed_forward.router in ("shared", "modality"):
        return image if ".experts.image." in rest else text if ".experts.text." in rest else True
    if feed_forward.router == "topk" and not feed_forward.fusion_expert:
        return True
    # Image and text each alone in contrast; else the tokens of a pair are fused.
    alone = kind != "pair" or "contrast" in stream.objective
    paths = model.contrast.paths if model.contrast else ()
    fused = kind == "pair" and (stream.objective != "contrast" or "fusion" in paths)
    if ".fusion." in rest:
        return fused
    if feed_forward.router == "fusion":
        return alone and (image if ".experts.image." in rest else text)
    return alone
