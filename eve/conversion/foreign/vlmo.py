"""VLMo (Bao et al. 2022): `vlmo` of microsoft/unilm, any stage, size and task.

Of the official tensors these have no place of their own here. The row that BERT adds to every word
(`text_embeddings.token_type_embeddings`, row 0; its row 1 is never used) is added to the word table. A table
of text positions beside relative positions is never used there. Both are written back as zeros, and the model
computes the same.

Shape suffixes: T block, R row of the table of relative positions, H head.
"""

from __future__ import annotations

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
from eve.model.task_heads import Classifier

EXPERTS = ("imag", "text", "vl")
TABLE = "relative_position_bias_table"
# Contrast: projection and temperature of each path through the experts.
PATHS = {"modality": ("itc_{}_proj", "logit_scale"), "fusion": ("itc_vl_{}_proj", "logit_vl_scale")}
CLASSIFIERS = ("vqa", "nlvr2")


def read_model(names: Names, sizes: Sizes) -> dict[str, Any]:
    """`heads`: null is what the table of relative positions has, or without one that of the official models
    (layers.official_heads). `image_size`: null is what `text_positions` leave of that table, or the
    table of absolute positions."""
    width, _, patch, _ = names.shape("transformer.patch_embed.proj.weight")
    depth = names.count("transformer.blocks.")
    words = names.shape("text_embeddings.word_embeddings.weight")[0]
    routers = [_router(names, block) for block in range(depth)]
    tree: dict[str, Any] = {
        "patch_size": patch,
        "width": width,
        "depth": depth,
        "hidden": names.shape("transformer.blocks.0.mlp_imag.fc1.weight")[0],
        "vocab_size": words,
        "activation": "gelu",
        "layer_scale": 0.1 if "transformer.blocks.0.gamma_1" in names else None,
        "norm_eps": sizes["norm_eps"],
        "text_norm": "after_positions",
        "text_norm_eps": 1e-12,
        "embedding_norm": False,
        "num_types": names.shape("token_type_embeddings.weight")[0],
        "decoder": None,
        "feed_forward": [
            {"blocks": [b for b in range(depth) if routers[b] == kind], "router": kind}
            for kind in ("modality", "fusion")
            if kind in routers
        ],
        **_positions(names, sizes, depth, patch),
    }
    tree["heads"] = sizes["heads"] or tree.get("heads") or layers.official_heads(width, names.where)
    paths = [path for path, (_, scale) in PATHS.items() if scale in names]
    if paths:
        vector = names.shape(f"{PATHS[paths[0]][0].format('text')}.fc.weight")[0]
        tree["contrast"] = {"width": vector, "paths": paths}
    if names.any("pooler.") or names.any("itm_score."):
        tree["matching"] = {}
    return tree


def weights(names: Names, model: Model) -> dict[str, Tensor]:
    width = model.width
    word = names.take("text_embeddings.word_embeddings.weight", model.vocab_size, width)
    types = names.take("text_embeddings.token_type_embeddings.weight", 2, width)
    outer = names.take("token_type_embeddings.weight", model.num_types, width)
    found = {
        **layers.patch_projection(names, "transformer.patch_embed.proj", model),
        "encoder.image_embedding.class_token": names.take("transformer.cls_token", 1, 1, width)[0, 0],
        "encoder.text_embedding.word.weight": word + types[0],
        **names.layer("text_embeddings.LayerNorm", "encoder.text_embedding.norm", width),
        # Theirs: text, image, second image.
        "encoder.type_embedding": outer[[1, 0, 2][: model.num_types]],
        **names.layer("transformer.norm", "encoder.norm", width),
    }
    if model.absolute_positions:
        image = names.take("transformer.pos_embed", 1, model.num_patches + 1, width)
        text = names.take("text_embeddings.position_embeddings.weight", model.text_positions, width)
        found["encoder.image_embedding.position"] = image[0]
        found["encoder.text_embedding.position"] = text
    if model.relative_positions != "none":
        rows = names.shape(TABLE)[0]
        table = names.take(TABLE, rows, model.heads * model.depth)
        found["encoder.relative_positions.table_TRH"] = tables(table, model.depth)
    for block in range(model.depth):
        found |= _block(names, model, block)
    return found | _heads(names, model)


def _block(names: Names, model: Model, block: int) -> dict[str, Tensor]:
    source, target, width = f"transformer.blocks.{block}", f"encoder.blocks.{block}", model.width
    kinds = _experts(model, block)
    found = {
        **names.layer(f"{source}.norm1", f"{target}.norm1", width),
        **layers.attention(names, f"{source}.attn", f"{target}.attention", width),
        **layers.norms(names, [f"{source}.norm2_{kind}" for kind in kinds], f"{target}.norm2", width),
        **layers.hard_experts(
            names,
            model.feed_forward_of(block).router,
            [f"{source}.mlp_{kind}" for kind in kinds],
            f"{target}.feed_forward.experts",
            width,
            model.hidden,
        ),
    }
    if model.layer_scale is not None:
        found[f"{target}.gamma1"] = names.take(f"{source}.gamma_1", width)
        found[f"{target}.gamma2"] = names.take(f"{source}.gamma_2", width)
    return found


def _heads(names: Names, model: Model) -> dict[str, Tensor]:
    """Those of pre-training that the source has."""
    width, found = model.width, {}
    if names.any("mlm_score."):
        found |= names.layer("mlm_score.transform.dense", "word_head.dense", width, width)
        found |= names.layer("mlm_score.transform.LayerNorm", "word_head.norm", width)
        found["word_head.output.weight"] = names.take("mlm_score.decoder.weight", model.vocab_size, width)
        found["word_head.output.bias"] = names.take("mlm_score.bias", model.vocab_size)
    if names.any("pooler."):
        found |= names.layer("pooler.dense", "matching.pooler", width, width)
    if names.any("itm_score."):
        found |= names.layer("itm_score.fc", "matching.output", 2, width)
    if model.contrast is not None:
        for path in model.contrast.paths:
            projection, scale = PATHS[path]
            for modality in ("image", "text"):
                name = f"{projection.format(modality)}.fc.weight"
                found[f"contrast.{modality}.{path}.weight"] = names.take(name, model.contrast.width, width)
            found[f"contrast.temperature_{path}"] = names.take(scale).view(1)
    return found


def heads(names: Names, model: Model) -> dict[str, nn.Module]:
    return {
        task: classifier(names, f"{task}_classifier")
        for task in CLASSIFIERS
        if names.any(f"{task}_classifier.")
    }


def classifier(names: Names, source: str) -> Classifier:
    """Linear, norm, (GELU), linear as a sequence of modules."""
    hidden, width = names.shape(f"{source}.0.weight")
    classes = names.shape(f"{source}.3.weight")[0]
    head = Classifier(width, hidden, classes)
    state = names.layer(f"{source}.0", "dense", hidden, width)
    state |= names.layer(f"{source}.1", "norm", hidden)
    state |= names.layer(f"{source}.3", "output", classes, hidden)
    head.load_state_dict(state)
    return head.eval()


def state(weights: dict[str, Tensor], model: Model) -> dict[str, Tensor]:
    """The official layout. Raises UserError for a model that VLMo has no such weights for."""
    _check_exportable(model)
    width = model.width
    order = [1, 0, 2][: model.num_types]
    found = {
        **layers.patch_convolution(weights, "transformer.patch_embed.proj", model),
        "transformer.cls_token": weights["encoder.image_embedding.class_token"].view(1, 1, -1),
        "transformer.norm.weight": weights["encoder.norm.weight"],
        "transformer.norm.bias": weights["encoder.norm.bias"],
        "text_embeddings.word_embeddings.weight": weights["encoder.text_embedding.word.weight"],
        "text_embeddings.token_type_embeddings.weight": torch.zeros(2, width),
        "text_embeddings.LayerNorm.weight": weights["encoder.text_embedding.norm.weight"],
        "text_embeddings.LayerNorm.bias": weights["encoder.text_embedding.norm.bias"],
        "token_type_embeddings.weight": weights["encoder.type_embedding"][order],
    }
    if model.relative_positions == "none":
        found["transformer.pos_embed"] = weights["encoder.image_embedding.position"][None]
        positions = weights["encoder.text_embedding.position"]
    else:
        found[TABLE] = joined(weights["encoder.relative_positions.table_TRH"])
        positions = torch.zeros(model.max_text_length, width)
    found["text_embeddings.position_embeddings.weight"] = positions
    found["text_embeddings.position_ids"] = position_ids(positions.shape[0])
    for block in range(model.depth):
        found |= _block_state(weights, model, block)
    return found | _heads_state(weights, model)


def _block_state(weights: dict[str, Tensor], model: Model, block: int) -> dict[str, Tensor]:
    source, target = f"encoder.blocks.{block}", f"transformer.blocks.{block}"
    kinds = _experts(model, block)
    mlps = [f"{target}.mlp_{kind}" for kind in kinds]
    found = layers.attention_state(weights, f"{source}.attention", f"{target}.attn")
    found |= layers.perceptrons(
        weights, model.feed_forward_of(block).router, f"{source}.feed_forward.experts", mlps
    )
    for part in ("weight", "bias"):
        found[f"{target}.norm1.{part}"] = weights[f"{source}.norm1.{part}"]
        for row, kind in enumerate(kinds):
            found[f"{target}.norm2_{kind}.{part}"] = weights[f"{source}.norm2.{part}"][row]
    if model.layer_scale is not None:
        found[f"{target}.gamma_1"] = weights[f"{source}.gamma1"]
        found[f"{target}.gamma_2"] = weights[f"{source}.gamma2"]
    return found


def _heads_state(weights: dict[str, Tensor], model: Model) -> dict[str, Tensor]:
    found = {
        f"mlm_score.{theirs}": weights[f"word_head.{ours}"]
        for theirs, ours in (
            ("transform.dense.weight", "dense.weight"),
            ("transform.dense.bias", "dense.bias"),
            ("transform.LayerNorm.weight", "norm.weight"),
            ("transform.LayerNorm.bias", "norm.bias"),
            ("decoder.weight", "output.weight"),
            ("bias", "output.bias"),
        )
    }
    if model.matching is not None:
        for part in ("weight", "bias"):
            found[f"pooler.dense.{part}"] = weights[f"matching.pooler.{part}"]
            found[f"itm_score.fc.{part}"] = weights[f"matching.output.{part}"]
    if model.contrast is not None:
        for path in model.contrast.paths:
            projection, scale = PATHS[path]
            for modality in ("image", "text"):
                name = f"{projection.format(modality)}.fc.weight"
                found[name] = weights[f"contrast.{modality}.{path}.weight"]
            found[scale] = weights[f"contrast.temperature_{path}"].view(())
    return found


def position_ids(length: int) -> Tensor:
    return torch.arange(length)[None]


def tables(table_RC: Tensor, depth: int) -> Tensor:
    """(R, depth * H), blocks one after another -> (T, R, H)."""
    return table_RC.unflatten(1, (depth, -1)).transpose(0, 1).contiguous()


def joined(table_TRH: Tensor) -> Tensor:
    """The inverse of `tables`."""
    return table_TRH.transpose(0, 1).flatten(1)


def _router(names: Names, block: int) -> str:
    return "fusion" if names.any(f"transformer.blocks.{block}.mlp_vl.") else "modality"


def _experts(model: Model, block: int) -> tuple[str, ...]:
    return EXPERTS if model.feed_forward_of(block).router == "fusion" else EXPERTS[:2]


def _positions(names: Names, sizes: Sizes, depth: int, patch: int) -> dict[str, Any]:
    length = names.shape("text_embeddings.position_embeddings.weight")[0]
    if TABLE not in names:
        places = names.shape("transformer.pos_embed")[1]
        side = layers.side_of(places - 1, names.where)
        return {
            "image_size": side * patch,
            "max_text_length": sizes["max_text_length"] or length,
            "text_positions": length,
            "absolute_positions": True,
        }
    rows, columns = names.shape(TABLE)
    return {
        **_relative_sizes(names, sizes, rows, patch),
        "max_text_length": sizes["max_text_length"] or length,
        "absolute_positions": False,
        "relative_positions": "blocks",
        "heads": columns // depth,
    }


def _relative_sizes(names: Names, sizes: Sizes, rows: int, patch: int) -> dict[str, Any]:
    """(2 side - 1)^2 + 5 + 2 text_positions are the rows of the table: one of the two is to be known."""
    if sizes["image_size"]:
        side = sizes["image_size"] // patch
    elif "relative_position_index" in names:
        side = layers.side_of(names.shape("relative_position_index")[0] - 1, names.where)
    else:
        # Their texts have one length; the side is then the one whose offsets are left.
        side = (isqrt(max(rows - 5 - 2 * sizes["text_positions"], 0)) + 1) // 2
        if num_rows(side, sizes["text_positions"]) != rows:
            raise UserError(
                f"{names.where}: {TABLE} has {rows} rows, which is no picture's with texts of up to "
                f"{sizes['text_positions']} tokens; say image_size or text_positions"
            )
    left = rows - num_rows(side, 0)
    if left < 6 or left % 2:
        raise UserError(
            f"{names.where}: {TABLE} has {rows} rows, which are not those of pictures of {side} x {side} "
            "patches and some length of text"
        )
    return {"image_size": side * patch, "text_positions": left // 2}


def _check_exportable(model: Model) -> None:
    routers = {model.feed_forward_of(block).router for block in range(model.depth)}
    found = {
        "model.feed_forward has other routers than modality and fusion": not routers
        <= {"modality", "fusion"},
        "model.text_norm is not after_positions": model.text_norm != "after_positions",
        "model.embedding_norm is set": model.embedding_norm,
        "model.activation is not gelu": model.activation != "gelu",
        "model.attention is not shared": model.attention != "shared",
        "model.key_bias is set": model.key_bias,
        "model.sub_norm is set": model.sub_norm,
        "model.final_norm is not shared": model.final_norm != "shared",
        "model.mask_token is set": model.mask_token,
        "model.visual_codes is set": model.visual_codes is not None,
        "model.relative_positions is shared": model.relative_positions == "shared",
        "there are both absolute and relative positions, or neither": model.absolute_positions
        == (model.relative_positions != "none"),
        "model.matching has no pooler": model.matching is not None and not model.matching.pooler,
        "model.contrast.temperature is not scale": model.contrast is not None
        and model.contrast.temperature != "scale",
    }
    for what, wrong in found.items():
        if wrong:
            raise UserError(f"the layout of VLMo has no place for this model: {what}")


FORMAT = Format(
    title="VLMo (microsoft/unilm), any stage and task",
    sizes={
        "heads": None,
        "image_size": None,
        "text_positions": 196,
        "max_text_length": None,
        "norm_eps": 1e-6,
    },
    read_model=read_model,
    weights=weights,
    heads=heads,
    state=state,
    buffers=(
        "text_embeddings.position_ids",
        "text_embeddings.position_embeddings.weight",
        "*relative_position_index",
    ),
)
