"""EVE's layout against plain PyTorch; there and back bit for bit; what does not fit is named."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eve.config import Model
from eve.conversion.foreign.formats import FORMATS, Imported, import_state
from eve.errors import UserError
from tests.conversion.official import State
from tools.import_checks.trace import Trace, texts

LAYER = "backbone.encoder.layers"


def eve_state(
    *,
    routers: tuple[str, ...] = ("modality", "topk"),
    experts: int = 3,
    vector: bool = True,
    width: int = 12,
    hidden: int = 20,
    side: int = 2,
    patch: int = 3,
    words: int = 17,
    length: int = 6,
    task: str = "retrieval",
) -> State:
    state = State(3)
    for name in ("class_embedding_vision", "type_embed_vision", "type_embed_text"):
        state.put(f"backbone.{name}", width)
    state.put("backbone.pos_embed_vision", 1 + side * side, width)
    state.put("backbone.pos_embed_text", length, width)
    state["backbone.position_ids_vision"] = torch.arange(1 + side * side)[None]
    state["backbone.position_ids_text"] = torch.arange(length)
    state.put("backbone.patch_embed.weight", width, 3, patch, patch)
    state.put("backbone.patch_embed.bias", width)
    state.put("backbone.word_embedding.weight", words, width)
    for name in ("layer_norm_text", "pre_layrnorm", "norm"):
        state.layer(f"backbone.{name}", width)
    for number, router in enumerate(routers):
        _layer_state(state, f"{LAYER}.{number}", router, experts, vector, width, hidden)
    if task == "retrieval":
        state["itc_temp"] = torch.tensor(0.09)
        state.put("itc_vision_proj_head.weight", 7, width)
        state.put("itc_text_proj_head.weight", 7, width)
        state.layer("itm_head", 2, width)
    if task == "biattn":
        for name in ("attn1", "attn2"):
            state.put(f"{name}.in_proj_weight", 3 * width, width)
            state.put(f"{name}.in_proj_bias", 3 * width)
            state.layer(f"{name}.out_proj", width, width)
        state.layer("fc.0", width, 2 * width)
        state.layer("attn_pool.fc.0", 1, width)
        state.layer("nlvr2_output", 2, 2 * width)
    return state


def _layer_state(
    state: State, name: str, router: str, experts: int, vector: bool, width: int, hidden: int
) -> None:
    for part in ("gamma_1", "gamma_2", "attn.q_bias", "attn.v_bias"):
        state.put(f"{name}.{part}", width)
    state.put(f"{name}.attn.qkv.weight", 3 * width, width)
    state.layer(f"{name}.attn.proj", width, width)
    state.layer(f"{name}.norm1", width)
    kinds = {"shared": ["imag"], "modality": ["imag", "text"], "fusion": ["imag", "text", "vl"], "topk": []}
    perceptrons = [f"mlp_{kind}" for kind in kinds[router]]
    for kind in kinds[router] or ["vl"]:
        state.layer(f"{name}.norm2_{kind}", width)
    if router == "topk":
        moe = "mlp_moe.moe"
        perceptrons = [f"{moe}.experts.experts.{expert}" for expert in range(experts)]
        state.put(f"{name}.{moe}.gate.wg.weight", experts, width)
        if vector:
            state.put(f"{name}.{moe}.vision_embed", width)
            state.put(f"{name}.{moe}.text_embed", width)
    for perceptron in perceptrons:
        state.layer(f"{name}.{perceptron}.fc1", hidden, width)
        state.layer(f"{name}.{perceptron}.fc2", width, hidden)


def imported(state: State, **sizes: Any) -> Imported:
    return import_state(state, "eve", {"heads": 3, "group_size": 4, **sizes})


class Plain:
    """The official computation, written from its description; all samples have the same number of tokens."""

    def __init__(self, state: State, heads: int, factor: float, num_image: int) -> None:
        self.state, self.heads, self.factor, self.num_image = state, heads, factor, num_image
        self.balance: list[Tensor] = []

    def norm(self, x: Tensor, name: str, eps: float = 1e-6) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
        return (x - mean) / (variance + eps).sqrt() * weight + bias

    def mlp(self, x: Tensor, name: str) -> Tensor:
        h = x @ self.state[f"{name}.fc1.weight"].T + self.state[f"{name}.fc1.bias"]
        return (h * torch.sigmoid(1.702 * h)) @ self.state[f"{name}.fc2.weight"].T + self.state[
            f"{name}.fc2.bias"
        ]

    def attention(self, x: Tensor, name: str, real: Tensor) -> Tensor:
        q, k, v = (x @ self.state[f"{name}.qkv.weight"].T).chunk(3, dim=-1)
        q, v = q + self.state[f"{name}.q_bias"], v + self.state[f"{name}.v_bias"]
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        out = logits.masked_fill(~real[:, None, None], -torch.inf).softmax(-1) @ v
        out = out.transpose(1, 2).flatten(2)
        return out @ self.state[f"{name}.proj.weight"].T + self.state[f"{name}.proj.bias"]

    def moe(self, x: Tensor, name: str) -> Tensor:
        """Tokens in the order of the batch, sample by sample; all first choices before second ones."""
        if f"{name}.vision_embed" in self.state:
            image, text = x[:, : self.num_image], x[:, self.num_image :]
            vectors = self.state[f"{name}.vision_embed"], self.state[f"{name}.text_embed"]
            x = torch.cat([image + vectors[0], text + vectors[1]], dim=1)
        rows = x.flatten(0, 1)
        gates = (rows @ self.state[f"{name}.gate.wg.weight"].T).softmax(-1)
        experts = gates.shape[1]
        choices = gates.argsort(-1, descending=True)[:, :2]
        slots = max(4, math.ceil(2 * self.factor * len(rows) / experts))
        taken, kept = [0] * experts, torch.zeros(choices.shape, dtype=torch.bool)
        for choice in range(2):
            for token, expert in enumerate(choices[:, choice].tolist()):
                kept[token, choice] = taken[expert] < slots
                taken[expert] += 1
        weight = gates.gather(1, choices) * kept
        weight = weight / weight.sum(-1, keepdim=True).clamp_min(1e-30)
        out = torch.zeros_like(rows)
        for token, row in enumerate(rows):
            for choice in range(2):
                expert = int(choices[token, choice])
                out[token] += weight[token, choice] * self.mlp(row, f"{name}.experts.experts.{expert}")
        first = F.one_hot(choices[:, 0], experts).float().mean(0)
        self.balance.append(experts * (gates.mean(0) * first).sum())
        return out.view_as(x)

    def layer(self, x: Tensor, name: str, real: Tensor, pair: bool) -> Tensor:
        x = x + self.state[f"{name}.gamma_1"] * self.attention(
            self.norm(x, f"{name}.norm1"), f"{name}.attn", real
        )
        n = self.num_image
        if f"{name}.mlp_moe.moe.gate.wg.weight" in self.state:
            y = self.moe(self.norm(x, f"{name}.norm2_vl"), f"{name}.mlp_moe.moe")
        elif pair and f"{name}.mlp_vl.fc1.weight" in self.state:
            y = self.mlp(self.norm(x, f"{name}.norm2_vl"), f"{name}.mlp_vl")
        elif f"{name}.mlp_text.fc1.weight" not in self.state:
            y = self.mlp(self.norm(x, f"{name}.norm2_imag"), f"{name}.mlp_imag")
        else:
            parts = (("imag", x[:, :n]), ("text", x[:, n:]))
            y = [
                self.mlp(self.norm(part, f"{name}.norm2_{kind}"), f"{name}.mlp_{kind}")
                for kind, part in parts
                if part.shape[1]
            ]
            y = torch.cat(y, dim=1)
        return x + self.state[f"{name}.gamma_2"] * y

    def __call__(self, images: Tensor | None, ids: Tensor | None, real: Tensor | None) -> Tensor:
        state, parts, masks = {k.removeprefix("backbone."): v for k, v in self.state.items()}, [], []
        if images is not None:
            size = state["patch_embed.weight"].shape[-1]
            x = F.conv2d(images, state["patch_embed.weight"], state["patch_embed.bias"], stride=size)
            x = x.flatten(2).transpose(1, 2)
            x = torch.cat([state["class_embedding_vision"].expand(len(x), 1, -1), x], dim=1)
            parts.append(x + state["pos_embed_vision"] + state["type_embed_vision"])
            masks.append(torch.ones(x.shape[:2], dtype=torch.bool))
        if ids is not None and real is not None:
            x = self.norm(state["word_embedding.weight"][ids], "backbone.layer_norm_text")
            parts.append(x + state["pos_embed_text"][: ids.shape[1]] + state["type_embed_text"])
            masks.append(real)
        x, mask = self.norm(torch.cat(parts, dim=1), "backbone.pre_layrnorm"), torch.cat(masks, dim=1)
        self.num_image = 0 if images is None else parts[0].shape[1]
        depth = len({name.split(".")[3] for name in self.state if name.startswith(LAYER)})
        for number in range(depth):
            x = self.layer(x, f"{LAYER}.{number}", mask, pair=len(parts) == 2)
        return self.norm(x, "backbone.norm")


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({}, 0.4),
        ({"routers": ("topk", "modality", "topk"), "experts": 5}, 0.6),
        ({"routers": ("shared", "topk"), "vector": False}, 0.5),
        ({"routers": ("modality", "fusion"), "width": 24, "hidden": 18, "side": 3}, 1.0),
    ],
)
@torch.no_grad()
def test_features_and_balance_equal_a_plain_computation(options: dict[str, Any], factor: float) -> None:
    state = eve_state(**options)
    found = imported(state, capacity_factor=factor)
    model, size = found.build(), found.model.image_size
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(4, 3, size, size, generator=generator)
    ids = torch.randint(0, 17, (4, 5), generator=generator)
    real = torch.arange(5)[None] < torch.tensor([5, 3, 4, 2])[:, None]
    text = texts(ids, ~real)
    dropped = 0
    for inputs, plain_inputs in (
        ({"images_BCHW": images, **text}, (images, ids, real)),
        ({"images_BCHW": images}, (images, None, None)),
        (text, (None, ids, real)),
    ):
        plain = Plain(state, 3, factor, 0)
        expected = plain(*plain_inputs)
        trace = Trace(model, **inputs)
        torch.testing.assert_close(trace.features_BLD, expected, atol=2e-4, rtol=1e-4)
        routing = trace.encoded.routing
        balance = [output.stats.load_balance for output in routing]
        torch.testing.assert_close(balance, plain.balance, atol=1e-5, rtol=1e-5)
        dropped += sum(int(output.stats.dropped_M.sum()) for output in routing)
    assert (dropped > 0) == ("topk" in options.get("routers", ("topk",)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"routers": ("topk", "shared", "topk"), "experts": 6, "vector": False},
        {"routers": ("fusion", "modality"), "task": "none", "width": 24, "side": 5, "length": 9},
    ],
)
def test_there_and_back_is_bit_for_bit(options: dict[str, Any]) -> None:
    official = eve_state(**options)
    found = imported(official)
    assert {name.partition(".")[0] for name in found.lacking} <= {"word_head"}
    back = exported(found)
    assert back.keys() == official.keys()
    for name, tensor in official.items():
        assert back[name].dtype == tensor.dtype, name
        assert torch.equal(back[name], tensor), name


def exported(found: Imported, **changes: Any) -> dict[str, Tensor]:
    state = FORMATS["eve"].state
    assert state is not None
    model = Model.model_validate({**found.model.model_dump(), **changes})
    return state({name: p.detach() for name, p in found.build().named_parameters()}, model)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"activation": "gelu"}, "activation is not quick_gelu"),
        ({"num_types": 3}, "num_types is not 2"),
        ({"matching": {"pooler": True}}, "matching has a pooler"),
        ({"contrast": {"width": 7, "temperature": "scale"}}, "contrast has other paths .* or no divisor"),
        (
            {"feed_forward": [{"blocks": [0, 1], "router": "topk", "modality_vector": "gate"}]},
            "modality_vector is gate",
        ),
    ],
)
def test_a_model_without_a_place_there_is_not_exported(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        exported(imported(eve_state()), **changes)


def test_what_follows_from_names_shapes_and_sizes() -> None:
    official = eve_state(routers=("modality", "topk", "modality", "topk"), experts=7)
    model = imported(official, capacity_factor=1.25, min_capacity=2, gateloss_weight=0.01).model
    assert [model.feed_forward_of(block).router for block in range(4)] == ["modality", "topk"] * 2
    routed = model.feed_forward_of(3)
    assert (routed.num_experts, routed.k, routed.modality_vector) == (7, 2, "dispatch")
    assert (routed.capacity_factor, routed.capacity_factor_eval, routed.min_capacity) == (1.25, 1.25, 2)
    assert (routed.group_size, routed.load_balance_weight) == (4, 0.01)
    assert (model.width, model.hidden, model.image_size, model.text_positions) == (12, 20, 6, 6)
    assert model.contrast is not None
    assert model.contrast.width == 7


def test_bi_attention_does_not_see_padding() -> None:
    head = imported(eve_state(task="biattn")).heads["nlvr2"]
    generator = torch.Generator().manual_seed(6)
    left, right = torch.randn(2, 3, 9, 12, generator=generator)
    keys = torch.arange(9)[None] < torch.tensor([9, 6, 7])[:, None]
    whole = head(left, right, keys)
    for sample, length in enumerate((9, 6, 7)):
        cut = slice(sample, sample + 1), slice(0, length)
        alone = head(left[cut], right[cut], keys[cut])
        torch.testing.assert_close(whole[sample : sample + 1], alone)
    assert not torch.allclose(whole, head(right, left, keys))


@pytest.mark.parametrize(
    ("name", "shape", "sentence"),
    [
        ("backbone.encoder.layers.0.mlp_audio.fc1.bias", (3,), "unknown name .*mlp_audio.fc1.bias"),
        ("backbone.encoder.layers.0.mlp_text.fc1.bias", None, "has no .*layers.0.mlp_text.fc1.bias"),
        ("backbone.encoder.layers.1.mlp_moe.moe.experts.experts.2.fc2.bias", None, "experts.2.fc2.bias"),
        ("itc_vision_proj_head.weight", None, "has no itc_vision_proj_head.weight"),
        ("backbone.pos_embed_vision", (7, 12), "positions of 6 patches, which are no square picture"),
        ("backbone.encoder.layers.1.gamma_1", (5,), r"gamma_1 is \(5,\), expected \(12,\)"),
    ],
)
def test_names_and_shapes_that_do_not_fit_are_named(
    name: str, shape: tuple[int, ...] | None, sentence: str
) -> None:
    official = eve_state()
    if shape is None:
        del official[name]
    else:
        official[name] = torch.ones(shape)
    with pytest.raises(UserError, match=sentence):
        imported(official)
