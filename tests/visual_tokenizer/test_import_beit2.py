"""A VQ-KD state under the published names against the published computation, written out in plain PyTorch. No
published file is at hand: that the names and the computation are those of the file is not shown here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from eve.errors import UserError
from eve.visual_tokenizer import VisualTokenizer
from eve.visual_tokenizer.import_beit2 import read
from tools.convert_checkpoint import main

WIDTH, HEADS, CODES, CODE_WIDTH, SIDE, PATCH, FEATURES = 24, 3, 11, 6, 3, 4, 10


def official_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 0.3) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale

    state = {}
    for stack, depth, channels, patch in (("encoder", 2, 3, PATCH), ("decoder", 1, CODE_WIDTH, 1)):
        state |= {
            f"{stack}.cls_token": normal(1, 1, WIDTH),
            f"{stack}.pos_embed": normal(1, SIDE * SIDE + 1, WIDTH),
            f"{stack}.patch_embed.proj.weight": normal(WIDTH, channels, patch, patch),
            f"{stack}.patch_embed.proj.bias": normal(WIDTH),
            f"{stack}.fc_norm.weight": 1 + normal(WIDTH),
            f"{stack}.fc_norm.bias": normal(WIDTH),
        }
        for block in range(depth):
            prefix = f"{stack}.blocks.{block}"
            for norm in ("norm1", "norm2"):
                state[f"{prefix}.{norm}.weight"] = 1 + normal(WIDTH)
                state[f"{prefix}.{norm}.bias"] = normal(WIDTH)
            state[f"{prefix}.attn.qkv.weight"] = normal(3 * WIDTH, WIDTH)
            for bias in ("q_bias", "v_bias"):
                state[f"{prefix}.attn.{bias}"] = normal(WIDTH)
            for name, out, into in (
                ("attn.proj", WIDTH, WIDTH),
                ("mlp.fc1", 4 * WIDTH, WIDTH),
                ("mlp.fc2", WIDTH, 4 * WIDTH),
            ):
                state[f"{prefix}.{name}.weight"], state[f"{prefix}.{name}.bias"] = (
                    normal(out, into),
                    normal(out),
                )
    for name, out in (("encode_task_layer", CODE_WIDTH), ("decode_task_layer", FEATURES)):
        for layer, size in ((0, WIDTH), (2, out)):
            state[f"{name}.{layer}.weight"], state[f"{name}.{layer}.bias"] = normal(size, WIDTH), normal(size)
    state["quantize.embedding.weight"] = F.normalize(normal(CODES, CODE_WIDTH), dim=-1)
    state["quantize.embedding.cluster_size"] = torch.zeros(CODES)
    state["quantize.embedding.embed_avg"] = normal(CODES, CODE_WIDTH)
    state["quantize.embedding.initted"] = torch.ones(1)
    state["quantize.cluster_size"] = normal(CODES).abs()
    state["teacher_model.anything"] = normal(2)
    return state


def official_stack(state: dict[str, torch.Tensor], stack: str, x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, P, D)."""
    part = {
        name.removeprefix(f"{stack}."): tensor for name, tensor in state.items() if name.startswith(stack)
    }
    weight = part["patch_embed.proj.weight"]
    x = F.conv2d(x, weight, part["patch_embed.proj.bias"], stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    x = torch.cat([part["cls_token"].expand(len(x), -1, -1), x], dim=1) + part["pos_embed"]
    for block in range(2 if stack == "encoder" else 1):
        own = {
            n.removeprefix(f"blocks.{block}."): t for n, t in part.items() if n.startswith(f"blocks.{block}.")
        }
        y = F.layer_norm(x, (WIDTH,), own["norm1.weight"], own["norm1.bias"], 1e-6)
        bias = torch.cat([own["attn.q_bias"], torch.zeros(WIDTH), own["attn.v_bias"]])
        qkv = F.linear(y, own["attn.qkv.weight"], bias).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        logits = qkv[0] * (WIDTH // HEADS) ** -0.5 @ qkv[1].transpose(-1, -2)
        y = (logits.softmax(-1) @ qkv[2]).transpose(1, 2).flatten(2)
        x = x + F.linear(y, own["attn.proj.weight"], own["attn.proj.bias"])
        y = F.layer_norm(x, (WIDTH,), own["norm2.weight"], own["norm2.bias"], 1e-6)
        y = F.gelu(F.linear(y, own["mlp.fc1.weight"], own["mlp.fc1.bias"]))
        x = x + F.linear(y, own["mlp.fc2.weight"], own["mlp.fc2.bias"])
    return F.layer_norm(x[:, 1:], (WIDTH,), part["fc_norm.weight"], part["fc_norm.bias"], 1e-6)


def official_mlp(state: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    x = torch.tanh(F.linear(x, state[f"{name}.0.weight"], state[f"{name}.0.bias"]))
    return F.linear(x, state[f"{name}.2.weight"], state[f"{name}.2.bias"])


def test_codes_and_features_are_those_of_the_published_computation() -> None:
    state = official_state()
    config, weights = read(state, heads=HEADS)
    tokenizer = VisualTokenizer(config)
    tokenizer.load_state_dict(weights)
    size = SIDE * PATCH
    images = torch.randint(0, 256, (5, 3, size, size), generator=torch.Generator().manual_seed(1)).byte()
    vectors = official_mlp(state, "encode_task_layer", official_stack(state, "encoder", images / 127.5 - 1))
    unit = vectors / vectors.norm(dim=-1, keepdim=True)
    book = state["quantize.embedding.weight"]
    distances = (unit[:, :, None] - book).square().sum(-1)
    codes = distances.argmin(-1)
    assert torch.equal(tokenizer.encode(images), codes)
    assert len(codes.unique()) > 3
    grid = book[codes].transpose(1, 2).unflatten(2, (SIDE, SIDE))
    features = official_mlp(state, "decode_task_layer", official_stack(state, "decoder", grid))
    torch.testing.assert_close(tokenizer.decode(codes), features, atol=1e-4, rtol=1e-4)


def test_convert_checkpoint_makes_a_tokenizer_of_a_file(tmp_path: Path, capsys) -> None:
    torch.save({"model": official_state()}, tmp_path / "vqkd.pth")
    arguments = [str(tmp_path / "vqkd.pth"), str(tmp_path / "visual"), "--from", "beit2_tokenizer"]
    assert main(arguments) == 0
    assert "not verified" in capsys.readouterr().out
    # The number of heads is width / 64 there.
    _, weights = read(official_state())
    loaded = VisualTokenizer.load(tmp_path / "visual").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    assert main(arguments) == 2
    assert "visual exists" in capsys.readouterr().err
    assert main([*arguments[:1], str(tmp_path / "other"), *arguments[2:], "--verify"]) == 2
    assert "give no other option" in capsys.readouterr().err


def test_names_that_are_missing_or_unknown_are_told() -> None:
    state = official_state()
    with pytest.raises(UserError, match=r"holds 1 unknown names, the first is encoder.blocks.0.gamma_1"):
        read({**state, "encoder.blocks.0.gamma_1": torch.ones(3)})
    del state["decoder.fc_norm.bias"]
    with pytest.raises(UserError, match=r"the VQ-KD state has no decoder.fc_norm.bias"):
        read(state)
