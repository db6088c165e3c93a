"""BEiT-3 (Wang et al. 2023) of microsoft/unilm: backbone, retrieval, VQA, NLVR2, image classes.

Positions begin at row 2 of their tables, a habit of fairseq; rows 0 and 1 are never used and are left out.
Theirs of images are the modules `A`, of texts `B`. Padding tokens start there as zeros, after positions; ours
are not packed at all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from eve.config import Model
from eve.conversion.foreign import layers
from eve.conversion.foreign.beit import image_classifier
from eve.conversion.foreign.format import Format, Sizes
from eve.conversion.foreign.names import Names
from eve.conversion.foreign.vlmo import classifier
from eve.model.task_heads import Classifier, Pooler

LAYERS = "beit3.encoder.layers."
PATCHES = "beit3.vision_embed.proj"
MODALITIES = (("image", "A"), ("text", "B"))
# Rows of a table of positions before the first place.
UNUSED = 2


def read_model(names: Names, sizes: Sizes) -> dict[str, Any]:
    """`heads`: null is that of the official models. `max_text_length`: null is all places of its table."""
    width, _, patch, _ = names.shape(f"{PATCHES}.weight")
    depth = names.count(LAYERS)
    places, length = (names.shape(_positions(theirs))[0] - UNUSED for _, theirs in MODALITIES)
    tree: dict[str, Any] = {
        "image_size": layers.side_of(places - 1, names.where) * patch,
        "patch_size": patch,
        "width": width,
        "depth": depth,
        "heads": sizes["heads"] or layers.official_heads(width, names.where),
        "hidden": names.shape(f"{LAYERS}0.ffn.A.fc1.weight")[0],
        "vocab_size": names.shape("beit3.text_embed.weight")[0],
        "max_text_length": sizes["max_text_length"] or length,
        "text_positions": length,
        "activation": "gelu",
        "layer_scale": None,
        "norm_eps": sizes["norm_eps"],
        "embedding_norm": False,
        "text_norm": "none",
        "attention": "modality",
        "key_bias": True,
        "sub_norm": names.any(f"{LAYERS}0.self_attn.inner_attn_ln."),
        "final_norm": "modality" if names.any("beit3.encoder.layer_norm.") else "none",
        "mask_token": "beit3.vision_embed.mask_token" in names,
        "feed_forward": [{"blocks": list(range(depth)), "router": "modality"}],
        "decoder": None,
    }
    if "logit_scale" in names:
        tree["contrast"] = {"width": names.shape("vision_head.weight")[0]}
    return tree


def weights(names: Names, model: Model) -> dict[str, Tensor]:
    width = model.width
    image, text = "encoder.image_embedding", "encoder.text_embedding"
    rows = {"image": model.num_patches + 1, "text": model.text_positions}
    found = {
        **layers.patch_projection(names, PATCHES, model),
        f"{image}.class_token": names.take("beit3.vision_embed.cls_token", 1, 1, width)[0, 0],
        f"{text}.word.weight": names.take("beit3.text_embed.weight", model.vocab_size, width),
        "encoder.type_embedding": torch.zeros(model.num_types, width),
    }
    for ours, theirs in MODALITIES:
        table = names.take(_positions(theirs), rows[ours] + UNUSED, width)
        found[f"encoder.{ours}_embedding.position"] = table[UNUSED:]
    if model.mask_token:
        found[f"{image}.mask_token"] = names.take("beit3.vision_embed.mask_token", 1, 1, width)[0, 0]
    if model.final_norm == "modality":
        found |= _norms(names, "beit3.encoder.layer_norm", "encoder.norm", width)
    for block in range(model.depth):
        found |= _block(names, model, f"{LAYERS}{block}", f"encoder.blocks.{block}")
    if model.contrast is not None:
        for ours, theirs in (("image", "vision"), ("text", "language")):
            projection = names.take(f"{theirs}_head.weight", model.contrast.width, width)
            found[f"contrast.{ours}.modality.weight"] = projection
        found["contrast.temperature_modality"] = names.take("logit_scale").view(1)
    return found


def _block(names: Names, model: Model, source: str, target: str) -> dict[str, Tensor]:
    width, hidden = model.width, model.hidden
    attention, experts = f"{target}.attention", f"{target}.feed_forward.experts"
    perceptrons = [f"{source}.ffn.{theirs}" for _, theirs in MODALITIES]
    found = {
        **_norms(names, f"{source}.self_attn_layer_norm", f"{target}.norm1", width),
        **_norms(names, f"{source}.final_layer_norm", f"{target}.norm2", width),
        **layers.hard_experts(names, "modality", perceptrons, experts, width, hidden),
    }
    for ours, theirs in MODALITIES:
        parts = {
            part: names.layer(f"{source}.self_attn.{part}_proj.{theirs}", "layer", width, width)
            for part in "qkv"
        }
        qkv = torch.cat([parts[part]["layer.weight"] for part in "qkv"])
        found[f"{attention}.qkv.{ours}.weight"] = qkv
        found |= {f"{attention}.qkv.{ours}.{p}_bias": layer["layer.bias"] for p, layer in parts.items()}
        projection = f"{source}.self_attn.out_proj.{theirs}"
        found |= names.layer(projection, f"{attention}.proj.{ours}", width, width)
    if model.sub_norm:
        found |= _norms(names, f"{source}.self_attn.inner_attn_ln", f"{attention}.sub_norm", width)
        for (ours, _), source_of_one in zip(MODALITIES, perceptrons, strict=True):
            found |= names.layer(f"{source_of_one}.ffn_layernorm", f"{experts}.{ours}.sub_norm", hidden)
    return found


def _norms(names: Names, source: str, target: str, width: int) -> dict[str, Tensor]:
    return layers.norms(names, [f"{source}.{theirs}" for _, theirs in MODALITIES], target, width)


def _positions(theirs: str) -> str:
    return f"beit3.encoder.embed_positions.{theirs}.weight"


def heads(names: Names, model: Model) -> dict[str, nn.Module]:
    """`vqa` takes the image's class token of a pair; `nlvr2` the class tokens of image and text of the first
    pair, then of the second, in one row."""
    if names.any("pooler."):
        return {"vqa": nn.Sequential(_pooler(names, model.width), classifier(names, "head"))}
    if names.any("head.dense1."):
        return {"nlvr2": _nlvr2(names)}
    if names.any("fc_norm."):
        return {"image": image_classifier(names, model, norm="fc_norm", output="head")}
    return {}


def _pooler(names: Names, width: int) -> Pooler:
    head = Pooler(width)
    state = names.layer("pooler.norm", "norm", width)
    head.load_state_dict(state | names.layer("pooler.dense", "dense", width, width))
    return head.eval()


def _nlvr2(names: Names) -> nn.Module:
    hidden, width = names.shape("head.dense1.weight")
    classes = names.shape("head.dense2.weight")[0]
    head = nn.Sequential(nn.LayerNorm(width), Classifier(width, hidden, classes))
    state = names.layer("head.norm1", "0", width)
    state |= names.layer("head.dense1", "1.dense", hidden, width)
    state |= names.layer("head.norm2", "1.norm", hidden)
    head.load_state_dict(state | names.layer("head.dense2", "1.output", classes, hidden))
    return head.eval()


FORMAT = Format(
    title="BEiT-3 (microsoft/unilm), backbone or any task but captions",
    sizes={"heads": None, "max_text_length": None, "norm_eps": 1e-5},
    read_model=read_model,
    weights=weights,
    heads=heads,
)
