"""Official VQ-KD weights of BEiT v2 (microsoft/unilm, beit2/modeling_vqkd.py) as a visual tokenizer.

Written from the published code, its names and shapes; not yet tried on the published file. What the code
does and this relies on: pictures in [-1, 1], patches through ViTs whose last norm is `fc_norm` (the one with
mean pooling), MLPs with tanh before and after the code book, codes of length 1, the exact GELU, LayerNorm eps
1e-6. The teacher is not part of the tokenizer and is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from eve.errors import UserError
from eve.visual_tokenizer.config import Stack, VisualTokenizerConfig

# Not needed to make codes or to decode them: the teacher, its scaling, running means of training.
_LEFT_OUT = (
    "teacher_model.",
    "scaling_layer.",
    "loss",
    "quantize.embedding.embed_avg",
    "quantize.embedding.initted",
    "quantize.embedding.cluster_size",
)
_NORMS = {"norm1": "norm1", "norm2": "norm2", "attn.proj": "attention.proj"}


def read(
    state: Mapping[str, Tensor], heads: int | None = None
) -> tuple[VisualTokenizerConfig, dict[str, Tensor]]:
    """(config, weights under our names, fp32) of an official state dictionary.

    Args:
        state: the `model` (or `state_dict`) of the file. heads: of attention; null is width / 64.

    Raises UserError where a name is missing, unknown or of another shape.
    """
    left = {name: tensor for name, tensor in state.items() if not name.startswith(_LEFT_OUT)}
    config = _config(left, heads)
    weights = {
        **_stack(left, "encoder", config.encoder, config.num_patches),
        **_stack(left, "decoder", config.decoder, config.num_patches),
    }
    for theirs, ours in (("encode_task_layer", "to_code"), ("decode_task_layer", "to_target")):
        for layer in (0, 2):
            for kind in ("weight", "bias"):
                weights[f"{ours}.{layer}.{kind}"] = _take(left, f"{theirs}.{layer}.{kind}")
    # It is of length 1 there as well, but for rounding.
    weights["quantiser.codes_KW"] = F.normalize(_take(left, "quantize.embedding.weight"), dim=-1)
    if "quantize.cluster_size" in left:
        weights["quantiser.use_K"] = _take(left, "quantize.cluster_size")
    else:
        weights["quantiser.use_K"] = torch.zeros(config.codes)
    weights["quantiser.steps"] = torch.zeros((), dtype=torch.int64)
    if left:
        raise UserError(f"the VQ-KD state holds {len(left)} unknown names, the first is {sorted(left)[0]}")
    return config, weights


def _config(state: Mapping[str, Tensor], heads: int | None) -> VisualTokenizerConfig:
    patch = _shape(state, "encoder.patch_embed.proj.weight")[-1]
    num_patches = _shape(state, "encoder.pos_embed")[1] - 1
    codes, code_width = _shape(state, "quantize.embedding.weight")
    return VisualTokenizerConfig(
        image_size=isqrt(num_patches) * patch,
        patch_size=patch,
        codes=codes,
        code_width=code_width,
        encoder=_sizes(state, "encoder", heads),
        decoder=_sizes(state, "decoder", heads),
        target="features",
        feature_width=_shape(state, "decode_task_layer.2.weight")[0],
    )


def _sizes(state: Mapping[str, Tensor], stack: str, heads: int | None) -> Stack:
    width = _shape(state, f"{stack}.cls_token")[-1]
    depth = len({name.split(".")[2] for name in state if name.startswith(f"{stack}.blocks.")})
    hidden = _shape(state, f"{stack}.blocks.0.mlp.fc1.weight")[0]
    return Stack(depth=depth, width=width, heads=heads or max(1, width // 64), hidden=hidden)


def _stack(state: dict[str, Tensor], stack: str, sizes: Stack, num_patches: int) -> dict[str, Tensor]:
    projection = _take(state, f"{stack}.patch_embed.proj.weight")
    position = _take(state, f"{stack}.pos_embed")
    if position.shape != (1, num_patches + 1, sizes.width):
        raise UserError(f"{stack}.pos_embed is {tuple(position.shape)}, expected {num_patches + 1} positions")
    weights = {
        # A convolution whose step is its size: pixels in the order (channel, row, column).
        f"{stack}.projection.weight": projection.flatten(1),
        f"{stack}.projection.bias": _take(state, f"{stack}.patch_embed.proj.bias"),
        f"{stack}.class_token": _take(state, f"{stack}.cls_token").flatten(),
        f"{stack}.position": position[0],
        f"{stack}.norm.weight": _take(state, f"{stack}.fc_norm.weight"),
        f"{stack}.norm.bias": _take(state, f"{stack}.fc_norm.bias"),
    }
    for number in range(sizes.depth):
        theirs = ours = f"{stack}.blocks.{number}"
        for name, own in _NORMS.items():
            for kind in ("weight", "bias"):
                weights[f"{ours}.{own}.{kind}"] = _take(state, f"{theirs}.{name}.{kind}")
        weights[f"{ours}.attention.qkv.weight"] = _take(state, f"{theirs}.attn.qkv.weight")
        for bias in ("q_bias", "v_bias"):
            weights[f"{ours}.attention.qkv.{bias}"] = _take(state, f"{theirs}.attn.{bias}")
        for layer, names in (("fc1", ("w1_DF", "b1_F")), ("fc2", ("w2_FD", "b2_D"))):
            matrix, bias = (_take(state, f"{theirs}.mlp.{layer}.{kind}") for kind in ("weight", "bias"))
            weights[f"{ours}.feed_forward.experts.shared.{names[0]}"] = matrix.T.contiguous()
            weights[f"{ours}.feed_forward.experts.shared.{names[1]}"] = bias
    return weights


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if name not in state:
        raise UserError(f"the VQ-KD state has no {name}")
    return tuple(state[name].shape)


def _take(state: dict[str, Tensor], name: str) -> Tensor:
    """Taken out, so that what is left over is unknown."""
    _shape(state, name)
    return state.pop(name).detach().float().clone()
