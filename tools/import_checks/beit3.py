"""BEiT-3: features and hidden states of pair, image and text, masked patches, contrast; VQA and NLVR2.

Shape suffixes: B sample, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from eve.conversion.foreign.formats import Imported
from eve.model import VisionLanguageModel
from eve.objectives.contrast import contrast_loss, similarity
from eve.packing import TokenLayout
from tools.import_checks.fixture import Fixture
from tools.import_checks.trace import Trace, texts

PATH = "modality"


def retrieval(fixture: Fixture) -> dict[str, Tensor]:
    model, inputs, text = _build(_imported(fixture)), fixture.inputs, _texts(fixture)
    images_BCHW, masked_BP = inputs["image"], inputs["vision_masked_position"].bool()
    image, words = Trace(model, images_BCHW=images_BCHW), Trace(model, **text)
    head = model.contrast
    assert head is not None
    image_BD = head.project_images(image.encoded.image_class_BD, PATH)
    text_BD = head.project_texts(words.encoded.text_class_BD, PATH)
    masked = Trace(model, images_BCHW=images_BCHW, masked_BP=masked_BP, **text)
    return {
        **_pair(model, fixture, Trace(model, images_BCHW=images_BCHW, **text)),
        "pair_masked_feats": masked.features_BLD,
        "image_feats": image.features_BLD,
        "image_hidden_states": image.hidden_EBLD,
        "text_feats": words.features_BLD,
        "text_hidden_states": words.hidden_EBLD,
        "vision_cls": image_BD,
        "language_cls": text_BD,
        "itc_loss": contrast_loss(similarity(image_BD, text_BD, head.scale(PATH))).mean(),
    }


def vqa(fixture: Fixture) -> dict[str, Tensor]:
    imported = _imported(fixture)
    model = _build(imported)
    pair = Trace(model, images_BCHW=fixture.inputs["image"], **_texts(fixture))
    head = imported.heads["vqa"]
    assert isinstance(head, nn.Sequential)
    class_BD = pair.encoded.image_class_BD
    return {
        **_pair(model, fixture, pair),
        "pooled": head[0](class_BD),
        "vqa_logits": head(class_BD),
    }


def nlvr2(fixture: Fixture) -> dict[str, Tensor]:
    imported = _imported(fixture)
    model, text = _build(imported), _texts(fixture)
    classes = []
    for name in ("image", "image_b"):
        encoded = model.encode(images_BCHW=fixture.inputs[name], **text)
        classes += [encoded.image_class_BD, encoded.text_class_BD]
    return {"nlvr2_logits": imported.heads["nlvr2"](torch.cat(classes, dim=1))}


def _pair(model: VisionLanguageModel, fixture: Fixture, pair: Trace) -> dict[str, Tensor]:
    image, text = model.encoder.image_embedding, model.encoder.text_embedding
    assert image.position is not None
    images_BCHW = fixture.inputs["image"]
    image_BID = image(images_BCHW, None).view(len(images_BCHW), *image.position.shape) - image.position
    embedded = torch.cat([image_BID, text.word(fixture.inputs["text_ids"])], dim=1)
    return {
        "pair_feats": pair.features_BLD,
        "pair_hidden_states": pair.hidden_EBLD,
        # Before positions are added.
        "pair_embed": embedded,
    }


def _build(imported: Imported) -> VisionLanguageModel:
    """Padding tokens, which we do not have in training, start as zeros there."""
    model = imported.build()

    def zero_padding(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x_TD, layout, *others = given
        assert isinstance(layout, TokenLayout)
        if layout.keys_BL is None:
            return None
        return (x_TD * layout.keys_BL.flatten()[layout.slot_T, None], layout, *others)

    model.encoder.blocks[0].register_forward_pre_hook(zero_padding)
    return model


def _imported(fixture: Fixture) -> Imported:
    return fixture.imported("beit3", heads=fixture.hyper["heads"], norm_eps=fixture.hyper["layernorm_eps"])


def _texts(fixture: Fixture) -> dict[str, Any]:
    return texts(fixture.inputs["text_ids"], fixture.inputs["padding_mask"])


CHECKS = {"beit3_retrieval": retrieval, "beit3_vqa": vqa, "beit3_nlvr2": nlvr2}
