"""With its optimizer's states on the host a run gives the numbers that it gives without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eve import pretrain
from eve.data.batch import collate
from tests.rank_pool import RankPool
from tests.steps import (
    BATCH,
    DENSE,
    OVERRIDES,
    STEPS,
    Steps,
    build_engine,
    engine_steps,
    plain_steps,
    read_batches,
    run_engine,
)
from tests.test_resume import arguments, metrics
from tests.tiny import tiny_recipe
from tests.training.test_engine import FROZEN_DECODER, weights_around_a_checkpoint

RESUMED, LEARNING_RATE = 4, 2e-3
# Passes of two streams: the pixel decoder is not in the last one, the word head not in the first.
CUT = (*OVERRIDES, "training.micro_batch_size=4")
CUT_DENSE = (*DENSE, "training.micro_batch_size=4")


def is_offloaded(recipe_path: Path, overrides: tuple[str, ...], config: str) -> bool:
    """Whether DeepSpeed says so."""
    engine, _, _ = build_engine(tiny_recipe(recipe_path, *overrides), config)
    found = engine._engine.zero_cpu_offload()
    engine.close()
    return found


@pytest.mark.parametrize("stage", [1, 2])
def test_offloading_changes_nothing(stage: int, tiny: Path, two_ranks: RankPool) -> None:
    names = [f"zero{stage}_fp32.json", f"zero{stage}_fp32_offload.json"]
    assert [is_offloaded(tiny, CUT, name) for name in names] == [False, True]
    stayed, offloaded = (engine_steps(tiny, CUT, name, STEPS, LEARNING_RATE) for name in names)
    assert max(offloaded.difference(stayed)) < 1e-6
    stayed, offloaded = (
        two_ranks.run(engine_steps, tiny, CUT, name, STEPS, LEARNING_RATE)[0] for name in names
    )
    assert max(offloaded.difference(stayed)) < 1e-6
    plain = plain_steps(tiny_recipe(tiny, *OVERRIDES), STEPS, LEARNING_RATE)
    assert max(offloaded.difference(plain)) < 1e-5


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("degree", ["parallel.tensor=2", "parallel.expert=2"])
def test_offloading_goes_with_model_parallelism(
    degree: str, stage: int, tiny: Path, two_ranks: RankPool
) -> None:
    config = f"zero{stage}_fp32_offload.json"
    found = two_ranks.run(engine_steps, tiny, (*CUT, degree), config, RESUMED, LEARNING_RATE)[0]
    plain = plain_steps(tiny_recipe(tiny, *OVERRIDES), RESUMED, LEARNING_RATE)
    assert max(found.difference(plain)) < 1e-5


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_offloading_stays_near_bf16(stage: int, tiny: Path) -> None:
    """The norms of a few steps: later a weight beside the middle of two bf16 numbers is rounded otherwise."""
    overrides = CUT_DENSE if stage == 3 else CUT
    stayed, offloaded = (
        engine_steps(tiny, overrides, f"zero{stage}_bf16{end}.json", 4, LEARNING_RATE)
        for end in ("", "_offload")
    )
    assert offloaded.norms == pytest.approx(stayed.norms, rel=1e-4)
    assert max(offloaded.difference(stayed)) < 1e-3


def resumed_steps(
    recipe_path: Path, overrides: tuple[str, ...], config: str, next_config: str, directory: Path
) -> Steps:
    """Steps given up after half of them, whose checkpoint another engine goes on from."""
    recipe = tiny_recipe(recipe_path, *overrides)
    batches = read_batches(recipe, RESUMED)
    engine, plan, topology = build_engine(recipe, config)
    first = run_engine(recipe, engine, plan, topology, batches[: RESUMED // 2], LEARNING_RATE)
    if topology.rank == 0:
        (directory / "tag").mkdir(parents=True)
    engine.save(directory, "tag")
    engine.close()
    engine, plan, topology = build_engine(recipe, next_config)
    engine.load(directory, "tag")
    last = run_engine(recipe, engine, plan, topology, batches[RESUMED // 2 :], LEARNING_RATE)
    engine.close()
    return Steps(first.losses + last.losses, first.norms + last.norms, last.weights)


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        ("zero1_fp32_offload.json", CUT),
        ("zero1_bf16_offload.json", CUT),
        ("zero2_bf16_offload.json", CUT),
        ("zero3_bf16_offload.json", CUT_DENSE),
    ],
)
def test_going_on_from_a_checkpoint_keeps_every_bit(
    config: str, overrides: tuple[str, ...], tiny: Path, two_ranks: RankPool, tmp_path: Path
) -> None:
    unbroken = two_ranks.run(engine_steps, tiny, overrides, config, RESUMED, LEARNING_RATE)[0]
    resumed = two_ranks.run(resumed_steps, tiny, overrides, config, config, tmp_path / "checkpoint")[0]
    assert resumed.difference(unbroken) == (0.0, 0.0, 0.0)


def test_a_checkpoint_goes_onto_the_host_and_back(tiny: Path, two_ranks: RankPool, tmp_path: Path) -> None:
    names = ["zero1_fp32.json", "zero1_fp32_offload.json"]
    unbroken = two_ranks.run(engine_steps, tiny, CUT, names[0], RESUMED, LEARNING_RATE)[0]
    for order in (names, names[::-1]):
        directory = tmp_path / order[0]
        resumed = two_ranks.run(resumed_steps, tiny, CUT, *order, directory)[0]
        # The two sum the squares of the norm, by which both clip, in another order.
        assert max(resumed.difference(unbroken)) < 5e-6


@pytest.mark.parametrize("config", ["zero1_bf16_offload.json", "zero2_bf16_offload.json"])
def test_fp32_weights_start_and_load_exactly(
    config: str, tiny: Path, two_ranks: RankPool, tmp_path: Path
) -> None:
    more = (*OVERRIDES, FROZEN_DECODER)
    answers = two_ranks.run(weights_around_a_checkpoint, tiny, more, config, tmp_path / "checkpoint")
    for before, after, loaded in answers:
        for name, weight in before.items():
            assert torch.equal(after[name], weight), name
            assert torch.equal(loaded[name], weight), name


def steps_with_a_bad_one(recipe_path: Path, config: str) -> tuple[list[bool], list[float]]:
    """(which of four steps were made, gradient norms); a loss of the second is not finite on one rank."""
    recipe = tiny_recipe(recipe_path, *CUT)
    engine, plan, topology = build_engine(recipe, config)
    made, norms = [], []
    for number, samples in enumerate(read_batches(recipe, 4)):
        size = BATCH // topology.data
        share = samples[topology.data_rank * size :][:size]
        cut = [collate(share[i : i + 4]) for i in range(0, size, 4)]
        passes = [(stream, batch) for batch in cut for stream in recipe.stages[0].streams]
        for place, (stream, batch) in enumerate(passes):
            units = engine.module.objectives[stream.name].units(collate(samples)) / topology.data
            loss, _ = engine.forward(stream.name, batch, units, 1 / plan.micro_batches(stream.source))
            bad = number == 1 and topology.rank == 1 and place == 1
            engine.backward(loss * (torch.nan if bad else stream.weight), last=place == len(passes) - 1)
        made.append(engine.step(LEARNING_RATE))
        norms.append(engine.gradient_norm)
    engine.close()
    return made, norms


@pytest.mark.parametrize("name", ["zero1_bf16", "zero2_fp32", "zero2_bf16"])
def test_a_skipped_step_leaves_nothing_behind(name: str, tiny: Path, two_ranks: RankPool) -> None:
    stayed, offloaded = (
        two_ranks.run(steps_with_a_bad_one, tiny, f"{name}{end}.json") for end in ("", "_offload")
    )
    for (made, norms), (_, expected) in zip(offloaded, stayed, strict=True):
        assert made == [True, False, True, True]
        good = [0, 2, 3]
        assert [norms[i] for i in good] == pytest.approx([expected[i] for i in good], rel=2e-3)


def pretrain_on_every_rank(argv: list[str]) -> int:
    return pretrain.main(argv)


def test_a_run_is_offloaded_and_resumed(tiny: Path, two_ranks: RankPool, tmp_path: Path) -> None:
    runs = {name: tmp_path / name for name in ("on_device", "unbroken", "broken")}
    for name, run_dir in runs.items():
        config = "zero2_fp32.json" if name == "on_device" else "zero2_fp32_offload.json"
        more = ("training.micro_batch_size=4", "--deepspeed_config", f"ds_configs/{config}")
        argv = arguments(tiny, run_dir, *more)
        assert two_ranks.run(pretrain_on_every_rank, argv) == [0, 0]
        if name == "broken":
            (run_dir / "checkpoints" / "step-00000012" / "complete.json").unlink()
            assert two_ranks.run(pretrain_on_every_rank, [*argv, "--resume"]) == [0, 0]
    assert metrics(runs["broken"]) == metrics(runs["unbroken"])
    weights = Path("export", "model.safetensors")
    assert (runs["broken"] / weights).read_bytes() == (runs["unbroken"] / weights).read_bytes()
    for ours, theirs in zip(metrics(runs["unbroken"]), metrics(runs["on_device"]), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_checkpoint_says_which_wrapper_of_deepspeed_wrote_it(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    short = ("stages.0.steps=2", "stages.0.warmup_steps=0", "--deepspeed_config")
    assert pretrain.main(arguments(tiny, run_dir, *short, "ds_configs/zero1_bf16.json")) == 0
    argv = arguments(tiny, run_dir, "--resume", *short, "ds_configs/zero1_bf16_offload.json")
    assert pretrain.main(argv) == 2
    said = capfd.readouterr().err
    assert "has optimizer states in the format of BF16_Optimizer, this run has ZeRO" in said
