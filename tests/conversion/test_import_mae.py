"""MAE's and timm's layouts against plain PyTorch at other sizes, and what does not fit is named."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eve.conversion.foreign import pixels
from eve.conversion.foreign.formats import import_state
from eve.conversion.foreign.mae import pixel_order
from eve.errors import UserError
from tests.conversion.official import State


def vit_state(
    *,
    width: int = 12,
    depth: int = 2,
    hidden: int = 20,
    side: int = 3,
    patch: int = 2,
    decoder: int = 0,
    layer_scale: bool = False,
    bias: bool = True,
    classes: int = 0,
    mean_pool: bool = False,
) -> State:
    """`decoder`: its width; 0 is none."""
    state = State(5)
    state.put("cls_token", 1, 1, width)
    state.put("pos_embed", 1, 1 + side * side, width)
    state.put("patch_embed.proj.weight", width, 3, patch, patch)
    state.put("patch_embed.proj.bias", width)
    for block in range(depth):
        _block(state, f"blocks.{block}", width, hidden, bias)
        if layer_scale:
            state.put(f"blocks.{block}.ls1.gamma", width)
            state.put(f"blocks.{block}.ls2.gamma", width)
    state.layer("fc_norm" if mean_pool else "norm", width)
    if classes:
        state.layer("head", classes, width)
    if decoder:
        state.layer("decoder_embed", decoder, width)
        state.put("mask_token", 1, 1, decoder)
        state.put("decoder_pos_embed", 1, 1 + side * side, decoder)
        _block(state, "decoder_blocks.0", decoder, 2 * decoder, True)
        state.layer("decoder_norm", decoder)
        state.layer("decoder_pred", 3 * patch * patch, decoder)
    return state


def _block(state: State, name: str, width: int, hidden: int, bias: bool) -> None:
    state.layer(f"{name}.norm1", width)
    state.layer(f"{name}.norm2", width)
    state.put(f"{name}.attn.qkv.weight", 3 * width, width)
    if bias:
        state.put(f"{name}.attn.qkv.bias", 3 * width)
    state.layer(f"{name}.attn.proj", width, width)
    state.layer(f"{name}.mlp.fc1", hidden, width)
    state.layer(f"{name}.mlp.fc2", width, hidden)


def norm(state: State, x: Tensor, name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)


def linear(state: State, x: Tensor, name: str) -> Tensor:
    y = x @ state[f"{name}.weight"].T
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def plain_block(state: State, x: Tensor, name: str, heads: int) -> Tensor:
    qkv = linear(state, norm(state, x, f"{name}.norm1"), f"{name}.attn.qkv").chunk(3, dim=-1)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv)
    y = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
    y = linear(state, y.transpose(1, 2).flatten(2), f"{name}.attn.proj")
    x = x + y * state.get(f"{name}.ls1.gamma", torch.ones(()))
    y = F.gelu(linear(state, norm(state, x, f"{name}.norm2"), f"{name}.mlp.fc1"))
    return x + linear(state, y, f"{name}.mlp.fc2") * state.get(f"{name}.ls2.gamma", torch.ones(()))


def plain_encoder(state: State, images: Tensor, visible: Tensor, heads: int) -> Tensor:
    """Class token and the patches `visible` (B, V), before the final norm."""
    weight = state["patch_embed.proj.weight"]
    x = F.conv2d(images, weight, state["patch_embed.proj.bias"], stride=weight.shape[-1])
    x = x.flatten(2).transpose(1, 2) + state["pos_embed"][:, 1:]
    x = torch.stack([sample[index] for sample, index in zip(x, visible, strict=True)])
    first = state["cls_token"] + state["pos_embed"][:, :1]
    x = torch.cat([first.expand(len(x), -1, -1), x], dim=1)
    for block in range(len({name.split(".")[1] for name in state if name.startswith("blocks.")})):
        x = plain_block(state, x, f"blocks.{block}", heads)
    return x


def inputs(size: int, num_patches: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    order = torch.rand(3, num_patches, generator=generator).argsort(dim=1)
    return torch.randn(3, 3, size, size, generator=generator), order


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("timm", {}),
        ("timm", {"layer_scale": True, "bias": False}),
        ("timm_imagenet", {"width": 18, "side": 2, "patch": 4}),
        ("mae", {"depth": 3, "hidden": 10}),
    ],
)
@torch.no_grad()
def test_features_equal_a_plain_computation(form: str, options: dict[str, Any]) -> None:
    state = vit_state(**options)
    found = import_state(state, form, {"heads": 3})
    model = found.build()
    images, order = inputs(found.model.image_size, found.model.num_patches)
    visible = order[:, : order.shape[1] // 2]
    expected = norm(state, plain_encoder(state, images, visible, 3), "norm")
    ours = images
    if form != "timm":
        ours = pixels.to_our_statistics(images, pixels.IMAGENET_MEAN, pixels.IMAGENET_STD)
    got = model.encode(images_BCHW=ours, visible_BV=visible).images_BID
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_predictions_of_all_patches_equal_a_plain_computation() -> None:
    state = vit_state(decoder=8)
    found = import_state(state, "mae", {"heads": 3, "decoder_heads": 2})
    assert {name.partition(".")[0] for name in found.lacking} <= {"word_head", "encoder"}
    assert all("text_embedding" in name for name in found.lacking if name.startswith("encoder"))
    model = found.build()
    assert model.decoder is not None
    images, order = inputs(6, 9)
    visible, masked = order[:, :4], order[:, 4:]
    latent = norm(state, plain_encoder(state, images, visible, 3), "norm")
    x = linear(state, latent, "decoder_embed")
    tokens = state["mask_token"].repeat(3, 9, 1)
    for sample in range(3):
        tokens[sample, visible[sample]] = x[sample, 1:]
    x = torch.cat([x[:, :1], tokens], dim=1) + state["decoder_pos_embed"]
    x = linear(
        state, norm(state, plain_block(state, x, "decoder_blocks.0", 2), "decoder_norm"), "decoder_pred"
    )
    expected = x[:, 1:].unflatten(-1, (2, 2, 3)).permute(0, 1, 4, 2, 3).flatten(2)
    found_all = model.decoder(latent, visible, masked, visible_too=True)
    for sample in range(3):
        torch.testing.assert_close(found_all[sample], expected[sample, order[sample]], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.decoder(latent, visible, masked), found_all[:, 4:])


def test_pixels_of_a_patch_in_the_other_order() -> None:
    colour, row, column = 2, 0, 1
    assert int(pixel_order(2)[colour * 4 + row * 2 + column]) == row * 6 + column * 3 + colour
    assert sorted(pixel_order(3).tolist()) == list(range(27))


def test_what_follows_from_names_and_shapes() -> None:
    found = import_state(vit_state(decoder=64, depth=3, side=4, layer_scale=True), "mae", {"heads": 2})
    model, decoder = found.model, found.model.decoder
    assert (model.width, model.depth, model.hidden, model.image_size, model.patch_size) == (12, 3, 20, 8, 2)
    assert model.layer_scale is not None
    assert decoder is not None
    assert (decoder.width, decoder.depth, decoder.heads, decoder.hidden_width) == (64, 1, 2, 128)
    assert import_state(vit_state(), "mae", {"heads": 2}).model.decoder is None


@pytest.mark.parametrize("mean_pool", [False, True])
def test_a_classifier_is_a_head(mean_pool: bool) -> None:
    state = vit_state(classes=5, mean_pool=mean_pool)
    found = import_state(state, "timm", {"heads": 3})
    assert found.model.final_norm == ("none" if mean_pool else "shared")
    x_BID = torch.randn(2, 10, 12, generator=torch.Generator().manual_seed(7))
    pooled = norm(state, x_BID[:, 1:].mean(1), "fc_norm") if mean_pool else x_BID[:, 0]
    torch.testing.assert_close(found.heads["image"](x_BID), linear(state, pooled, "head"))


@pytest.mark.parametrize(
    ("name", "shape", "sentence"),
    [
        ("reg_token", (1, 4, 12), "unknown name reg_token"),
        ("blocks.0.attn.q_norm.weight", (4,), "unknown name blocks.0.attn.q_norm.weight"),
        ("blocks.1.mlp.fc2.bias", None, "has no blocks.1.mlp.fc2.bias"),
        ("blocks.0.attn.qkv.bias", (24,), r"qkv.bias is \(24,\), expected \(36,\)"),
        ("decoder_pred.bias", None, "has no decoder_pred.bias"),
        ("pos_embed", (1, 9, 12), "positions of 8 patches, which are no square picture"),
    ],
)
def test_names_and_shapes_that_do_not_fit_are_named(
    name: str, shape: tuple[int, ...] | None, sentence: str
) -> None:
    official = vit_state(decoder=8)
    if shape is None:
        del official[name]
    else:
        official[name] = torch.ones(shape)
    with pytest.raises(UserError, match=sentence):
        import_state(official, "mae", {"heads": 3, "decoder_heads": 2})
