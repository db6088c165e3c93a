"""VLMo: features of text, image and pair, contrast, matching, masked text, classes; its ways of loading.

Shape suffixes: B sample, N text token of a sample, I image token, D width, L block.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eve.config import Model, Start
from eve.conversion.foreign import vlmo
from eve.conversion.foreign.fitting import Fitting
from eve.conversion.foreign.formats import import_state
from eve.conversion.foreign.positions import resize_absolute, resize_relative, resize_text
from eve.model import VisionLanguageModel
from eve.model.encoder import EncoderOutput
from eve.model.relative_positions import image_index, pair_index
from eve.objectives.contrast import contrast_loss, similarity
from eve.objectives.matching import matching_loss, negative_weights
from tools.import_checks.fixture import Fixture
from tools.import_checks.hidden_states import HiddenStates

# The official weight of masked text in the sum of losses.
MASKED_TEXT_WEIGHT = 0.25


def pretrain(fixture: Fixture) -> dict[str, Tensor]:
    """All that one set of weights computes: dual encoder, fusion, and the heads that the state has."""
    imported = fixture.imported("vlmo", **_sizes(fixture))
    model, inputs = imported.build(), fixture.inputs
    images_BCHW = inputs["image"]
    text, masked_text = (_texts(fixture, ids) for ids in ("text_ids", "text_ids_mlm"))
    found = _embeddings(model, images_BCHW, text)
    hidden = HiddenStates(model)
    with hidden:
        pair = model.encode(images_BCHW=images_BCHW, **text)
    states = hidden.texts(pair.layout), hidden.images(pair.layout)
    assert model.matching is not None
    found |= {
        "pair_text_feats": _by_sample(pair),
        "pair_image_feats": pair.images_BID,
        "pair_cls_feats": model.matching.pool(pair.text_class_BD),
        "pair_raw_cls_feats": pair.text_class_BD,
        "pair_hidden_states": torch.cat(states, dim=2),
    }
    found |= _towers(model, images_BCHW, text)
    if model.contrast is not None:
        found |= _contrast(model, found)
        found |= _matching(model, fixture, found)
    pair_words = model.encode(images_BCHW=images_BCHW, **masked_text)
    text_words = model.encode(**masked_text)
    for name, encoded, weight in (("mlm", pair_words, MASKED_TEXT_WEIGHT), ("textmlm", text_words, 1.0)):
        logits = model.word_head(_by_sample(encoded))
        targets = inputs["text_labels_mlm"].flatten()
        found[f"{name}_logits"] = logits
        found[f"{name}_loss"] = weight * F.cross_entropy(logits.flatten(0, 1), targets)
    if "vqa" in imported.heads:
        logits = found["vqa_logits"] = imported.heads["vqa"](found["pair_cls_feats"])
        loss = F.binary_cross_entropy_with_logits(logits, inputs["vqa_targets"])
        found["vqa_loss"] = loss * logits.shape[1]
    return found | _index_tables(model)


def nlvr2(fixture: Fixture) -> dict[str, Tensor]:
    imported = fixture.imported("vlmo", **_sizes(fixture))
    model, text = imported.build(), _texts(fixture, "text_ids")
    assert model.matching is not None
    found: dict[str, Tensor] = {}
    classes = []
    for number, image in ((1, "image"), (2, "image2")):
        encoded = model.encode(images_BCHW=fixture.inputs[image], image_type=number, **text)
        classes.append(model.matching.pool(encoded.text_class_BD))
        found[f"image{number}_cls_feats"] = classes[-1]
        found[f"image{number}_text_feats"] = _by_sample(encoded)
        found[f"image{number}_image_feats"] = encoded.images_BID
    logits = found["nlvr2_logits"] = imported.heads["nlvr2"](torch.cat(classes, dim=1))
    return found | {"nlvr2_loss": F.cross_entropy(logits, fixture.inputs["answers"])}


def from_beit(fixture: Fixture) -> dict[str, Tensor]:
    """BEiT's weights as the start of a VLMo of the same picture, in the official layout."""
    hyper = fixture.hyper
    source = import_state(fixture.inputs, "beit", {"heads": hyper["heads"]}, where=fixture.where)
    source_model = source.model.model_dump()
    target = Model.model_validate(
        {
            **source_model,
            "image_size": hyper["image_size"],
            "vocab_size": hyper["vocab"],
            "max_text_length": hyper["dst_text"],
            "text_positions": hyper["init"],
            "text_norm": "after_positions",
            "final_norm": "shared",
            "absolute_positions": source.model.relative_positions == "none",
            "relative_positions": "none" if source.model.relative_positions == "none" else "blocks",
            "mask_token": False,
            "visual_codes": None,
            "class_token_head": None,
            "feed_forward": [{"blocks": range(hyper["depth"]), "router": "modality"}],
            "matching": {},
        }
    )
    fitting = Fitting(source, target, Start(), seed=hyper["seed"], where=fixture.where)
    return vlmo.state({name: fitting.read(name) for name in fitting.shapes}, target)


def interpolate_rel(fixture: Fixture) -> dict[str, Tensor]:
    hyper = fixture.hyper
    table_TRH = vlmo.tables(fixture.inputs[vlmo.TABLE], hyper["depth"])
    sides = [hyper[key] // hyper["patch"] for key in ("src", "dst")]
    return {vlmo.TABLE: vlmo.joined(resize_relative(table_TRH, *sides, *[hyper["init"]] * 2))}


def interpolate_abs(fixture: Fixture) -> dict[str, Tensor]:
    side, length = fixture.hyper["dst"] // fixture.hyper["patch"], fixture.hyper["dst_text"]
    image, text = "transformer.pos_embed", "text_embeddings.position_embeddings.weight"
    return {
        image: resize_absolute(fixture.inputs[image][0], side)[None],
        text: resize_text(fixture.inputs[text], length),
        "text_embeddings.position_ids": vlmo.position_ids(length),
    }


def _sizes(fixture: Fixture) -> dict[str, Any]:
    hyper = fixture.hyper
    return {
        "heads": hyper["num_heads"],
        "image_size": hyper["image_size"],
        "max_text_length": hyper["max_text_len"],
        "norm_eps": hyper["eps"],
    }


def _texts(fixture: Fixture, ids: str) -> dict[str, Any]:
    """The texts of that input for Encoder.forward, their padding among the tokens but hidden."""
    ids_BN, masks_BN = fixture.inputs[ids], fixture.inputs["text_masks"]
    return {
        "tokens_N": ids_BN.flatten(),
        "text_lengths": [ids_BN.shape[1]] * ids_BN.shape[0],
        "padding_N": (masks_BN == 0).flatten(),
    }


def _by_sample(encoded: EncoderOutput) -> Tensor:
    """(B, N, D): all texts have one length here."""
    return encoded.texts_ND.view(encoded.layout.num_samples, -1, encoded.texts_ND.shape[-1])


def _embeddings(model: VisionLanguageModel, images_BCHW: Tensor, text: dict[str, Any]) -> dict[str, Tensor]:
    """What goes into the first block."""
    inputs: list[Tensor] = []
    hook = model.encoder.blocks[0].register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    layout = model.encode(images_BCHW=images_BCHW, **text).layout
    hook.remove()
    image, words = inputs[0].split([layout.num_image, layout.num_text])
    width = image.shape[-1]
    return {
        "embed_image": image.view(layout.num_samples, -1, width),
        "embed_text": words.view(layout.num_samples, -1, width),
    }


def _towers(model: VisionLanguageModel, images_BCHW: Tensor, text: dict[str, Any]) -> dict[str, Tensor]:
    """Image and text on their own: through the experts of their modality, and through those of pairs."""
    hidden = HiddenStates(model)
    with hidden:
        texts = model.encode(both_paths=True, **text)
    text_last_BND = hidden.texts(texts.layout)[-1]
    with hidden:
        images = model.encode(both_paths=True, images_BCHW=images_BCHW)
    image_last_BID = hidden.images(images.layout)[-1]
    found = {
        "text_feats": _by_sample(texts),
        "image_feats": images.images_BID,
        "text_raw_cls_feats": text_last_BND[:, 0],
        "image_raw_cls_feats": image_last_BID[:, 0],
    }
    if model.contrast is None:
        return found
    for path, name in (("modality", "cls_feats"), ("fusion", "cls_vlffn_feats")):
        if path not in model.contrast.config.paths:
            continue
        text_path = texts if path == "modality" else texts.fusion
        image_path = images if path == "modality" else images.fusion
        assert text_path is not None
        assert image_path is not None
        found[f"text_{name}"] = model.contrast.project_texts(text_path.text_class_BD, path)
        found[f"image_{name}"] = model.contrast.project_images(image_path.image_class_BD, path)
    # Fine-tuned for retrieval it is used so.
    for modality in ("text", "image"):
        found[f"{modality}_ft_cls_feats"] = found[f"{modality}_cls_feats"]
    return found


def _contrast(model: VisionLanguageModel, vectors: dict[str, Tensor]) -> dict[str, Tensor]:
    assert model.contrast is not None
    found: dict[str, Tensor] = {}
    losses = []
    for path, middle, name in (("modality", "", "cls_feats"), ("fusion", "vl_", "cls_vlffn_feats")):
        if path not in model.contrast.config.paths:
            continue
        scale = model.contrast.scale(path)
        logits = similarity(vectors[f"image_{name}"], vectors[f"text_{name}"], scale)
        found[f"itc_{middle}i2t_logits"] = logits.image_to_text_BN
        found[f"itc_{middle}t2i_logits"] = logits.text_to_image_BN
        losses.append(contrast_loss(logits).mean())
    return found | {"itc_loss": torch.stack(losses).mean()}


def _matching(model: VisionLanguageModel, fixture: Fixture, logits: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pairs, then each text with its negative image, then each image with its negative text."""
    assert model.matching is not None
    inputs = fixture.inputs
    own = torch.arange(len(inputs["image"]))
    images = torch.cat([own, inputs["itm_neg_image_idx"], own])
    texts = torch.cat([own, own, inputs["itm_neg_text_idx"]])
    text = {
        "tokens_N": inputs["text_ids"][texts].flatten(),
        "text_lengths": [inputs["text_ids"].shape[1]] * len(texts),
        "padding_N": (inputs["text_masks"][texts] == 0).flatten(),
    }
    encoded = model.encode(images_BCHW=inputs["image"][images], **text)
    match = model.matching(encoded.text_class_BD)
    labels = (torch.arange(len(texts)) < len(own)).long()
    found = {"itm_logits": match, "itm_labels": labels, "itm_loss": matching_loss(match, labels).mean()}
    for way in ("i2t", "t2i"):
        itself = torch.eye(len(own), dtype=torch.bool)
        found[f"itm_weights_{way}"] = negative_weights(logits[f"itc_{way}_logits"], itself)
    return found


def _index_tables(model: VisionLanguageModel) -> dict[str, Tensor]:
    """Of relative positions; theirs have the text first."""
    config = model.config
    if config.relative_positions == "none":
        return {}
    side = config.image_size // config.patch_size
    num_image, length = 1 + side * side, config.max_text_length
    index = pair_index(side, config.text_positions)
    order = torch.cat([torch.arange(num_image, num_image + length), torch.arange(num_image)])
    index = index[order][:, order]
    return {
        "relative_position_index": image_index(side),
        "text_relative_position_index": index[:length, :length],
        "text_imag_relative_position_index": index,
    }


CHECKS = {
    "vlmo_rel": pretrain,
    "vlmo_abs": pretrain,
    "vlmo_nlvr2": nlvr2,
    "vlmo_from_beit": from_beit,
    "vlmo_interpolate_rel": interpolate_rel,
    "vlmo_interpolate_abs": interpolate_abs,
}
