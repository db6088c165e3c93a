"""What a model computes after its feed-forwards became experts, or its experts more or fewer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eve.config import Recipe
from eve.conversion.open_directory import OpenDirectory
from eve.data.tokenizer import Tokenizer
from eve.model import VisionLanguageModel, build_model
from eve.training.export import export_model, load_exported
from tests.tiny import tiny_recipe
from tools.convert_checkpoint import main

BLOCK = "encoder.blocks.1."
EXPERTS = f"{BLOCK}feed_forward.experts."
ROUTER = f"{BLOCK}feed_forward.router."
SHARED = ("model.feed_forward.1.router=shared",)
BY_MODALITY = ("model.feed_forward.1.router=modality",)
LEARNED = ("model.feed_forward.1.router=topk",)


def write_model(recipe: Recipe, directory: Path) -> VisionLanguageModel:
    """An exported model whose biases and norms are no longer those of a new one."""
    model = build_model(recipe.model, seed=recipe.seed)
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(weights)
    export_model(directory, weights, recipe, Tokenizer.load(recipe.data.tokenizer), {"step": 3})
    return model.eval()


def upcycle(tiny: Path, tmp_path: Path, *words: str) -> VisionLanguageModel:
    argv = [str(tmp_path / "dense"), str(tmp_path / "experts"), "--upcycle", str(tiny), *words]
    assert main([*argv, "--verify"]) == 0
    model, _, _ = load_exported(tmp_path / "experts")
    assert isinstance(model, VisionLanguageModel)
    return model.eval()


def outputs(model: VisionLanguageModel, *, image: bool = True, text: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(0, 40, (9,), generator=generator)
    with torch.no_grad():
        encoded = model.encoder(
            images_BCHW=images if image else None,
            tokens_N=tokens if text else None,
            text_lengths=[5, 4] if text else None,
        )
    return encoded.x_TD


def test_copies_of_one_feed_forward_compute_what_it_did(tiny: Path, tmp_path: Path) -> None:
    dense = write_model(tiny_recipe(tiny, *SHARED), tmp_path / "dense")
    mixed = upcycle(tiny, tmp_path, *LEARNED)
    torch.testing.assert_close(outputs(mixed), outputs(dense))
    fresh = build_model(tiny_recipe(tiny).model, seed=3).state_dict()
    for name in ("weight", "modality_vector"):
        assert torch.equal(mixed.state_dict()[ROUTER + name], fresh[ROUTER + name])


@pytest.mark.parametrize(("modality", "index"), [("image", 0), ("text", 1)])
def test_copies_of_the_expert_of_a_modality(modality: str, index: int, tiny: Path, tmp_path: Path) -> None:
    dense = write_model(tiny_recipe(tiny, *BY_MODALITY), tmp_path / "dense")
    mixed = upcycle(tiny, tmp_path, *LEARNED, "--experts-from", modality)
    only = {"image": index == 0, "text": index == 1}
    torch.testing.assert_close(outputs(mixed, **only), outputs(dense, **only))


def test_alternating_and_mean_experts_of_two_modalities(tiny: Path, tmp_path: Path) -> None:
    dense = write_model(tiny_recipe(tiny, *BY_MODALITY), tmp_path / "dense").state_dict()
    turns = upcycle(tiny, tmp_path, *LEARNED).state_dict()
    (tmp_path / "experts").rename(tmp_path / "first")
    means = upcycle(tiny, tmp_path, *LEARNED, "--experts-from", "mean").state_dict()
    for name in ("w1_EDF", "b1_EF", "w2_EFD", "b2_ED"):
        single = name.replace("_E", "_")
        two = torch.stack([dense[f"{EXPERTS}{kind}.{single}"] for kind in ("image", "text")])
        assert torch.equal(turns[EXPERTS + name], torch.cat([two, two]))
        for expert in means[EXPERTS + name]:
            torch.testing.assert_close(expert, (two[0] + two[1]) / 2)
    for weights in (turns, means):
        norm = weights[f"{BLOCK}norm2.weight"]
        torch.testing.assert_close(norm, dense[f"{BLOCK}norm2.weight"].mean(0))


def test_twice_the_experts_and_choices_compute_the_same(tiny: Path, tmp_path: Path) -> None:
    before = write_model(tiny_recipe(tiny), tmp_path / "dense")
    grown = ("model.feed_forward.1.num_experts=8", "model.feed_forward.1.k=4")
    torch.testing.assert_close(outputs(upcycle(tiny, tmp_path, *grown)), outputs(before))


@pytest.mark.parametrize("how", ["alternate", "mean"])
def test_half_the_experts(how: str, tiny: Path, tmp_path: Path) -> None:
    before = write_model(tiny_recipe(tiny), tmp_path / "dense").state_dict()
    after = upcycle(tiny, tmp_path, "model.feed_forward.1.num_experts=2", "--experts-from", how).state_dict()
    for name in (f"{EXPERTS}w1_EDF", f"{EXPERTS}b2_ED", f"{ROUTER}weight"):
        first, last = before[name].chunk(2)
        torch.testing.assert_close(after[name], first if how == "alternate" else (first + last) / 2)
    assert torch.equal(after[f"{ROUTER}modality_vector"], before[f"{ROUTER}modality_vector"])


def test_noise_parts_the_copies(tiny: Path, tmp_path: Path) -> None:
    dense = write_model(tiny_recipe(tiny, *SHARED), tmp_path / "dense").state_dict()
    noisy = upcycle(tiny, tmp_path, *LEARNED, "--noise", "0.1").state_dict()
    (tmp_path / "experts").rename(tmp_path / "first")
    again = upcycle(tiny, tmp_path, *LEARNED, "--noise", "0.1").state_dict()
    for name, shape in (("w1_EDF", "E D F"), ("b1_EF", "E F")):
        tensor, one = noisy[EXPERTS + name], dense[f"{EXPERTS}shared.{name.replace('_E', '_')}"]
        assert torch.equal(tensor, again[EXPERTS + name])
        noise = (tensor - one) / one.std()
        if shape == "E F":
            assert not bool(noise.any())
            continue
        assert float(noise.std()) == pytest.approx(0.1, rel=0.05)
        assert not torch.equal(noise[0], noise[1])


@pytest.mark.parametrize(
    ("start", "words", "sentence"),
    [
        (
            SHARED,
            (*LEARNED, "model.hidden=128"),
            "feed_forward.experts.image.w1_DF is (32, 64), the model of the recipe tiny has (32, 128)",
        ),
        (SHARED, (*LEARNED, "--experts-from", "text"), "is for banks by modality, found one expert"),
        (
            (),
            ("--experts-from", "image", "model.feed_forward.1.num_experts=2"),
            "found 4 experts of a learned",
        ),
        ((), ("--experts-from", "mean", "model.feed_forward.1.num_experts=8"), "not 8 of 4"),
        ((), SHARED, "only a learned router and its experts may be new"),
        (
            (),
            ("model.decoder=null", "stages.0.streams.0.objective=masked_text"),
            "has decoder.blocks.0.attention.proj.bias, the model of the recipe tiny has none",
        ),
        (SHARED, ("--noise", "-1"), "--noise -1.0 is below 0"),
        (SHARED, ("--world-size", "2"), "no --world-size"),
    ],
)
def test_what_cannot_be_had(
    start: tuple[str, ...],
    words: tuple[str, ...],
    sentence: str,
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_model(tiny_recipe(tiny, *start), tmp_path / "dense")
    argv = [str(tmp_path / "dense"), str(tmp_path / "experts"), "--upcycle", str(tiny), *words]
    assert main(argv) == 2
    assert re.search(re.escape(sentence), capsys.readouterr().err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_what_was_upcycled_is_a_start_and_no_run(tiny: Path, tmp_path: Path) -> None:
    write_model(tiny_recipe(tiny, *SHARED), tmp_path / "dense")
    upcycle(tiny, tmp_path)
    assert OpenDirectory(tmp_path / "experts").run is None
