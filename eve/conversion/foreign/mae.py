"""MAE (He et al. 2022) of facebookresearch/mae, with or without its decoder, and ViT of timm.

They have images only: text embedding and word head are left to the seed. Where their pixels have other
statistics than ours, the patch projection absorbs that (pixels.py); what MAE's decoder predicts keeps them.
The part of attn.qkv.bias that belongs to the keys shifts all logits of a query alike and has no effect: it is
left out. A classifier becomes the head `image`.

Shape suffixes: K pixel of a patch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from eve.config import Model
from eve.conversion.foreign import layers, pixels
from eve.conversion.foreign.beit import image_classifier
from eve.conversion.foreign.format import Format, Sizes
from eve.conversion.foreign.names import Names

# Mean and standard deviation of pixels, by colour.
Statistics = tuple[tuple[float, ...], tuple[float, ...]]
# LayerScale, by the names of timm.
GAMMAS = {"gamma1": "ls1.gamma", "gamma2": "ls2.gamma"}


def read_model(names: Names, sizes: Sizes) -> dict[str, Any]:
    """`heads` and `decoder_heads`: null is that of the official models. The text's sizes are those of the
    model to build."""
    width, _, patch, _ = names.shape("patch_embed.proj.weight")
    depth = names.count("blocks.")
    tree: dict[str, Any] = {
        "image_size": layers.side_of(names.shape("pos_embed")[1] - 1, names.where) * patch,
        "patch_size": patch,
        "width": width,
        "depth": depth,
        "heads": sizes["heads"] or layers.official_heads(width, names.where),
        "hidden": names.shape("blocks.0.mlp.fc1.weight")[0],
        "vocab_size": sizes["vocab_size"],
        "max_text_length": sizes["text_positions"],
        "text_positions": sizes["text_positions"],
        "activation": "gelu",
        "layer_scale": 0.1 if f"blocks.0.{GAMMAS['gamma1']}" in names else None,
        "norm_eps": sizes["norm_eps"],
        "embedding_norm": False,
        "final_norm": "shared" if names.any("norm.") else "none",
        "feed_forward": [{"blocks": list(range(depth)), "router": "shared"}],
        "decoder": None,
    }
    if names.any("decoder_blocks."):
        narrow = names.shape("decoder_embed.weight")[0]
        tree["decoder"] = {
            "depth": names.count("decoder_blocks."),
            "width": narrow,
            "heads": sizes["decoder_heads"] or narrow // 32,
            "hidden": names.shape("decoder_blocks.0.mlp.fc1.weight")[0],
            "positions": "learned",
        }
    return tree


def weights(names: Names, model: Model, *, statistics: Statistics | None) -> dict[str, Tensor]:
    """`statistics`: mean and standard deviation of their pixels; None where they are ours."""
    width = model.width
    image = "encoder.image_embedding"
    found = {
        **layers.patch_projection(names, "patch_embed.proj", model),
        f"{image}.class_token": names.take("cls_token", 1, 1, width)[0, 0],
        f"{image}.position": names.take("pos_embed", 1, model.num_patches + 1, width)[0],
        "encoder.type_embedding": torch.zeros(model.num_types, width),
    }
    if statistics is not None:
        projection = found[f"{image}.projection.weight"], found[f"{image}.projection.bias"]
        weight, bias = pixels.fold_statistics(*projection, *statistics)
        found |= {f"{image}.projection.weight": weight, f"{image}.projection.bias": bias}
    if model.final_norm == "shared":
        found |= names.layer("norm", "encoder.norm", width)
    for block in range(model.depth):
        source, target = f"blocks.{block}", f"encoder.blocks.{block}"
        found |= _block(names, source, target, width, model.hidden)
        if model.layer_scale is not None:
            for ours, theirs in GAMMAS.items():
                found[f"{target}.{ours}"] = names.take(f"{source}.{theirs}", width)
    return found | _decoder(names, model)


def _block(names: Names, source: str, target: str, width: int, hidden: int) -> dict[str, Tensor]:
    qkv = f"{source}.attn.qkv"
    bias = names.take(f"{qkv}.bias", 3 * width) if f"{qkv}.bias" in names else torch.zeros(3 * width)
    return {
        **names.layer(f"{source}.norm1", f"{target}.norm1", width),
        **names.layer(f"{source}.norm2", f"{target}.norm2", width),
        f"{target}.attention.qkv.weight": names.take(f"{qkv}.weight", 3 * width, width),
        f"{target}.attention.qkv.q_bias": bias[:width],
        f"{target}.attention.qkv.v_bias": bias[2 * width :],
        **names.layer(f"{source}.attn.proj", f"{target}.attention.proj", width, width),
        **layers.hard_experts(
            names, "shared", [f"{source}.mlp"], f"{target}.feed_forward.experts", width, hidden
        ),
    }


def _decoder(names: Names, model: Model) -> dict[str, Tensor]:
    decoder = model.decoder
    if decoder is None:
        names.skip("mask_token", "decoder_pos_embed")  # kept by some that leave the decoder's blocks out
        return {}
    width, patch = decoder.width, 3 * model.patch_size**2
    found = {
        **names.layer("decoder_embed", "decoder.embedding", width, model.width),
        "decoder.mask_token": names.take("mask_token", 1, 1, width)[0, 0],
        "decoder.positions": names.take("decoder_pos_embed", 1, model.num_patches + 1, width)[0],
        **names.layer("decoder_norm", "decoder.norm", width),
    }
    order_K = pixel_order(model.patch_size)
    for part, tensor in names.layer("decoder_pred", "p", patch, width).items():
        found[f"decoder.prediction.{part.removeprefix('p.')}"] = tensor[order_K]
    for block in range(decoder.depth):
        source, target = f"decoder_blocks.{block}", f"decoder.blocks.{block}"
        found |= _block(names, source, target, width, decoder.hidden_width)
    return found


def pixel_order(patch_size: int) -> Tensor:
    """int64 (K,): the number that each pixel of a patch of ours, in the order (colour, row, column), has in
    theirs, (row, column, colour)."""
    theirs = torch.arange(3 * patch_size**2).view(patch_size, patch_size, 3)
    return theirs.permute(2, 0, 1).flatten()


def heads(names: Names, model: Model) -> dict[str, nn.Module]:
    if not names.any("head."):
        return {}
    return {"image": image_classifier(names, model, norm="fc_norm", output="head")}


def _format(title: str, statistics: Statistics | None, **sizes: Any) -> Format:
    text = {"vocab_size": 8, "text_positions": 3}
    return Format(
        title=title,
        sizes={"heads": None, "norm_eps": 1e-6, **sizes, **text},
        read_model=read_model,
        weights=partial(weights, statistics=statistics),
        heads=heads,
    )


IMAGENET = (pixels.IMAGENET_MEAN, pixels.IMAGENET_STD)
FORMAT = _format("MAE (facebookresearch/mae)", IMAGENET, decoder_heads=None)
FORMAT_TIMM = _format("ViT of timm, of pixels of mean and deviation 0.5", None)
FORMAT_TIMM_IMAGENET = _format("ViT of timm, of pixels with ImageNet's mean and deviation", IMAGENET)
