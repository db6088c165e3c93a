"""The tokenizer as a whole: it learns, uses its codes, and comes back from its files."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from eve.errors import UserError
from eve.visual_tokenizer import Stack, VisualTokenizer, VisualTokenizerConfig, load_config
from tests.tiny import make_record

SMALL = {
    "image_size": 32,
    "patch_size": 8,
    "codes": 24,
    "code_width": 8,
    "encoder": Stack(depth=2, width=32, heads=2, hidden=64),
    "decoder": Stack(depth=1, width=32, heads=2, hidden=64),
    "decay": 0.9,
    "commitment": 0.25,
    "init_std": 0.1,
}


def images(number: int) -> torch.Tensor:
    """Coloured shapes, uint8 (B, 3, 32, 32)."""
    arrays = [
        np.asarray(Image.open(io.BytesIO(make_record(i).image_bytes or b"")).convert("RGB").resize((32, 32)))
        for i in range(number)
    ]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def train(tokenizer: VisualTokenizer, batch: torch.Tensor, steps: int, features: torch.Tensor | None = None):
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=3e-3)
    tokenizer.begin(batch, features)
    errors = []
    for _ in range(steps):
        result = tokenizer(batch, features)
        result.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tokenizer.quantiser.update(result.vectors_NW, result.codes_N)
        errors.append(float(result.error))
    return errors


@pytest.mark.parametrize("target", ["pixels", "normalised_pixels"])
def test_the_error_falls_and_the_codes_are_used(target: str) -> None:
    batch = images(48)
    tokenizer = VisualTokenizer(VisualTokenizerConfig(**SMALL, target=target), seed=1)  # pyright: ignore
    errors = train(tokenizer, batch, 80)
    trivial = float(tokenizer.pixel_target(batch).var(dim=(0, 1), unbiased=False).mean())
    assert errors[0] < 1.2 * trivial, "the prediction begins at the mean"
    assert errors[-1] < 0.5 * trivial
    codes = tokenizer.encode(batch)
    assert codes.dtype == torch.int64
    assert codes.shape == (48, 16)
    assert len(codes.unique()) > 0.5 * 24


def test_codes_stand_for_what_was_decoded() -> None:
    """`decode` of the codes is the prediction of the forward pass, and to_images brings it into bytes."""
    batch = images(4)
    tokenizer = VisualTokenizer(VisualTokenizerConfig(**SMALL), seed=1)  # pyright: ignore
    train(tokenizer, batch, 3)
    result = tokenizer(batch)
    codes_BP = tokenizer.encode(batch)
    assert torch.equal(codes_BP.flatten(), result.codes_N)
    torch.testing.assert_close(tokenizer.decode(codes_BP), result.pred_BPF, atol=1e-5, rtol=1e-4)
    exact = tokenizer.to_images(tokenizer.pixel_target(batch), batch)
    assert torch.equal(exact, batch)


def test_normalised_pixels_come_back_with_the_moments_of_the_picture() -> None:
    config = VisualTokenizerConfig(**SMALL, target="normalised_pixels")  # pyright: ignore
    tokenizer, batch = VisualTokenizer(config), images(3)
    back = tokenizer.to_images(tokenizer.pixel_target(batch), batch)
    assert int((back.int() - batch.int()).abs().max()) <= 1


def test_features_of_a_teacher_are_learned_by_their_direction() -> None:
    batch = images(32)
    config = VisualTokenizerConfig(**SMALL, target="features", feature_width=6)  # pyright: ignore
    tokenizer = VisualTokenizer(config, seed=1)
    mix = torch.randn(192, 6, generator=torch.Generator().manual_seed(0))
    raw = torch.nn.functional.unfold(batch.float() / 255, 8, stride=8).transpose(1, 2) - 0.5
    features = raw @ mix
    assert train(tokenizer, batch, 60, features)[-1] < 0.2
    result, again = tokenizer(batch, features), tokenizer(batch, 7 * features)
    expected = 1 - torch.nn.functional.cosine_similarity(result.pred_BPF, features, dim=-1).mean()
    torch.testing.assert_close(result.error, expected)
    torch.testing.assert_close(again.error, expected)


def test_the_encoder_learns_from_both_parts_of_the_loss() -> None:
    batch = images(2)
    tokenizer = VisualTokenizer(VisualTokenizerConfig(**SMALL), seed=2)  # pyright: ignore
    tokenizer.begin(batch)
    result = tokenizer(batch)
    torch.testing.assert_close(result.loss.detach(), result.error + 0.25 * result.distance)
    result.loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in tokenizer.parameters())


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    batch = images(8)
    tokenizer = VisualTokenizer(VisualTokenizerConfig(**SMALL), seed=3)  # pyright: ignore
    train(tokenizer, batch, 2)
    tokenizer.save(tmp_path / "made" / "here")
    loaded = VisualTokenizer.load(tmp_path / "made" / "here")
    assert load_config(tmp_path / "made" / "here") == tokenizer.config == loaded.config
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    state = loaded.state_dict()
    assert state.keys() == tokenizer.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in tokenizer.state_dict().items())
    assert torch.equal(loaded.encode(batch), tokenizer.encode(batch))
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["here"]


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"is not a visual tokenizer: it has no visual_tokenizer.json; make one"
    ):
        VisualTokenizer.load(tmp_path)
    tokenizer = VisualTokenizer(VisualTokenizerConfig(**SMALL))  # pyright: ignore
    tokenizer.save(tmp_path)
    weights = tmp_path / "visual_tokenizer.safetensors"
    state = load_file(weights)
    save_file({name: tensor for name, tensor in state.items() if name != "to_code.0.bias"}, weights)
    with pytest.raises(UserError, match=r"to_code.0.bias is missing, expected \(32,\)"):
        VisualTokenizer.load(tmp_path)
    weights.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"visual_tokenizer.safetensors cannot be read"):
        VisualTokenizer.load(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match=r"it has no visual_tokenizer.safetensors"):
        VisualTokenizer.load(tmp_path)
    written = json.loads((tmp_path / "visual_tokenizer.json").read_text())
    (tmp_path / "visual_tokenizer.json").write_text(json.dumps({**written, "codes": 1}))
    with pytest.raises(UserError, match=r"not the configuration of a visual tokenizer: codes: "):
        VisualTokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="features need their width"):
        VisualTokenizerConfig(target="features")
    with pytest.raises(ValueError, match=r"encoder: width 30 is not a multiple of heads 4"):
        VisualTokenizerConfig(encoder=Stack(depth=1, width=30, heads=4, hidden=64))
    with pytest.raises(ValueError, match=r"images are \(2, 3, 16, 16\), expected \(B, 3, 32, 32\)"):
        tokenizer.encode(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
