"""Whole runs on layouts: metrics, pictures, checkpoints, stages and export are those of one process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from eve import pretrain
from eve.data.tokenizer import Tokenizer
from eve.objectives import build_objective
from eve.parallel.topology import Topology
from eve.training.ds_config import plan_step
from eve.training.feed import StepFeed
from tests.rank_pool import RankPool
from tests.steps import build_engine, make_step, read_batches
from tests.test_layouts import losses, pretrain_on_every_rank
from tests.test_resume import arguments, metrics
from tests.tiny import tiny_recipe

# Two stages, the second with another part that learns; pictures, so that a rank cannot be left alone in them.
TWO_STAGES = (
    "stages=["
    "{name: first, steps: 4, lr: 2.0e-3, trainable: ['encoder.*', 'word_head.*'], streams: ["
    "{name: masked_image, source: pairs, objective: masked_image},"
    "{name: masked_text, source: pairs, objective: masked_text}]},"
    "{name: second, steps: 4, lr: 1.0e-3, streams: [{name: pair, source: pairs, objective: masked_pair}]}]",
    "model.heads=4",
    "model.decoder.heads=4",
    "optimizer.eps=1.0e-4",
    "training.images_every=2",
    "training.checkpoint_every=2",
    "training.keep_checkpoints=3",
)
LAYOUTS = {
    "tensor 2 x expert 4": ("zero1_fp32", ("parallel.tensor=2", "parallel.expert=4")),
    "tensor 4": ("zero0_fp32", ("parallel.tensor=4", "parallel.sequence=false")),
    "data 4, expert 2": ("zero2_fp32", ("parallel.expert=2", "training.micro_batch_size=2")),
}
WEIGHTS = Path("export", "model.safetensors")
FIRST_STAGE = Path("stages", "0_first", "model.safetensors")


@pytest.fixture(scope="module")
def one_process(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("one") / "run"
    assert pretrain.main(arguments(tiny, run_dir, *TWO_STAGES)) == 0
    return run_dir


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_is_that_of_one_process_and_resumes(
    name: str, tiny: Path, one_process: Path, four_ranks: RankPool, tmp_path: Path
) -> None:
    config, layout = LAYOUTS[name]
    run_dir = tmp_path / "run"
    argv = arguments(tiny, run_dir, "--deepspeed_config", f"ds_configs/{config}.json", *TWO_STAGES, *layout)
    assert four_ranks.run(pretrain_on_every_rank, argv) == [0] * 4
    expected = losses(one_process)
    for key, values in losses(run_dir).items():
        np.testing.assert_allclose(values, expected[key], rtol=1e-5, err_msg=key)
    for export in (WEIGHTS, FIRST_STAGE):
        weights, plain = load_file(run_dir / export), load_file(one_process / export)
        assert weights.keys() == plain.keys()
        for key, weight in plain.items():
            limit = 1e-5 * float(weight.abs().max())
            np.testing.assert_allclose(weights[key], weight, atol=limit, err_msg=key)
    pictures = {path.relative_to(one_process): path for path in (one_process / "samples").rglob("*.png")}
    assert pictures.keys() == {path.relative_to(run_dir) for path in (run_dir / "samples").rglob("*.png")}
    for picture, path in pictures.items():
        pixels = [np.asarray(Image.open(place)).astype(int) for place in (path, run_dir / picture)]
        # Of rank 0's samples: of four shares there are fewer than a picture shows.
        if name != "data 4, expert 2":
            assert np.abs(pixels[0] - pixels[1]).max() <= 1

    unbroken, bits = metrics(run_dir), (run_dir / WEIGHTS).read_bytes()
    # The end of the first stage is what is left.
    assert len(list((run_dir / "checkpoints").glob("step-*/complete.json"))) == 3
    for step in (8, 6):
        (run_dir / "checkpoints" / f"step-{step:08d}" / "complete.json").unlink()
    assert four_ranks.run(pretrain_on_every_rank, [*argv, "--resume"]) == [0] * 4
    assert metrics(run_dir) == unbroken
    assert (run_dir / WEIGHTS).read_bytes() == bits


def poisoned(
    recipe_path: Path, layout: tuple[str, ...], config: str, poisoned_rank: int
) -> tuple[bool, bool, bool]:
    """A step with a gradient not finite on one rank: (was made, changed a weight, the next was made)."""
    recipe = tiny_recipe(recipe_path, *layout)
    engine, plan, topology = build_engine(recipe, config)
    before = engine.held_weights()
    first, second = read_batches(recipe, 2)
    weights = dict(engine.module.named_parameters())
    factor = float("nan") if topology.rank == poisoned_rank else 1.0
    handle = weights["model.encoder.blocks.0.attention.qkv.weight"].register_hook(lambda grad: grad * factor)
    made, _ = make_step(recipe, engine, plan, topology, first, 1e-3)
    handle.remove()
    changed = any(not torch.equal(weight, before[name]) for name, weight in engine.held_weights().items())
    after, _ = make_step(recipe, engine, plan, topology, second, 1e-3)
    engine.close()
    return made, changed, after


@pytest.mark.parametrize(
    ("layout", "config"),
    [
        (("parallel.tensor=2", "parallel.expert=2"), "zero0_fp32.json"),
        (("parallel.tensor=2", "parallel.expert=4"), "zero1_fp32.json"),
        (("parallel.expert=4",), "zero2_fp32.json"),
    ],
)
def test_a_step_that_is_not_finite_on_one_rank_is_made_on_none(
    layout: tuple[str, ...], config: str, tiny: Path, four_ranks: RankPool
) -> None:
    assert four_ranks.run(poisoned, tiny, layout, config, 2) == [(False, False, True)] * 4


def read_with_a_fault(recipe_path: Path, faulty_rank: int) -> list[float]:
    """Flags of a step for which one rank reads other samples than the rank it shares layers with."""
    recipe = tiny_recipe(recipe_path, "parallel.tensor=2")
    topology = Topology.from_environment().arranged(recipe.parallel, recipe.model).connected()
    stage = recipe.stages[0]
    objectives = {stream.name: build_objective(stream, recipe.model) for stream in stage.streams}
    plan = plan_step({}, recipe, stage, topology.data, where="")
    feed = StepFeed(recipe, stage, plan, Tokenizer.load(recipe.data.tokenizer), objectives, topology, {})
    if topology.rank == faulty_rank:
        next(feed._sources["pairs"])
    flags = feed.next(0, stop=False).flags.tolist()
    feed.close()
    return flags


def test_ranks_of_a_group_that_read_apart_are_noticed(tiny: Path, four_ranks: RankPool) -> None:
    assert four_ranks.run(read_with_a_fault, tiny, -1) == [[0, 0, 0]] * 4
    assert four_ranks.run(read_with_a_fault, tiny, 3) == [[0, 0, 1]] * 4
