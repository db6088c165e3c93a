"""Whole runs on layouts: metrics, pictures, checkpoints, stages and export are those of one process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from eve import pretrain
from tests.rank_pool import RankPool
from tests.test_layouts import losses, pretrain_on_every_rank
from tests.test_resume import arguments, metrics

# Two stages, the second with another part that learns; pictures, so that a rank cannot be left alone in them.
TWO_STAGES = (
    "stages=["
    "{name: first, steps: 6, lr: 2.0e-3, trainable: ['encoder.*', 'word_head.*'], streams: ["
    "{name: masked_image, source: pairs, objective: masked_image},"
    "{name: masked_text, source: pairs, objective: masked_text}]},"
    "{name: second, steps: 6, lr: 1.0e-3, streams: [{name: pair, source: pairs, objective: masked_pair}]}]",
    "model.heads=4",
    "model.decoder.heads=4",
    "optimizer.eps=1.0e-4",
    "training.images_every=3",
    "training.checkpoint_every=3",
)
LAYOUTS = {
    "tensor 2 x expert 4": ("zero1_fp32", ("parallel.tensor=2", "parallel.expert=4")),
    "tensor 4": ("zero0_fp32", ("parallel.tensor=4", "parallel.sequence=false")),
    "data 4, expert 2": ("zero2_fp32", ("parallel.expert=2", "training.micro_batch_size=2")),
}
WEIGHTS = Path("export", "model.safetensors")


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
    weights, plain = load_file(run_dir / WEIGHTS), load_file(one_process / WEIGHTS)
    assert weights.keys() == plain.keys()
    for key, weight in plain.items():
        np.testing.assert_allclose(weights[key], weight, atol=1e-5 * float(weight.abs().max()), err_msg=key)
    assert sorted(p.name for p in (run_dir / "samples").rglob("*")) == sorted(
        p.name for p in (one_process / "samples").rglob("*")
    )

    unbroken, bits = metrics(run_dir), (run_dir / WEIGHTS).read_bytes()
    for step in (12, 9):
        (run_dir / "checkpoints" / f"step-{step:08d}" / "complete.json").unlink()
    assert four_ranks.run(pretrain_on_every_rank, [*argv, "--resume"]) == [0] * 4
    assert metrics(run_dir) == unbroken
    assert (run_dir / WEIGHTS).read_bytes() == bits
