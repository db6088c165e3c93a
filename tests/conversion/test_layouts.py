"""Files of real engines are read and written bit for bit, in every layout, and training goes on from them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from eve.conversion.layout import Layout
from tests.conversion.runs import (
    DENSE,
    assert_same_files,
    last_step,
    losses,
    options,
    resume,
    train,
)
from tests.rank_pool import RankPool
from tools.convert_checkpoint import main

TENSOR_2_EXPERT_2 = Layout(4, tensor=2, expert=2, zero_stage=1)
EXPERT_4 = Layout(4, expert=4, zero_stage=2)
ONE = Layout(1)
SHORT = ("stages.0.steps=6", "training.checkpoint_every=2", "training.keep_checkpoints=3")


@pytest.fixture(scope="module")
def one_rank() -> Iterator[RankPool]:
    pool = RankPool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def unbroken(tiny: Path, four_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 steps with checkpoints at 2, 4 and 6."""
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    train(four_ranks, tiny, run_dir, TENSOR_2_EXPERT_2, *SHORT)
    return run_dir


@pytest.fixture(scope="module")
def moved(four_ranks: RankPool, unbroken: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From step 2 of the unbroken run on in another layout."""
    run_dir = tmp_path_factory.mktemp("moved") / "run"
    assert main([str(unbroken / "checkpoints" / "step-00000002"), str(run_dir), *options(EXPERT_4)]) == 0
    resume(four_ranks, run_dir, EXPERT_4)
    return run_dir


@pytest.fixture(scope="module")
def moved_again(one_rank: RankPool, moved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From step 4 of the moved run on in one process."""
    run_dir = tmp_path_factory.mktemp("again") / "run"
    assert main([str(moved / "checkpoints" / "step-00000004"), str(run_dir), *options(ONE)]) == 0
    resume(one_rank, run_dir, ONE)
    return run_dir


def test_a_run_that_moves_twice_is_the_unbroken_one(unbroken: Path, moved: Path, moved_again: Path) -> None:
    exported = Path("export", "model.safetensors")
    weights = load_file(unbroken / exported)
    for run_dir in (moved, moved_again):
        expected = losses(unbroken)
        for name, values in losses(run_dir).items():
            assert len(values) == 3
            np.testing.assert_allclose(values, expected[name], rtol=1e-5)
        for name, tensor in load_file(run_dir / exported).items():
            torch.testing.assert_close(tensor, weights[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("name", "layout"), [("unbroken", TENSOR_2_EXPERT_2), ("moved", EXPERT_4), ("moved_again", ONE)]
)
def test_files_of_an_engine_are_written_as_it_wrote_them(
    name: str, layout: Layout, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Out of the layout and back, and through it into all others."""
    run_dir: Path = request.getfixturevalue(name)
    assert main([str(run_dir), str(tmp_path / "open"), "--training-state", "--verify"]) == 0
    exported = run_dir / "export" / "model.safetensors"
    assert (tmp_path / "open" / "model.safetensors").read_bytes() == exported.read_bytes()
    source = tmp_path / "open"
    for number, other in enumerate([TENSOR_2_EXPERT_2, Layout(6, expert=2, zero_stage=2), layout]):
        target = tmp_path / str(number)
        assert main([str(source), str(target), *options(other), "--verify"]) == 0
        source = target
    assert_same_files(last_step(source), last_step(run_dir))


OTHERS = {
    "experts without ZeRO": (Layout(4, tensor=2, expert=2), ()),
    "bf16 of BF16_Optimizer": (Layout(2, tensor=2, zero_stage=1, precision="bf16"), ()),
    "bf16 with experts": (Layout(4, expert=2, zero_stage=2, precision="bf16"), ()),
    "ZeRO 3": (Layout(2, zero_stage=3), DENSE),
    "ZeRO 3 with weights that do not learn": (
        Layout(2, zero_stage=3, precision="bf16"),
        (*DENSE, "stages.0.trainable=['encoder.*', 'word_head.*']"),
    ),
    "ZeRO 2 with parts of experts that do not learn": (
        Layout(2, expert=2, zero_stage=2),
        ("stages.0.trainable=['decoder.*', '*router*', '*attention*', '*w1_EDF', '*w1_DF']",),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_layouts_out_and_back(
    name: str, tiny: Path, two_ranks: RankPool, four_ranks: RankPool, tmp_path: Path
) -> None:
    layout, more = OTHERS[name]
    pool = {2: two_ranks, 4: four_ranks}[layout.world_size]
    run_dir = tmp_path / "run"
    train(pool, tiny, run_dir, layout, "stages.0.steps=2", *more)
    assert main([str(run_dir), str(tmp_path / "open"), "--training-state", "--verify"]) == 0
    exported = run_dir / "export" / "model.safetensors"
    assert (tmp_path / "open" / "model.safetensors").read_bytes() == exported.read_bytes()
    between, back = tmp_path / "between", tmp_path / "back"
    assert main([str(tmp_path / "open"), str(between), *options(Layout(3, zero_stage=1)), "--verify"]) == 0
    assert main([str(between), str(back), *options(layout), "--verify"]) == 0
    assert_same_files(last_step(back), last_step(run_dir))


@pytest.mark.parametrize(
    ("layout", "config", "words"),
    [
        (Layout(2, zero_stage=3), "zero3_fp32.json", ()),
        (Layout(2, tensor=2, zero_stage=2), "zero2_fp32.json", ()),
        (Layout(2, zero_stage=1, precision="bf16"), "zero1_bf16_offload.json", ("--offload",)),
    ],
)
def test_engines_hold_what_was_written(
    layout: Layout,
    config: str,
    words: tuple[str, ...],
    tiny: Path,
    one_rank: RankPool,
    two_ranks: RankPool,
    tmp_path: Path,
) -> None:
    """A finished run that is resumed exports what its engine has loaded."""
    run_dir, moved = tmp_path / "run", tmp_path / "moved"
    train(one_rank, tiny, run_dir, ONE, "stages.0.steps=2", *DENSE)
    assert main([str(run_dir), str(moved), *options(layout), *words]) == 0
    resume(two_ranks, moved, layout, config)
    weights = Path("export", "model.safetensors")
    assert (moved / weights).read_bytes() == (run_dir / weights).read_bytes()


def test_vectors_of_zero_3_end_at_their_size(
    tiny: Path, two_ranks: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads(Path("ds_configs/zero3_fp32.json").read_text())
    config["zero_optimization"]["sub_group_size"] = 3000
    (tmp_path / "zero3.json").write_text(json.dumps(config))
    layout, run_dir, back = Layout(2, zero_stage=3), tmp_path / "run", tmp_path / "back"
    finished = ("stages.0.steps=2", *DENSE)
    train(two_ranks, tiny, run_dir, layout, *finished, config=str(tmp_path / "zero3.json"))
    monkeypatch.setattr("eve.conversion.layout.SUB_GROUP_SIZE", 3000)
    assert main([str(run_dir), str(tmp_path / "open"), "--training-state", "--verify"]) == 0
    assert main([str(tmp_path / "open"), str(back), *options(layout), "--verify"]) == 0
    assert_same_files(last_step(back), last_step(run_dir))
