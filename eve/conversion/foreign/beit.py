"""BEiT (Bao et al. 2022) and BEiT v2 (Peng et al. 2022) of microsoft/unilm: pre-training and classifiers.

They have images only: text embedding, word head and the text rows of relative positions are left to the seed.
"""

from __future__ import annotations

from dataclasses import replace
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from eve.config import Model
from eve.conversion.foreign import layers
from eve.conversion.foreign.format import Format, Sizes
from eve.conversion.foreign.names import Names
from eve.errors import UserError
from eve.model.relative_positions import num_rows
from eve.model.task_heads import ImageClassifier

SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
BLOCK_TABLE = "blocks.{}.attn.relative_position_bias_table"
# Of the relative positions of an image: class token to patch, patch to class token, to itself.
CLASS_ROWS = 3


def read_model(names: Names, sizes: Sizes) -> dict[str, Any]:
    """`heads`: null is what a table of relative positions has, or that of the official models
    (layers.official_heads). `image_size` is asked only where there are no positions at all. The text's sizes
    are those of the model to build."""
    width, _, patch, _ = names.shape("patch_embed.proj.weight")
    depth = names.count("blocks.")
    tables = [t for t in (SHARED_TABLE, BLOCK_TABLE.format(0)) if t in names]
    known = names.shape(tables[0])[1] if tables else None
    relative = "none" if not tables else "shared" if tables[0] == SHARED_TABLE else "blocks"
    tree: dict[str, Any] = {
        "image_size": _side(names, sizes, tables, patch) * patch,
        "patch_size": patch,
        "width": width,
        "depth": depth,
        "heads": sizes["heads"] or known or layers.official_heads(width, names.where),
        "hidden": names.shape("blocks.0.mlp.fc1.weight")[0],
        "vocab_size": sizes["vocab_size"],
        "max_text_length": sizes["text_positions"],
        "text_positions": sizes["text_positions"],
        "activation": "gelu",
        "layer_scale": 0.1 if "blocks.0.gamma_1" in names else None,
        "norm_eps": sizes["norm_eps"],
        "embedding_norm": False,
        "absolute_positions": "pos_embed" in names,
        "relative_positions": relative,
        "final_norm": "shared" if names.any("norm.") else "none",
        "mask_token": "mask_token" in names,
        "feed_forward": [{"blocks": list(range(depth)), "router": "shared"}],
        "decoder": None,
    }
    if names.any("lm_head."):
        tree["visual_codes"] = names.shape("lm_head.weight")[0]
    if names.any("cls_pt_layers."):
        tree["class_token_head"] = {
            "early": sizes["early"],
            "depth": names.count("cls_pt_layers."),
            "shared": not names.any("cls_pt_lm_head."),
        }
    return tree


def weights(names: Names, model: Model) -> dict[str, Tensor]:
    width = model.width
    found = {
        **layers.patch_projection(names, "patch_embed.proj", model),
        "encoder.image_embedding.class_token": names.take("cls_token", 1, 1, width)[0, 0],
        "encoder.type_embedding": torch.zeros(model.num_types, width),
    }
    if model.mask_token:
        found["encoder.image_embedding.mask_token"] = names.take("mask_token", 1, 1, width)[0, 0]
    if model.absolute_positions:
        position = names.take("pos_embed", 1, model.num_patches + 1, width)
        found["encoder.image_embedding.position"] = position[0]
    if model.relative_positions != "none":
        found["encoder.relative_positions.table_TRH"] = _tables(names, model)
    if model.final_norm == "shared":
        found |= names.layer("norm", "encoder.norm", width)
    for block in range(model.depth):
        found |= _block(names, model, f"blocks.{block}", f"encoder.blocks.{block}")
    if model.visual_codes is not None:
        found |= names.layer("lm_head", "code_head", model.visual_codes, width)
    if model.class_token_head is not None:
        for block in range(model.class_token_head.depth):
            source = f"cls_pt_layers.{block}"
            found |= _block(names, model, source, f"class_token_head.blocks.{block}")
        if not model.class_token_head.shared:
            found |= names.layer("cls_pt_norm", "class_token_head.norm", width)
            codes = model.visual_codes or 0
            found |= names.layer("cls_pt_lm_head", "class_token_head.codes", codes, width)
    return found


def _block(names: Names, model: Model, source: str, target: str) -> dict[str, Tensor]:
    width, hidden = model.width, model.hidden
    found = {
        **names.layer(f"{source}.norm1", f"{target}.norm1", width),
        **layers.attention(names, f"{source}.attn", f"{target}.attention", width),
        **names.layer(f"{source}.norm2", f"{target}.norm2", width),
        **layers.hard_experts(
            names, "shared", [f"{source}.mlp"], f"{target}.feed_forward.experts", width, hidden
        ),
    }
    if model.layer_scale is not None:
        found[f"{target}.gamma1"] = names.take(f"{source}.gamma_1", width)
        found[f"{target}.gamma2"] = names.take(f"{source}.gamma_2", width)
    return found


def _tables(names: Names, model: Model) -> Tensor:
    """Rows of the image, then those of the text, which BEiT lacks: zero, as a new table is."""
    sources = [SHARED_TABLE]
    if model.relative_positions == "blocks":
        sources = [BLOCK_TABLE.format(block) for block in range(model.depth)]
    side = model.image_size // model.patch_size
    image_rows = (2 * side - 1) ** 2 + CLASS_ROWS
    table_TRH = torch.zeros(len(sources), num_rows(side, model.text_positions), model.heads)
    for number, source in enumerate(sources):
        table_TRH[number, :image_rows] = names.take(source, image_rows, model.heads)
    return table_TRH


def heads(names: Names, model: Model) -> dict[str, nn.Module]:
    if not names.any("head."):
        return {}
    return {"image": image_classifier(names, model, norm="fc_norm", output="head")}


def image_classifier(names: Names, model: Model, *, norm: str, output: str) -> ImageClassifier:
    classes, width = names.shape(f"{output}.weight")
    mean_pool = names.any(f"{norm}.")
    head = ImageClassifier(width, classes, mean_pool=mean_pool, eps=model.norm_eps)
    state = names.layer(output, "output", classes, width)
    if mean_pool:
        state |= names.layer(norm, "norm", width)
    head.load_state_dict(state)
    return head.eval()


def _side(names: Names, sizes: Sizes, tables: list[str], patch: int) -> int:
    if "pos_embed" in names:
        return layers.side_of(names.shape("pos_embed")[1] - 1, names.where)
    if not tables:
        return sizes["image_size"] // patch
    rows = names.shape(tables[0])[0] - CLASS_ROWS
    offsets = isqrt(max(rows, 0))
    if offsets * offsets != rows or not offsets % 2:
        raise UserError(f"{names.where}: {tables[0]} has {rows + CLASS_ROWS} rows, no square picture's")
    return (offsets + 1) // 2


FORMAT = Format(
    title="BEiT (microsoft/unilm), pre-trained or a classifier",
    sizes={
        "heads": None,
        "image_size": 224,
        "vocab_size": 8,
        "text_positions": 3,
        "norm_eps": 1e-6,
        "early": 9,
    },
    read_model=read_model,
    weights=weights,
    heads=heads,
    buffers=("*relative_position_index",),
)
FORMAT_2 = replace(FORMAT, title="BEiT v2 (microsoft/unilm), pre-trained or a classifier")
