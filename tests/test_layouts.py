"""The same recipe on one and on two processes, with other numbers of workers, is the same run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eve import pretrain
from eve.data.tokenizer import Tokenizer
from eve.objectives import build_objective
from eve.parallel.topology import Topology
from eve.training.ds_config import plan_step
from eve.training.feed import StepFeed
from tests.rank_pool import RankPool
from tests.test_resume import arguments, kill_before_the_rename, metrics
from tests.tiny import tiny_recipe

STEPS = 20
LONG = (f"stages.0.steps={STEPS}", "training.checkpoint_every=10")


def pretrain_on_every_rank(argv: list[str]) -> int:
    return pretrain.main(argv)


def losses(run_dir: Path) -> dict[str, np.ndarray]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    names = ("loss/masked_image", "loss/masked_text", "accuracy/masked_text", "grad_norm", "lr")
    return {name: np.array([line[name] for line in lines if name in line]) for name in names}


@pytest.fixture(scope="module")
def one_process(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("one") / "run"
    assert pretrain.main(arguments(tiny, run_dir, *LONG)) == 0
    return run_dir


@pytest.mark.parametrize(
    ("config", "more"),
    [("zero0_fp32.json", "training.num_workers=0"), ("zero2_fp32.json", "training.num_workers=2")],
)
def test_losses_of_two_processes_are_those_of_one(
    config: str, more: str, tiny: Path, one_process: Path, two_ranks: RankPool, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    argv = arguments(tiny, run_dir, "--deepspeed_config", f"ds_configs/{config}", *LONG, more)
    assert two_ranks.run(pretrain_on_every_rank, argv) == [0, 0]
    expected = losses(one_process)
    for name, values in losses(run_dir).items():
        assert len(values) == STEPS // 2, name
        np.testing.assert_allclose(values, expected[name], rtol=1e-5)


def test_workers_change_nothing(tiny: Path, one_process: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert pretrain.main(arguments(tiny, run_dir, *LONG, "training.num_workers=3")) == 0
    for name, values in losses(run_dir).items():
        np.testing.assert_array_equal(values, losses(one_process)[name])


def test_two_processes_go_on_where_one_was_stopped(
    tiny: Path, one_process: Path, two_ranks: RankPool, tmp_path: Path
) -> None:
    """ZeRO stage 0 keeps one whole copy, so a checkpoint of it fits any number of processes."""
    run_dir = tmp_path / "run"
    first = arguments(tiny, run_dir, *LONG)
    assert pretrain.main(first) == 0
    checkpoints = run_dir / "checkpoints"
    (checkpoints / f"step-{STEPS:08d}" / "complete.json").unlink()
    assert two_ranks.run(pretrain_on_every_rank, [*first, "--resume"]) == [0, 0]
    for name, values in losses(run_dir).items():
        np.testing.assert_allclose(values, losses(one_process)[name], rtol=1e-5)


def killed_on_rank_0(argv: list[str]) -> int:
    sys.addaudithook(kill_before_the_rename)
    return pretrain.main(argv)


def test_two_processes_with_zero_1_are_killed_and_resumed(
    tiny: Path, two_ranks: RankPool, tmp_path: Path
) -> None:
    config = ("--deepspeed_config", "ds_configs/zero1_fp32.json")
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert two_ranks.run(pretrain_on_every_rank, arguments(tiny, unbroken, *config)) == [0, 0]
    argv = arguments(tiny, broken, *config)
    with pytest.raises(RuntimeError, match="rank 0 ended"):
        two_ranks.run(killed_on_rank_0, argv)
    assert two_ranks.run(pretrain_on_every_rank, [*argv, "--resume"]) == [0, 0]
    assert metrics(broken) == metrics(unbroken)
    weights = Path("export", "model.safetensors")
    assert (broken / weights).read_bytes() == (unbroken / weights).read_bytes()


def step_contents(recipe_path: Path, num_workers: int, num_steps: int) -> list[list[dict[str, Any]]]:
    """Of each step, this rank's samples with their pixels and masks, and the units of each stream."""
    recipe = tiny_recipe(recipe_path, f"training.num_workers={num_workers}")
    topology = Topology.from_environment()
    stage = recipe.stages[0]
    objectives = {stream.name: build_objective(stream, recipe.model) for stream in stage.streams}
    plan = plan_step({}, recipe, stage, topology.data, where="")
    feed = StepFeed(recipe, stage, plan, Tokenizer.load(recipe.data.tokenizer), objectives, topology, {})
    steps = []
    for _ in range(num_steps):
        data = feed.next(0, stop=False)
        assert data.flags.tolist() == [0, 0, 0]
        samples = next(batch.samples for stream, batch in data.passes if stream.source == "pairs")
        units = {name: float(value) * topology.world_size for name, value in data.units.items()}
        steps.append([{"sample": sample, "units": units} for sample in samples])
    feed.close()
    return steps


def test_a_global_batch_is_the_same_on_any_layout(tiny: Path, two_ranks: RankPool) -> None:
    expected = step_contents(tiny, 0, 8)
    for num_workers in (0, 1, 2):
        shares = two_ranks.run(step_contents, tiny, num_workers, 8)
        for step, whole in enumerate(expected):
            found = shares[0][step] + shares[1][step]
            assert [entry["sample"].key for entry in found] == [entry["sample"].key for entry in whole]
            for ours, theirs in zip(found, whole, strict=True):
                assert ours["units"] == theirs["units"]
                assert ours["sample"].seed == theirs["sample"].seed
                np.testing.assert_array_equal(ours["sample"].image_CHW, theirs["sample"].image_CHW)
                np.testing.assert_array_equal(ours["sample"].tokens_N, theirs["sample"].tokens_N)
                for stream, masks in theirs["sample"].masks.items():
                    for name, mask in masks.items():
                        np.testing.assert_array_equal(ours["sample"].masks[stream][name], mask)
