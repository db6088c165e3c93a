"""tools/verify_import.py: every reference of the official codes, and what it says of a wrong one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eve.conversion.foreign.formats import FORMATS
from eve.conversion.foreign.positions import resize_absolute
from tests.reference import FOLDER
from tools.import_checks.fixture import read_fixture
from tools.verify_import import CHECKS, OTHERS, largest_difference, main


def of_kind(kind: str) -> list[Path]:
    """Files of that kind and of no longer name of one."""
    longer = [other for other in CHECKS if other.startswith(f"{kind}_")]
    return [
        path
        for path in sorted(FOLDER.glob(f"{kind}_*.safetensors"))
        if not any(path.stem.startswith(f"{other}_") for other in longer)
    ]


@pytest.mark.fixtures
@pytest.mark.parametrize("kind", CHECKS)
def test_the_official_outputs_are_met(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    paths = of_kind(kind)
    if not paths:
        pytest.skip(f"no {kind}_*.safetensors in {FOLDER}: set EVE_FIXTURES")
    assert main([str(path) for path in paths]) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = sum(name.startswith("output.") for path in paths for name in load_file(path))
    assert expected
    assert sum(line.endswith(" ok") for line in lines) == expected


@pytest.mark.fixtures
@pytest.mark.parametrize("kind", ["vlmo_rel", "vlmo_abs", "vlmo_nlvr2"])
def test_what_is_exported_computes_the_same(kind: str) -> None:
    """VLMo's export folds one row of BERT into the words, so it is not the same state."""
    paths = of_kind(kind)
    if not paths:
        pytest.skip(f"no {kind}_*.safetensors in {FOLDER}: set EVE_FIXTURES")
    export = FORMATS["vlmo"].state
    assert export is not None
    for path in paths:
        fixture = read_fixture(path)
        sizes = {"heads": fixture.hyper["num_heads"], "image_size": fixture.hyper["image_size"]}
        imported = fixture.imported("vlmo", **sizes)
        weights = {name: p.detach() for name, p in imported.build().named_parameters()}
        state = export(weights, imported.model)
        assert not torch.equal(*(s["text_embeddings.word_embeddings.weight"] for s in (state, fixture.state)))
        # Heads of tasks are none of the model's.
        state |= {name: tensor for name, tensor in fixture.state.items() if "_classifier." in name}
        with torch.no_grad():
            found = CHECKS[kind](replace(fixture, state=state))
        for name, expected in fixture.outputs.items():
            assert largest_difference(found[name], expected) <= fixture.tolerances[name], name


@pytest.mark.fixtures
@pytest.mark.parametrize("kind", OTHERS)
def test_references_that_are_compared_elsewhere(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    paths = sorted(FOLDER.glob(f"{kind}*.json"))
    if not paths:
        pytest.skip(f"no {kind}*.json in {FOLDER}: set EVE_FIXTURES")
    for path in paths:
        assert main([str(path.with_suffix(".safetensors"))]) == 2
        assert "not about imported weights" in capsys.readouterr().err


@pytest.fixture
def fixture(tmp_path: Path) -> Path:
    """One whose outputs need no official code: text rows cut, patches resized."""
    image, text = torch.randn(1, 17, 8), torch.randn(12, 8)
    tensors = {
        "input.transformer.pos_embed": image,
        "input.text_embeddings.position_embeddings.weight": text,
        "output.transformer.pos_embed": resize_absolute(image[0], 6)[None],
        "output.text_embeddings.position_embeddings.weight": text[:8].clone(),
        "output.text_embeddings.position_ids": torch.arange(8)[None],
    }
    return write(tmp_path / "vlmo_interpolate_abs_x", tensors)


def write(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    about = {
        "fixture": path.name,
        "hyper": {"patch": 8, "src": 32, "dst": 48, "src_text": 12, "dst_text": 8},
        "outputs": {name.removeprefix("output."): {} for name in tensors if name.startswith("output.")},
    }
    path.with_suffix(".json").write_text(json.dumps(about))
    save_file(tensors, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def test_one_line_for_each_output(fixture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(fixture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert [line.split()[-1] for line in lines[1:]] == ["ok"] * 3


@pytest.mark.parametrize("name", ["transformer.pos_embed", "text_embeddings.position_ids"])
def test_an_output_that_is_off_is_missed(
    name: str, fixture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(fixture)
    off = tensors[f"output.{name}"]
    off.view(-1)[3] += 1 if off.dtype == torch.int64 else 1e-3
    write(fixture.with_suffix(""), tensors)
    assert main([str(fixture)]) == 1
    missed = [line for line in capsys.readouterr().out.splitlines() if line.endswith("MISSED")]
    assert len(missed) == 1
    assert missed[0].split()[0] == name


def test_an_output_that_is_not_computed_is_missing(fixture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(fixture) | {"output.another": torch.ones(2)}
    write(fixture.with_suffix(""), tensors)
    assert main([str(fixture)]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if "another" in line)
    assert line.split()[1] == "missing"


def test_mistakes_in_the_call(fixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "unheard_of_a.safetensors"
    shutil.copy(fixture, other)
    for path, sentence in (
        (tmp_path / "none.safetensors", "is no fixture"),
        (other, "is no fixture"),
    ):
        assert main([str(path)]) == 2
        assert sentence in capsys.readouterr().err
    write(other.with_suffix(""), load_file(fixture))
    assert main([str(other)]) == 2
    assert "is of no known kind; those are vlmo_rel," in capsys.readouterr().err
    tensors = load_file(fixture)
    del tensors["output.transformer.pos_embed"]
    save_file(tensors, fixture)
    assert main([str(fixture)]) == 2
    assert "has no output.transformer.pos_embed" in capsys.readouterr().err


def test_a_size_or_an_input_that_is_not_said_is_named(
    fixture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    about = fixture.with_suffix(".json")
    tree = json.loads(about.read_text())
    del tree["hyper"]["patch"]
    about.write_text(json.dumps(tree))
    assert main([str(fixture)]) == 2
    assert f"{about}: hyper.patch is missing, which this kind" in capsys.readouterr().err


def test_differences() -> None:
    one = torch.tensor([1.0, torch.nan, torch.inf])
    assert largest_difference(one, one) == 0
    assert largest_difference(one, torch.tensor([1.0, 2.0, torch.inf])) == torch.inf
    assert largest_difference(one[:2], one) == torch.inf
    assert largest_difference(torch.tensor([1.5]), torch.tensor([1.25])) == 0.25
    assert largest_difference(torch.tensor([True]), torch.tensor([1])) == 0
    assert largest_difference(torch.tensor([2]), torch.tensor([1])) == torch.inf
