"""BEiT's layout: the imported model computes what BEiT does, written here once more in plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eve.conversion.foreign.formats import import_state
from eve.errors import UserError
from tests.conversion.official import State, beit_state

SIDE, PATCH, HEADS, WIDTH = 3, 4, 2, 16


def beit(state: State, image_CHW: Tensor) -> Tensor:
    """(3, H, W) -> (1 + P, D) after the last block, in fp64: patch by patch, pair of places by pair."""
    get = {name: tensor.double() for name, tensor in state.items()}
    patches = [
        image_CHW[:, PATCH * row : PATCH * (row + 1), PATCH * column : PATCH * (column + 1)].double()
        for row in range(SIDE)
        for column in range(SIDE)
    ]
    kernel, bias = get["patch_embed.proj.weight"], get["patch_embed.proj.bias"]
    rows = [get["cls_token"][0, 0], *((kernel * patch).sum((1, 2, 3)) + bias for patch in patches)]
    x = torch.stack(rows)
    if "pos_embed" in get:
        x = x + get["pos_embed"][0]
    for block in range(2):
        name = f"blocks.{block}"
        hidden = F.layer_norm(x, (WIDTH,), get[f"{name}.norm1.weight"], get[f"{name}.norm1.bias"], 1e-6)
        table = get.get("rel_pos_bias.relative_position_bias_table")
        table = get.get(f"{name}.attn.relative_position_bias_table", table)
        branch = attention(hidden, {k.removeprefix(f"{name}.attn."): v for k, v in get.items()}, table)
        x = x + branch * get.get(f"{name}.gamma_1", torch.ones(WIDTH))
        hidden = F.layer_norm(x, (WIDTH,), get[f"{name}.norm2.weight"], get[f"{name}.norm2.bias"], 1e-6)
        hidden = F.gelu(hidden @ get[f"{name}.mlp.fc1.weight"].T + get[f"{name}.mlp.fc1.bias"])
        branch = hidden @ get[f"{name}.mlp.fc2.weight"].T + get[f"{name}.mlp.fc2.bias"]
        x = x + branch * get.get(f"{name}.gamma_2", torch.ones(WIDTH))
    return x


def attention(x: Tensor, get: dict[str, Tensor], table: Tensor | None) -> Tensor:
    bias = torch.cat([get["q_bias"], torch.zeros(WIDTH), get["v_bias"]])
    q, k, v = (x @ get["qkv.weight"].T + bias).chunk(3, dim=-1)
    out = []
    for head in range(HEADS):
        part = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
        logits = q[:, part] @ k[:, part].T / (WIDTH // HEADS) ** 0.5
        if table is not None:
            places = range(len(x))
            logits = logits + torch.stack(
                [torch.stack([table[table_row(i, j), head] for j in places]) for i in places]
            )
        out.append(logits.softmax(-1) @ v[:, part])
    return torch.cat(out, -1) @ get["proj.weight"].T + get["proj.bias"]


def table_row(query: int, key: int) -> int:
    """Offsets of patches, then class token to patch, patch to class token, class token to itself."""
    span = 2 * SIDE - 1
    if query and key:
        rows = (query - 1) // SIDE - (key - 1) // SIDE + SIDE - 1
        columns = (query - 1) % SIDE - (key - 1) % SIDE + SIDE - 1
        return rows * span + columns
    return span * span + (0 if key else 1 if query else 2)


@pytest.mark.parametrize(
    "options",
    [
        {"positions": "shared", "codes": 7},
        {"positions": "blocks", "classes": 5},
        {"positions": "none", "absolute": True, "layer_scale": False, "classes": 5, "mean_pool": False},
        {"positions": "blocks", "absolute": True, "codes": 7},
    ],
)
def test_the_imported_model_computes_the_same(options: dict[str, Any]) -> None:
    state = beit_state(**options)
    imported = import_state(state, "beit", {"heads": HEADS})
    model = imported.build()
    images = torch.rand(2, 3, SIDE * PATCH, SIDE * PATCH, generator=torch.Generator().manual_seed(4)) * 2 - 1
    expected = torch.stack([beit(state, image) for image in images])
    get = {name: tensor.double() for name, tensor in state.items()}
    if "norm.weight" in state:
        expected = F.layer_norm(expected, (WIDTH,), get["norm.weight"], get["norm.bias"], 1e-6)
    with torch.no_grad():
        found = model.encode(images_BCHW=images).images_BID
        close(found, expected)
        if "codes" in options:
            assert model.code_head is not None
            close(model.code_head(found), expected @ get["lm_head.weight"].T + get["lm_head.bias"])
        if "classes" in options:
            pooled = expected[:, 0]
            if options.get("mean_pool", True):
                norm = get["fc_norm.weight"], get["fc_norm.bias"]
                pooled = F.layer_norm(expected[:, 1:].mean(1), (WIDTH,), *norm, 1e-6)
            close(imported.heads["image"](found), pooled @ get["head.weight"].T + get["head.bias"])


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=2e-4, atol=2e-4)


def test_the_class_token_head_of_beit_2() -> None:
    state = beit_state(codes=7)
    for name in [name for name in state if name.startswith("blocks.0.")]:
        state[name.replace("blocks.0", "cls_pt_layers.0")] = state[name] + 1
    shared = import_state(state, "beit2", {"early": 1})
    assert shared.model.class_token_head is not None
    assert (shared.model.class_token_head.early, shared.model.class_token_head.shared) == (1, True)
    assert torch.equal(
        shared.weights["class_token_head.blocks.0.feed_forward.experts.shared.w1_DF"],
        state["cls_pt_layers.0.mlp.fc1.weight"].T,
    )
    state.layer("cls_pt_norm", WIDTH)
    state.layer("cls_pt_lm_head", 7, WIDTH)
    own = import_state(state, "beit2", {"early": 1})
    assert torch.equal(own.weights["class_token_head.codes.bias"], state["cls_pt_lm_head.bias"])
    assert torch.equal(own.weights["class_token_head.norm.weight"], state["cls_pt_norm.weight"])


def test_the_head_counts_from_the_blocks_that_the_user_says() -> None:
    state = beit_state(codes=7)
    for name in [name for name in state if name.startswith("blocks.0.")]:
        state[name.replace("blocks.0", "cls_pt_layers.0")] = state[name]
    with pytest.raises(
        UserError, match="class_token_head needs visual_codes and early < depth, found 7 codes"
    ):
        import_state(state, "beit2")


def test_a_table_of_no_square_picture() -> None:
    state = beit_state()
    state["rel_pos_bias.relative_position_bias_table"] = torch.zeros(30, HEADS)
    with pytest.raises(UserError, match="has 30 rows, no square picture's"):
        import_state(state, "beit")
