"""Official weights as the start of a recipe's model: which part fills which, and what a stage makes of it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eve import evaluate
from eve.config import Recipe
from eve.conversion.foreign.checkpoint import ForeignCheckpoint, ForeignOptions
from eve.conversion.foreign.formats import import_state
from eve.conversion.foreign.state_files import read_state
from eve.errors import UserError
from eve.model import build_model
from eve.training.export import load_weights
from tests.conversion.official import State, beit_state, vlmo_state
from tests.tiny import tiny_recipe
from tools.convert_checkpoint import main

# What the tiny recipe has otherwise than the states of tests/conversion/official.py.
SAME = (
    *("model.width=16", "model.depth=2", "model.heads=2", "model.hidden=48", "model.patch_size=4"),
    *("model.image_size=12", "model.activation=gelu", "model.layer_scale=0.1", "model.embedding_norm=false"),
    *("model.absolute_positions=false", "model.relative_positions=blocks", "model.text_positions=16"),
)
VLMO = "model.feed_forward=[{blocks: 0, router: modality}, {blocks: 1, router: fusion}]"
EVE = "model.feed_forward=[{blocks: 0, router: modality}, {blocks: 1, router: topk, num_experts: 4}]"
POOLS = (
    "model.feed_forward=[{blocks: 0, router: modality}, {blocks: 1, router: topk, modality_vector: none, "
    "experts_by_modality: [3, 2], fusion_expert: true}]"
)


def saved(path: Path, state: State, **more: Any) -> Path:
    torch.save({"model": dict(state), **more}, path)
    return path


def start(tiny: Path, tmp_path: Path, state: State, form: str, *overrides: str) -> dict[str, Tensor]:
    recipe = tiny_recipe(tiny, *SAME, *overrides)
    source = ForeignCheckpoint(saved(tmp_path / "official.pt", state), form, ForeignOptions(recipe))
    return {parameter.name: source.read(parameter.name, "weight") for parameter in source.parameters}


def initial(recipe: Recipe) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in build_model(recipe.model, recipe.seed).named_parameters()}


def expert(block: int, kind: str) -> str:
    """The first matrix of an expert of a hard router."""
    return f"encoder.blocks.{block}.feed_forward.experts.{kind}.w1_DF"


def bank(block: int) -> str:
    """Those of a learned router's experts."""
    return f"encoder.blocks.{block}.feed_forward.experts.w1_EDF"


def test_vlmo_starts_with_beit_as_its_image_expert(tiny: Path, tmp_path: Path) -> None:
    state = beit_state(codes=5)
    found = start(tiny, tmp_path, state, "beit", VLMO)
    new = initial(tiny_recipe(tiny, *SAME, VLMO))
    assert found.keys() == new.keys()
    for block, kinds in ((0, 2), (1, 3)):
        first = state[f"blocks.{block}.mlp.fc1.weight"].T
        assert torch.equal(found[expert(block, "image")], first)
        assert torch.equal(found[expert(block, "text")], new[expert(block, "text")])
        norm = found[f"encoder.blocks.{block}.norm2.weight"]
        assert torch.equal(norm[0], state[f"blocks.{block}.norm2.weight"])
        assert torch.equal(norm[1:], torch.ones(kinds - 1, 16))
        qkv = found[f"encoder.blocks.{block}.attention.qkv.weight"]
        assert torch.equal(qkv, state[f"blocks.{block}.attn.qkv.weight"])
        # One table for all blocks fills that of each; the words' distances start as in a new table.
        table = found["encoder.relative_positions.table_TRH"][block]
        assert torch.equal(table[:28], state["rel_pos_bias.relative_position_bias_table"])
        assert not table[28:].count_nonzero()
    word = "encoder.text_embedding.word.weight"
    assert torch.equal(found[word], new[word])


def test_images_alone_are_encoded_as_beit_does(tiny: Path, tmp_path: Path) -> None:
    state = beit_state(positions="blocks", codes=5)
    model = build_model(tiny_recipe(tiny, *SAME, VLMO).model, seed=0).eval()
    model.load_state_dict(start(tiny, tmp_path, state, "beit", VLMO))
    images = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model.encode(images_BCHW=images).images_BID
        expected = import_state(state, "beit").build().encode(images_BCHW=images).images_BID
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_eve_starts_with_copies_in_every_expert(tiny: Path, tmp_path: Path) -> None:
    state, both = beit_state(), "start.feed_forward=[image, text]"
    found = start(tiny, tmp_path, state, "beit", EVE, both)
    for kind in ("image", "text"):
        assert torch.equal(found[expert(0, kind)], state["blocks.0.mlp.fc1.weight"].T)
    assert torch.equal(found[bank(1)], state["blocks.1.mlp.fc1.weight"].T.expand(4, -1, -1))
    assert torch.equal(found["encoder.blocks.1.norm2.weight"], state["blocks.1.norm2.weight"])
    router = "encoder.blocks.1.feed_forward.router.weight"
    routers = [name for name in found if ".router." in name]
    assert routers
    new = initial(tiny_recipe(tiny, *SAME, EVE))
    assert all(torch.equal(found[name], new[name]) for name in routers), router

    noisy = start(tiny, tmp_path, state, "beit", EVE, both, "start.noise=0.1")
    first = state["blocks.1.mlp.fc1.weight"].T
    assert torch.equal(noisy[expert(0, "text")], found[expert(0, "text")])
    apart = noisy[bank(1)] - first
    assert float(apart.std() / first.std()) == pytest.approx(0.1, rel=0.1)
    assert all(not torch.equal(apart[0], apart[expert]) for expert in (1, 2, 3))
    again = start(tiny, tmp_path, state, "beit", EVE, both, "start.noise=0.1")
    assert torch.equal(again[bank(1)], noisy[bank(1)])


def test_pools_by_modality_and_the_expert_of_pairs(tiny: Path, tmp_path: Path) -> None:
    state = beit_state()
    found = start(tiny, tmp_path, state, "beit", POOLS, "start.feed_forward=[text, fusion]")
    new = initial(tiny_recipe(tiny, *SAME, POOLS))
    first = state["blocks.1.mlp.fc1.weight"].T
    assert torch.equal(found[bank(1)][:3], new[bank(1)][:3])
    assert torch.equal(found[bank(1)][3:], first.expand(2, -1, -1))
    assert torch.equal(found["encoder.blocks.1.feed_forward.fusion.w1_DF"], first)
    norm = found["encoder.blocks.1.norm2.weight"]
    assert torch.equal(norm[1:], state["blocks.1.norm2.weight"].expand(2, -1))
    assert torch.equal(norm[0], torch.ones(16))


def test_experts_by_modality_fill_those_of_the_same_name(tiny: Path, tmp_path: Path) -> None:
    more = ("model.text_norm=after_positions", "model.num_types=3")
    state = vlmo_state(fusion_from=1, table_length=196, words=40)
    found = start(tiny, tmp_path, state, "vlmo", VLMO, *more, "model.image_size=20")
    for ours, theirs in (("image", "imag"), ("text", "text"), ("fusion", "vl")):
        mlp = state[f"transformer.blocks.1.mlp_{theirs}.fc1.weight"]
        assert torch.equal(found[expert(1, ours)], mlp.T)
    # A second image starts as the first.
    types = state["token_type_embeddings.weight"]
    assert torch.equal(found["encoder.type_embedding"], types[[1, 0, 1]])
    assert found["encoder.relative_positions.table_TRH"].shape == (2, 9**2 + 5 + 2 * 16, 2)

    found = start(tiny, tmp_path, state, "vlmo", EVE, *more, "start.feed_forward=[image, text]")
    imag, text = (state[f"transformer.blocks.1.mlp_{kind}.fc1.weight"].T for kind in ("imag", "text"))
    assert torch.equal(found[bank(1)], torch.stack([imag, text, imag, text]))


def test_experts_that_fill_nothing_are_told(tiny: Path, tmp_path: Path) -> None:
    shared = "model.feed_forward=[{blocks: 0-1, router: shared}]"
    more = ("model.vocab_size=40", "model.text_norm=after_positions")
    recipe = tiny_recipe(tiny, *SAME, *more, shared)
    state = vlmo_state(table_length=196, words=40)
    source = ForeignCheckpoint(saved(tmp_path / "official.pt", state), "vlmo", ForeignOptions(recipe))
    image = state["transformer.blocks.1.mlp_imag.fc1.weight"].T
    assert torch.equal(source.read(expert(1, "shared"), "weight"), image)
    left = next(note for note in source.notes if note.startswith("left behind"))
    assert "encoder.blocks.0.feed_forward.experts.text.w1_DF" in left


def test_attention_can_start_anew_and_one_fills_both_modalities(tiny: Path, tmp_path: Path) -> None:
    state = beit_state()
    found = start(tiny, tmp_path, state, "beit", VLMO, "start.attention=false")
    new = initial(tiny_recipe(tiny, *SAME, VLMO))
    for name in ("attention.qkv.weight", "attention.proj.bias", "norm1.weight"):
        assert torch.equal(found[f"encoder.blocks.1.{name}"], new[f"encoder.blocks.1.{name}"])
    found = start(tiny, tmp_path, state, "beit", VLMO, "model.attention=modality")
    for modality in ("image", "text"):
        weight = found[f"encoder.blocks.1.attention.qkv.{modality}.weight"]
        assert torch.equal(weight, state["blocks.1.attn.qkv.weight"])
    assert torch.equal(found["encoder.blocks.1.norm1.weight"], state["blocks.1.norm1.weight"].expand(2, -1))


def test_without_layer_scale_the_gains_are_one(tiny: Path, tmp_path: Path) -> None:
    found = start(tiny, tmp_path, beit_state(layer_scale=False), "beit", VLMO)
    assert torch.equal(found["encoder.blocks.0.gamma1"], torch.ones(16))


@pytest.mark.parametrize(
    ("state", "form", "overrides", "sentence"),
    [
        (beit_state(), "beit", ["model.width=32"], "width is 16, the recipe has model.width 32"),
        (
            beit_state(),
            "beit",
            ["model.layer_scale=null"],
            "has encoder.blocks.0.gamma1, for which the recip",
        ),
        (beit_state(), "beit", ["model.relative_positions=none"], "has encoder.relative_positions.table_TRH"),
        (
            beit_state(positions="blocks"),
            "beit",
            ["model.relative_positions=shared"],
            "has model.relative_positions blocks, the recipe has shared",
        ),
        (
            vlmo_state(table_length=196),
            "vlmo",
            [],
            "has 24 words, the recipe has model.vocab_size 40; leave the words out with --ignore",
        ),
    ],
)
def test_what_does_not_fit(
    state: State, form: str, overrides: list[str], sentence: str, tiny: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        start(tiny, tmp_path, state, form, VLMO, *overrides)


def test_the_command_writes_what_a_stage_starts_from(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    official = saved(tmp_path / "beit.pth", beit_state(classes=3), args=argparse.Namespace(lr=1), epoch=8)
    target = tmp_path / "start"
    words = [str(official), str(target), "--from", "beit", "--recipe", str(tiny), *SAME, VLMO]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "new, from the seed 3: encoder.text_embedding.word.weight" in printed
    assert "left behind: the head for image" in printed
    recipe = tiny_recipe(tiny, *SAME, VLMO)
    model = build_model(recipe.model, seed=0)
    load_weights(model, target)
    first = dict(model.named_parameters())[expert(0, "image")]
    assert torch.equal(first, beit_state()["blocks.0.mlp.fc1.weight"].T)
    assert main([*words, "--verify"]) == 0
    assert "the same, bit for bit" in capsys.readouterr().out


def test_out_of_and_back_into_vlmos_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    official, ours = saved(tmp_path / "vlmo.pt", vlmo_state()), tmp_path / "ours"
    assert main([str(official), str(ours), "--from", "vlmo", "--size", "image_size=12"]) == 0
    for back in (tmp_path / "back.pt", tmp_path / "back.safetensors"):
        assert main([str(ours), str(back), "--to", "vlmo"]) == 0
        found = read_state(back)
        assert found.keys() == vlmo_state().keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in vlmo_state().items())
        assert main([str(ours), str(back), "--to", "vlmo"]) == 2
        assert "exists; give a path that does not" in capsys.readouterr().err


def test_berts_row_comes_back_within_the_words(tmp_path: Path) -> None:
    """The only tensors that differ after VLMo -> ours -> VLMo."""
    state = vlmo_state()
    types, words = (f"text_embeddings.{name}_embeddings.weight" for name in ("token_type", "word"))
    state.put(types, 2, 16)
    official, ours, back = saved(tmp_path / "vlmo.pt", state), tmp_path / "ours", tmp_path / "back.pt"
    assert main([str(official), str(ours), "--from", "vlmo", "--size", "image_size=12"]) == 0
    assert main([str(ours), str(back), "--to", "vlmo"]) == 0
    found = read_state(back)
    expected = state | {words: state[words] + state[types][0], types: torch.zeros(2, 16)}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_what_the_official_code_has_no_place_for_is_left_behind_and_named(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, back = tmp_path / "ours", tmp_path / "back.pt"
    official = saved(tmp_path / "beit.pth", beit_state())
    words = [str(official), str(ours), "--from", "beit", "--recipe", str(tiny), *SAME, VLMO]
    assert main([*words, "model.text_norm=after_positions"]) == 0
    capsys.readouterr()
    assert main([str(ours), str(back), "--to", "vlmo"]) == 0
    assert "left behind: decoder." in capsys.readouterr().out
    found = read_state(back)
    assert "mlm_score.bias" in found
    assert torch.equal(found["transformer.cls_token"], beit_state()["cls_token"])
    assert not [name for name in found if "decoder" in name.removeprefix("mlm_score.decoder")]


def test_words_cannot_be_read_without_a_tokenizer(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = tmp_path / "ours"
    official = saved(tmp_path / "vlmo.pt", vlmo_state())
    assert main([str(official), str(ours), "--from", "vlmo", "--size", "image_size=12"]) == 0
    assert "no tokenizer: give --tokenizer FILE" in capsys.readouterr().out
    shards = tiny_recipe(tiny).data.sources["pairs"].mix[0].shards
    command = ["--task", "retrieval", "--checkpoint", str(ours), "--data", shards]
    assert evaluate.main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"error: {ours / 'tokenizer.model'} is empty, as where weights were converted without"
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--size", "heads=2"], "--size is for weights of another project; say --from vlmo"),
        (["--recipe", "eve_base"], "--recipe is for weights of another project"),
        (["--from", "beit", "--size", "heads"], "'heads' is not a size such as heads=12"),
        (["--from", "beit", "model.depth=3"], "model.depth=3 is for --upcycle or --recipe"),
        (["--from", "beit", "--to", "vlmo", "--verify"], "--verify compares what eve reads"),
        (["--from", "beit", "--to", "vlmo", "--world-size", "2"], "--to writes weights alone"),
        ([], "is a file; say --from vlmo"),
    ],
)
def test_mistakes_in_the_call(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    official = saved(tmp_path / "beit.pth", beit_state())
    assert main([str(official), str(tmp_path / "out"), *words]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def spring(path: str) -> None:
    Path(path).touch()


class Trap:
    """Unpickling it as it is would write a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return spring, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_reading_runs_nothing_of_a_file(zipped: bool, tmp_path: Path) -> None:
    path, trap = tmp_path / "official.pt", tmp_path / "sprung"
    tree = {"state_dict": dict(beit_state()), "callback": Trap(str(trap))}
    torch.save(tree, path, _use_new_zipfile_serialization=zipped)
    if zipped:
        assert read_state(path).keys() == beit_state().keys()
    else:
        with pytest.raises(UserError, match=r"cannot be read: Unsupported global: GLOBAL tests\.\S+\.spring"):
            read_state(path)
    assert not trap.exists()


@pytest.mark.parametrize("nests", [(), ("state_dict",), ("model",), ("module",), ("model", "state_dict")])
def test_weights_are_found_where_training_scripts_put_them(nests: tuple[str, ...], tmp_path: Path) -> None:
    state = beit_state()
    tree: dict[str, Any] = (
        {f"module.{name}": tensor for name, tensor in state.items()} if nests else {**state}
    )
    for nest in reversed(nests):
        tree = {nest: tree, "epoch": 3, "args": argparse.Namespace()}
    for zipped in (True, False):
        torch.save(tree, tmp_path / "official.pth", _use_new_zipfile_serialization=zipped)
        found = read_state(tmp_path / "official.pth")
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_files_without_weights(tmp_path: Path) -> None:
    path = tmp_path / "official.pt"
    with pytest.raises(UserError, match=r"official\.pt is missing"):
        read_state(path)
    path.write_bytes(b"no file of weights")
    with pytest.raises(UserError, match=r"official\.pt cannot be read"):
        read_state(path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(UserError, match="holds no weights by name, nor has it them under state_dict, module"):
        read_state(path)
    torch.save({"a": torch.ones(1), "epoch": 3}, path)
    with pytest.raises(UserError, match="epoch is no tensor but int"):
        read_state(path)
