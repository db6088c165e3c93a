"""EVE (Chen et al. 2024) of ssyze/EVE: retrieval, VQA, NLVR2, and backbones alone.

Its learned gate always takes two experts, whatever its configuration says, and the experts receive the vector
of the modality as well. Buffers of position numbers are written back, and nothing is lost; what we add for
pre-training, the word head and the decoder of pixels, has no place there and is left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from eve.config import FeedForward, Model
from eve.conversion.foreign import layers
from eve.conversion.foreign.format import Format, Sizes
from eve.conversion.foreign.names import Names
from eve.conversion.foreign.vlmo import classifier
from eve.errors import UserError
from eve.model.task_heads import BiAttention

LAYERS = "backbone.encoder.layers."
PATCHES = "backbone.patch_embed"
# Perceptrons and their norms of a block, by our router.
KINDS = {"shared": ("imag",), "modality": ("imag", "text"), "fusion": ("imag", "text", "vl")}
POOL = "mlp_moe.moe"
MODALITIES = (("image", "vision"), ("text", "text"))


def read_model(names: Names, sizes: Sizes) -> dict[str, Any]:
    """`heads`: null is that of the official models. `max_text_length`: null is all rows of its positions.
    `group_size`: samples that fill the capacity together; there those of a device's batch."""
    width, _, patch, _ = names.shape(f"{PATCHES}.weight")
    depth = names.count(LAYERS)
    length = names.shape("backbone.pos_embed_text")[0]
    blocks: dict[tuple[tuple[str, Any], ...], list[int]] = {}
    for block in range(depth):
        blocks.setdefault(tuple(_feed_forward(names, sizes, block).items()), []).append(block)
    tree: dict[str, Any] = {
        "image_size": layers.side_of(names.shape("backbone.pos_embed_vision")[0] - 1, names.where) * patch,
        "patch_size": patch,
        "width": width,
        "depth": depth,
        "heads": sizes["heads"] or layers.official_heads(width, names.where),
        "hidden": _hidden(names),
        "vocab_size": names.shape("backbone.word_embedding.weight")[0],
        "max_text_length": sizes["max_text_length"] or length,
        "text_positions": length,
        "activation": "quick_gelu",
        "layer_scale": 0.1 if f"{LAYERS}0.gamma_1" in names else None,
        "mask_token": "backbone.mask_embed_vision" in names,
        "decoder": None,
        "feed_forward": [{"blocks": numbers, **dict(settings)} for settings, numbers in blocks.items()],
    }
    if names.any("itc_"):
        vector = names.shape("itc_vision_proj_head.weight")[0]
        tree["contrast"] = {"width": vector, "temperature": "divisor", "clamp": (0.001, 0.5)}
    if names.any("itm_head."):
        tree["matching"] = {"pooler": False}
    return tree


def _feed_forward(names: Names, sizes: Sizes, block: int) -> dict[str, Any]:
    if not names.any(f"{LAYERS}{block}.mlp_moe."):
        kinds = tuple(kind for kind in KINDS["fusion"] if names.any(f"{LAYERS}{block}.mlp_{kind}."))
        router = next((router for router, has in KINDS.items() if has == kinds), None)
        if router is None:
            raise UserError(
                f"{names.where}: block {block} has feed-forwards of {kinds}, which no router of ours"
            )
        return {"router": router}
    has_vector = f"{LAYERS}{block}.{POOL}.vision_embed" in names
    return {
        "router": "topk",
        "num_experts": names.shape(f"{LAYERS}{block}.{POOL}.gate.wg.weight")[0],
        "k": 2,
        "modality_vector": "dispatch" if has_vector else "none",
        "noise": "gumbel",
        "capacity_factor": sizes["capacity_factor"],
        "capacity_factor_eval": sizes["capacity_factor"],
        "min_capacity": sizes["min_capacity"],
        "group_size": sizes["group_size"],
        "load_balance_weight": sizes["gateloss_weight"],
    }


def _hidden(names: Names) -> int:
    for perceptron in ("mlp_imag", f"{POOL}.experts.experts.0"):
        if f"{LAYERS}0.{perceptron}.fc1.weight" in names:
            return names.shape(f"{LAYERS}0.{perceptron}.fc1.weight")[0]
    raise UserError(f"{names.where} has no feed-forward in {LAYERS}0")


def _parts(feed_forward: FeedForward) -> tuple[list[str], list[str]]:
    """(norms, perceptrons) of a block, within its prefix."""
    if feed_forward.router == "topk":
        experts = range(feed_forward.num_experts)
        return ["norm2_vl"], [f"{POOL}.experts.experts.{expert}" for expert in experts]
    kinds = KINDS[feed_forward.router]
    return [f"norm2_{kind}" for kind in kinds], [f"mlp_{kind}" for kind in kinds]


def weights(names: Names, model: Model) -> dict[str, Tensor]:
    width = model.width
    types = [names.take(f"backbone.type_embed_{theirs}", width) for _, theirs in MODALITIES]
    found = {
        **layers.patch_projection(names, PATCHES, model),
        "encoder.image_embedding.class_token": names.take("backbone.class_embedding_vision", width),
        "encoder.image_embedding.position": names.take(
            "backbone.pos_embed_vision", model.num_patches + 1, width
        ),
        "encoder.text_embedding.word.weight": names.take(
            "backbone.word_embedding.weight", model.vocab_size, width
        ),
        "encoder.text_embedding.position": names.take("backbone.pos_embed_text", model.text_positions, width),
        "encoder.type_embedding": torch.stack(types),
        **names.layer("backbone.layer_norm_text", "encoder.text_embedding.norm", width),
        **names.layer("backbone.pre_layrnorm", "encoder.embedding_norm", width),
        **names.layer("backbone.norm", "encoder.norm", width),
    }
    if model.mask_token:
        found["encoder.image_embedding.mask_token"] = names.take("backbone.mask_embed_vision", width)
    for block in range(model.depth):
        found |= _block(names, model, block)
    if model.contrast is not None:
        for ours, theirs in MODALITIES:
            name = f"itc_{theirs}_proj_head.weight"
            found[f"contrast.{ours}.modality.weight"] = names.take(name, model.contrast.width, width)
        found["contrast.temperature_modality"] = names.take("itc_temp").view(1)
    if model.matching is not None:
        found |= names.layer("itm_head", "matching.output", 2, width)
    return found


def _block(names: Names, model: Model, block: int) -> dict[str, Tensor]:
    source, target, width = f"{LAYERS}{block}", f"encoder.blocks.{block}", model.width
    feed_forward = model.feed_forward_of(block)
    norms, perceptrons = ([f"{source}.{part}" for part in parts] for parts in _parts(feed_forward))
    found = {
        **names.layer(f"{source}.norm1", f"{target}.norm1", width),
        **layers.attention(names, f"{source}.attn", f"{target}.attention", width),
        **layers.norms(names, norms, f"{target}.norm2", width),
    }
    experts = f"{target}.feed_forward.experts"
    if feed_forward.router != "topk":
        found |= layers.hard_experts(names, feed_forward.router, perceptrons, experts, width, model.hidden)
    else:
        found |= _bank(names, perceptrons, experts, width, model.hidden)
        router, gate = f"{target}.feed_forward.router", f"{source}.{POOL}.gate.wg.weight"
        found[f"{router}.weight"] = names.take(gate, feed_forward.num_experts, width)
        if feed_forward.modality_vector != "none":
            vectors = [names.take(f"{source}.{POOL}.{theirs}_embed", width) for _, theirs in MODALITIES]
            found[f"{router}.modality_vector"] = torch.stack(vectors)
    if model.layer_scale is not None:
        found[f"{target}.gamma1"] = names.take(f"{source}.gamma_1", width)
        found[f"{target}.gamma2"] = names.take(f"{source}.gamma_2", width)
    return found


def _bank(names: Names, sources: list[str], target: str, width: int, hidden: int) -> dict[str, Tensor]:
    """The bank of a learned router from perceptrons `source`.fc1 and `source`.fc2."""
    first = [names.layer(f"{source}.fc1", "1", hidden, width) for source in sources]
    second = [names.layer(f"{source}.fc2", "2", width, hidden) for source in sources]
    return {
        f"{target}.w1_EDF": torch.stack([layer["1.weight"].t() for layer in first]),
        f"{target}.b1_EF": torch.stack([layer["1.bias"] for layer in first]),
        f"{target}.w2_EFD": torch.stack([layer["2.weight"].t() for layer in second]),
        f"{target}.b2_ED": torch.stack([layer["2.bias"] for layer in second]),
    }


def _bank_state(weights: dict[str, Tensor], source: str, targets: list[str]) -> dict[str, Tensor]:
    """The inverse of `_bank`."""
    state: dict[str, Tensor] = {}
    for expert, target in enumerate(targets):
        state[f"{target}.fc1.weight"] = weights[f"{source}.w1_EDF"][expert].t().contiguous()
        state[f"{target}.fc1.bias"] = weights[f"{source}.b1_EF"][expert]
        state[f"{target}.fc2.weight"] = weights[f"{source}.w2_EFD"][expert].t().contiguous()
        state[f"{target}.fc2.bias"] = weights[f"{source}.b2_ED"][expert]
    return state


def heads(names: Names, model: Model) -> dict[str, nn.Module]:
    """`vqa` from the text's class token, `nlvr2` from those of two pairs or, BiAttention, all tokens."""
    if names.any("attn1."):
        return {"nlvr2": _bi_attention(names, model)}
    if not names.any("output."):
        return {}
    task = "vqa" if names.shape("output.0.weight")[1] == model.width else "nlvr2"
    return {task: classifier(names, "output")}


def _bi_attention(names: Names, model: Model) -> BiAttention:
    width = model.width
    classes = names.shape("nlvr2_output.weight")[0]
    head = BiAttention(width, model.heads, classes)
    state = names.layer("fc.0", "fuse", width, 2 * width)
    state |= names.layer("attn_pool.fc.0", "score", 1, width)
    state |= names.layer("nlvr2_output", "output", classes, 2 * width)
    for side, source in (("left", "attn1"), ("right", "attn2")):
        state[f"{side}.in_proj_weight"] = names.take(f"{source}.in_proj_weight", 3 * width, width)
        state[f"{side}.in_proj_bias"] = names.take(f"{source}.in_proj_bias", 3 * width)
        state |= names.layer(f"{source}.out_proj", f"{side}.out_proj", width, width)
    head.load_state_dict(state)
    return head.eval()


def state(weights: dict[str, Tensor], model: Model) -> dict[str, Tensor]:
    """The official layout. Raises UserError for a model that the official code computes otherwise."""
    _check_exportable(model)
    positions = {theirs: weights[f"encoder.{ours}_embedding.position"] for ours, theirs in MODALITIES}
    found = {
        **layers.patch_convolution(weights, PATCHES, model),
        "backbone.class_embedding_vision": weights["encoder.image_embedding.class_token"],
        "backbone.word_embedding.weight": weights["encoder.text_embedding.word.weight"],
        "backbone.position_ids_vision": torch.arange(len(positions["vision"]))[None],
        "backbone.position_ids_text": torch.arange(len(positions["text"])),
    }
    for row, (_, theirs) in enumerate(MODALITIES):
        found[f"backbone.pos_embed_{theirs}"] = positions[theirs]
        found[f"backbone.type_embed_{theirs}"] = weights["encoder.type_embedding"][row]
    for part in ("weight", "bias"):
        found[f"backbone.layer_norm_text.{part}"] = weights[f"encoder.text_embedding.norm.{part}"]
        found[f"backbone.pre_layrnorm.{part}"] = weights[f"encoder.embedding_norm.{part}"]
        found[f"backbone.norm.{part}"] = weights[f"encoder.norm.{part}"]
    if model.mask_token:
        found["backbone.mask_embed_vision"] = weights["encoder.image_embedding.mask_token"]
    for block in range(model.depth):
        found |= _block_state(weights, model, block)
    if model.contrast is not None:
        for ours, theirs in MODALITIES:
            found[f"itc_{theirs}_proj_head.weight"] = weights[f"contrast.{ours}.modality.weight"]
        found["itc_temp"] = weights["contrast.temperature_modality"].view(())
    if model.matching is not None:
        found["itm_head.weight"] = weights["matching.output.weight"]
        found["itm_head.bias"] = weights["matching.output.bias"]
    return found


def _block_state(weights: dict[str, Tensor], model: Model, block: int) -> dict[str, Tensor]:
    source, target = f"encoder.blocks.{block}", f"{LAYERS}{block}"
    feed_forward = model.feed_forward_of(block)
    norms, perceptrons = ([f"{target}.{part}" for part in parts] for parts in _parts(feed_forward))
    found = layers.attention_state(weights, f"{source}.attention", f"{target}.attn")
    experts = f"{source}.feed_forward.experts"
    if feed_forward.router == "topk":
        found |= _bank_state(weights, experts, perceptrons)
    else:
        found |= layers.perceptrons(weights, feed_forward.router, experts, perceptrons)
    for part in ("weight", "bias"):
        found[f"{target}.norm1.{part}"] = weights[f"{source}.norm1.{part}"]
        rows = weights[f"{source}.norm2.{part}"].view(len(norms), -1)
        found |= {f"{norm}.{part}": row for norm, row in zip(norms, rows, strict=True)}
    if feed_forward.router == "topk":
        found[f"{target}.{POOL}.gate.wg.weight"] = weights[f"{source}.feed_forward.router.weight"]
        if feed_forward.modality_vector != "none":
            for row, (_, theirs) in enumerate(MODALITIES):
                vectors = weights[f"{source}.feed_forward.router.modality_vector"]
                found[f"{target}.{POOL}.{theirs}_embed"] = vectors[row]
    if model.layer_scale is not None:
        found[f"{target}.gamma_1"] = weights[f"{source}.gamma1"]
        found[f"{target}.gamma_2"] = weights[f"{source}.gamma2"]
    return found


def _check_exportable(model: Model) -> None:
    routed = [ff for ff in model.feed_forward if ff.router == "topk"]
    contrast, matching = model.contrast, model.matching
    found = {
        "model.feed_forward has a pool for each modality": any(ff.experts_by_modality for ff in routed),
        "model.feed_forward.k is not 2": any(ff.k != 2 for ff in routed),
        "model.feed_forward.modality_vector is gate, and there the experts see it as well": any(
            ff.modality_vector == "gate" for ff in routed
        ),
        "model.text_norm is not before_positions": model.text_norm != "before_positions",
        "model.embedding_norm is not set": not model.embedding_norm,
        "model.activation is not quick_gelu": model.activation != "quick_gelu",
        "model.attention is not shared": model.attention != "shared",
        "model.key_bias is set": model.key_bias,
        "model.sub_norm is set": model.sub_norm,
        "model.final_norm is not shared": model.final_norm != "shared",
        "model.visual_codes is set": model.visual_codes is not None,
        "model.num_types is not 2": model.num_types != 2,
        "model.absolute_positions is not set": not model.absolute_positions,
        "model.relative_positions is set": model.relative_positions != "none",
        "model.matching has a pooler": matching is not None and matching.pooler,
        "model.contrast has other paths than modality, or no divisor": contrast is not None
        and (contrast.paths != ("modality",) or contrast.temperature != "divisor"),
    }
    for what, wrong in found.items():
        if wrong:
            raise UserError(f"the layout of EVE has no place for this model: {what}")


FORMAT = Format(
    title="EVE (ssyze/EVE), any size and task",
    sizes={
        "heads": None,
        "max_text_length": None,
        "capacity_factor": 1.0,
        "min_capacity": 4,
        "group_size": 8,
        "gateloss_weight": 0.001,
    },
    read_model=read_model,
    weights=weights,
    heads=heads,
    state=state,
    buffers=("backbone.position_ids_vision", "backbone.position_ids_text"),
)
