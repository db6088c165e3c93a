"""BEiT-3's layout against plain PyTorch at other sizes, and what does not fit is named."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eve.conversion.foreign.formats import import_state
from eve.errors import UserError
from tests.conversion.official import State
from tools.import_checks.trace import Trace, texts

LAYER = "beit3.encoder.layers"
ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


def beit3_state(
    *,
    width: int = 12,
    depth: int = 2,
    hidden: int = 20,
    side: int = 2,
    patch: int = 3,
    words: int = 17,
    rows: int = 9,
    sub_norm: bool = True,
    final_norm: bool = True,
    task: str = "retrieval",
) -> State:
    state = State(4)
    state.put("beit3.text_embed.weight", words, width)
    state.put("beit3.vision_embed.mask_token", 1, 1, width)
    state.put("beit3.vision_embed.cls_token", 1, 1, width)
    state.put("beit3.vision_embed.proj.weight", width, 3, patch, patch)
    state.put("beit3.vision_embed.proj.bias", width)
    state.put("beit3.encoder.embed_positions.A.weight", 3 + side * side, width)
    state.put("beit3.encoder.embed_positions.B.weight", rows, width)
    for block in range(depth):
        for kind in "AB":
            name = f"{LAYER}.{block}"
            for part in ATTENTION:
                state.layer(f"{name}.self_attn.{part}.{kind}", width, width)
            state.layer(f"{name}.self_attn_layer_norm.{kind}", width)
            state.layer(f"{name}.final_layer_norm.{kind}", width)
            state.layer(f"{name}.ffn.{kind}.fc1", hidden, width)
            state.layer(f"{name}.ffn.{kind}.fc2", width, hidden)
            if sub_norm:
                state.layer(f"{name}.self_attn.inner_attn_ln.{kind}", width)
                state.layer(f"{name}.ffn.{kind}.ffn_layernorm", hidden)
    if final_norm:
        state.layer("beit3.encoder.layer_norm.A", width)
        state.layer("beit3.encoder.layer_norm.B", width)
    if task == "retrieval":
        state.put("logit_scale")
        state.put("vision_head.weight", 7, width)
        state.put("language_head.weight", 7, width)
    if task == "image":
        state.layer("fc_norm", width)
        state.layer("head", 5, width)
    return state


def plain(
    state: State, heads: int, images: Tensor | None, ids: Tensor | None, padding: Tensor | None
) -> Tensor:
    """The official computation, written from its description: `A` for image tokens, `B` for text tokens."""
    parts, hidden_keys = [], []
    if images is not None:
        weight = state["beit3.vision_embed.proj.weight"]
        x = F.conv2d(images, weight, state["beit3.vision_embed.proj.bias"], stride=weight.shape[-1])
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([state["beit3.vision_embed.cls_token"].expand(len(x), -1, -1), x], dim=1)
        parts.append(x + state["beit3.encoder.embed_positions.A.weight"][2:])
        hidden_keys.append(torch.zeros(x.shape[:2], dtype=torch.bool))
    split = parts[0].shape[1] if parts else 0
    if ids is not None and padding is not None:
        positions = state["beit3.encoder.embed_positions.B.weight"][2 : 2 + ids.shape[1]]
        parts.append((state["beit3.text_embed.weight"][ids] + positions) * ~padding[..., None])
        hidden_keys.append(padding)
    x, hidden = torch.cat(parts, dim=1), torch.cat(hidden_keys, dim=1)

    def linear(kind: str, part: Tensor, name: str) -> Tensor:
        return part @ state[f"{name}.{kind}.weight"].T + state[f"{name}.{kind}.bias"]

    def norm(kind: str, part: Tensor, name: str) -> Tensor:
        return F.layer_norm(
            part, part.shape[-1:], state[f"{name}.{kind}.weight"], state[f"{name}.{kind}.bias"]
        )

    def both(layer: Any, x: Tensor, name: str) -> Tensor:
        return torch.cat([layer("A", x[:, :split], name), layer("B", x[:, split:], name)], dim=1)

    def mlp(kind: str, part: Tensor, name: str) -> Tensor:
        name = f"{name}.{kind}"
        h = F.gelu(part @ state[f"{name}.fc1.weight"].T + state[f"{name}.fc1.bias"])
        if f"{name}.ffn_layernorm.weight" in state:
            weights = state[f"{name}.ffn_layernorm.weight"], state[f"{name}.ffn_layernorm.bias"]
            h = F.layer_norm(h, h.shape[-1:], *weights)
        return h @ state[f"{name}.fc2.weight"].T + state[f"{name}.fc2.bias"]

    for block in range(len({name.split(".")[3] for name in state if name.startswith(LAYER)})):
        name = f"{LAYER}.{block}"
        y = both(norm, x, f"{name}.self_attn_layer_norm")
        q, k, v = (both(linear, y, f"{name}.self_attn.{part}") for part in ATTENTION[:3])
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        y = logits.masked_fill(hidden[:, None, None], -torch.inf).softmax(-1) @ v
        y = y.transpose(1, 2).flatten(2)
        if f"{name}.self_attn.inner_attn_ln.A.weight" in state:
            y = both(norm, y, f"{name}.self_attn.inner_attn_ln")
        x = x + both(linear, y, f"{name}.self_attn.out_proj")
        x = x + both(mlp, both(norm, x, f"{name}.final_layer_norm"), f"{name}.ffn")
    if "beit3.encoder.layer_norm.A.weight" in state:
        x = both(norm, x, "beit3.encoder.layer_norm")
    return x


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"final_norm": False, "depth": 3, "width": 18, "hidden": 10},
        {"sub_norm": False, "side": 3, "patch": 2},
    ],
)
@torch.no_grad()
def test_features_equal_a_plain_computation(options: dict[str, Any]) -> None:
    state = beit3_state(**options)
    found = import_state(state, "beit3", {"heads": 3})
    assert {name.partition(".")[0] for name in found.lacking} == {"word_head"}
    model, size = found.build(), found.model.image_size
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(3, 3, size, size, generator=generator)
    ids = torch.randint(0, 17, (3, 6), generator=generator)
    nothing = torch.zeros(3, 6, dtype=torch.bool)
    text = texts(ids, nothing)
    for inputs, plain_inputs in (
        ({"images_BCHW": images, **text}, (images, ids, nothing)),
        ({"images_BCHW": images}, (images, None, None)),
        (text, (None, ids, nothing)),
    ):
        expected = plain(state, 3, *plain_inputs)
        torch.testing.assert_close(Trace(model, **inputs).features_BLD, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_tokens_packed_without_padding_equal_padded_ones() -> None:
    """Ours are never padded; real tokens come out as theirs do beside zeroed and hidden padding."""
    state = beit3_state()
    model = import_state(state, "beit3", {"heads": 3}).build()
    generator = torch.Generator().manual_seed(6)
    images = torch.randn(3, 3, 6, 6, generator=generator)
    ids = torch.randint(0, 17, (3, 6), generator=generator)
    lengths = [6, 2, 4]
    real = torch.arange(6)[None] < torch.tensor(lengths)[:, None]
    encoded = model.encode(images_BCHW=images, tokens_N=ids[real], text_lengths=lengths)
    expected = plain(state, 3, images, ids, ~real)
    torch.testing.assert_close(encoded.images_BID, expected[:, :5], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(encoded.texts_ND, expected[:, 5:][real], atol=1e-4, rtol=1e-4)


def test_what_follows_from_names_and_shapes() -> None:
    found = import_state(beit3_state(depth=3, side=3, rows=11), "beit3", {"heads": 2})
    model = found.model
    assert (model.width, model.depth, model.heads, model.hidden) == (12, 3, 2, 20)
    assert (model.image_size, model.patch_size, model.vocab_size, model.text_positions) == (9, 3, 17, 9)
    assert model.final_norm == "modality"
    assert model.sub_norm
    assert model.norm_eps == 1e-5
    assert model.contrast is not None
    assert model.contrast.width == 7


def test_a_classifier_of_images_is_a_head() -> None:
    state = beit3_state(task="image", final_norm=False)
    found = import_state(state, "beit3", {"heads": 3})
    x_BID = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(7))
    pooled = F.layer_norm(x_BID[:, 1:].mean(1), (12,), state["fc_norm.weight"], state["fc_norm.bias"])
    expected = pooled @ state["head.weight"].T + state["head.bias"]
    torch.testing.assert_close(found.heads["image"](x_BID), expected)


@pytest.mark.parametrize(
    ("name", "shape", "sentence"),
    [
        ("mlm_head.weight", (17, 12), "unknown name mlm_head.weight; leave out with --ignore"),
        (f"{LAYER}.1.self_attn.k_proj.B.bias", None, "has no .*layers.1.self_attn.k_proj.B.bias"),
        (f"{LAYER}.0.ffn.B.ffn_layernorm.weight", None, "has no .*ffn.B.ffn_layernorm.weight"),
        ("language_head.weight", None, "has no language_head.weight"),
        ("beit3.encoder.embed_positions.A.weight", (8, 12), "positions of 5 patches"),
    ],
)
def test_names_and_shapes_that_do_not_fit_are_named(
    name: str, shape: tuple[int, ...] | None, sentence: str
) -> None:
    official = beit3_state()
    if shape is None:
        del official[name]
    else:
        official[name] = torch.ones(shape)
    with pytest.raises(UserError, match=sentence):
        import_state(official, "beit3", {"heads": 3})
    if shape == (17, 12):
        assert import_state(official, "beit3", {"heads": 3}, ignore=("mlm_head.*",)).model.width == 12
