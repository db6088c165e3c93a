"""Layers that several official layouts have alike: pieces of one block, and what our block makes of them.

Shape suffixes: D width, F hidden width, E expert, T table, R row of a table, H head, K pixel of a patch.
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

from eve.config import Model
from eve.conversion.foreign.names import Names
from eve.errors import UserError
from eve.moe.hard_experts import KINDS

# Of most published models; and those of other widths: VLMo-Base+, ViT-H, ViT-g, ViT-G.
HEAD_WIDTH = 64
OFFICIAL_HEADS = {544: 16, 1280: 16, 1408: 16, 1664: 16}


def hard_experts(
    names: Names, router: str, sources: list[str], target: str, width: int, hidden: int
) -> dict[str, Tensor]:
    """The experts of a hard router from two-layer perceptrons `source`.fc1 and `source`.fc2, one each."""
    found: dict[str, Tensor] = {}
    for kind, source in zip(KINDS[router], sources, strict=True):
        first = names.layer(f"{source}.fc1", "1", hidden, width)
        second = names.layer(f"{source}.fc2", "2", width, hidden)
        found[f"{target}.{kind}.w1_DF"] = first["1.weight"].t().contiguous()
        found[f"{target}.{kind}.b1_F"] = first["1.bias"]
        found[f"{target}.{kind}.w2_FD"] = second["2.weight"].t().contiguous()
        found[f"{target}.{kind}.b2_D"] = second["2.bias"]
    return found


def perceptrons(
    weights: dict[str, Tensor], router: str, source: str, targets: list[str]
) -> dict[str, Tensor]:
    """The inverse of `hard_experts`."""
    state: dict[str, Tensor] = {}
    for kind, target in zip(KINDS[router], targets, strict=True):
        state[f"{target}.fc1.weight"] = weights[f"{source}.{kind}.w1_DF"].t().contiguous()
        state[f"{target}.fc1.bias"] = weights[f"{source}.{kind}.b1_F"]
        state[f"{target}.fc2.weight"] = weights[f"{source}.{kind}.w2_FD"].t().contiguous()
        state[f"{target}.fc2.bias"] = weights[f"{source}.{kind}.b2_D"]
    return state


def attention(names: Names, source: str, target: str, width: int) -> dict[str, Tensor]:
    """BEiT's attention: a fused qkv without a bias of the keys, or without any."""
    q_bias = v_bias = torch.zeros(width)
    if f"{source}.q_bias" in names:
        q_bias, v_bias = names.take(f"{source}.q_bias", width), names.take(f"{source}.v_bias", width)
    return {
        f"{target}.qkv.weight": names.take(f"{source}.qkv.weight", 3 * width, width),
        f"{target}.qkv.q_bias": q_bias,
        f"{target}.qkv.v_bias": v_bias,
        **names.layer(f"{source}.proj", f"{target}.proj", width, width),
    }


def attention_state(weights: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    """The inverse of `attention`."""
    return {
        f"{target}.q_bias": weights[f"{source}.qkv.q_bias"],
        f"{target}.v_bias": weights[f"{source}.qkv.v_bias"],
        f"{target}.qkv.weight": weights[f"{source}.qkv.weight"],
        f"{target}.proj.weight": weights[f"{source}.proj.weight"],
        f"{target}.proj.bias": weights[f"{source}.proj.bias"],
    }


def norms(names: Names, sources: list[str], target: str, width: int) -> dict[str, Tensor]:
    """LayerNorms as one with a row for each (eve.model.layers.ModalityNorm); a single one as it is."""
    rows = [names.layer(source, "norm", width) for source in sources]
    if len(rows) == 1:
        return {f"{target}.{part}": rows[0][f"norm.{part}"] for part in ("weight", "bias")}
    return {f"{target}.{part}": torch.stack([r[f"norm.{part}"] for r in rows]) for part in ("weight", "bias")}


def patch_projection(names: Names, source: str, model: Model) -> dict[str, Tensor]:
    """A convolution over patches as a linear layer of their pixels."""
    size = model.patch_size
    target = "encoder.image_embedding.projection"
    weight = names.take(f"{source}.weight", model.width, 3, size, size)
    return {
        f"{target}.weight": weight.flatten(1),
        f"{target}.bias": names.take(f"{source}.bias", model.width),
    }


def patch_convolution(weights: dict[str, Tensor], target: str, model: Model) -> dict[str, Tensor]:
    """The inverse of `patch_projection`."""
    source = "encoder.image_embedding.projection"
    kernel = (3, model.patch_size, model.patch_size)
    return {
        f"{target}.weight": weights[f"{source}.weight"].unflatten(1, kernel),
        f"{target}.bias": weights[f"{source}.bias"],
    }


def official_heads(width: int, where: str) -> int:
    """Of the published models of a width, whose tensors do not tell. Raises UserError where none is known."""
    if width in OFFICIAL_HEADS:
        return OFFICIAL_HEADS[width]
    if width % HEAD_WIDTH:
        raise UserError(f"{where}: how many heads a model of width {width} has does not show; say heads")
    return width // HEAD_WIDTH


def side_of(num_patches: int, where: str) -> int:
    """Patches along one side of a square picture. Raises UserError where it is none."""
    side = isqrt(num_patches)
    if side * side != num_patches:
        raise UserError(f"{where} has positions of {num_patches} patches, which are no square picture")
    return side
