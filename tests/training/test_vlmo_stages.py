"""VLMo's three stages as one run: what each leaves alone, resumed in any of them, and on two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eve import pretrain
from tests.rank_pool import RankPool
from tests.test_resume import arguments, kill, metrics, run_in_child
from tests.training.test_stages import engine_weights

SHARDS = "mix: [{shards: HERE/train/*.tar}], batch_size: 16"
SOURCES = (
    f"data.sources={{images: {{kind: image, {SHARDS}}}, pairs: {{{SHARDS}}},"
    f" texts: {{kind: text, {SHARDS}, max_text_length: 8}}}}"
)
MODEL = (
    "model.feed_forward=[{blocks: 0, router: modality}, {blocks: 1, router: fusion}]",
    "model.relative_positions=blocks",
    "model.absolute_positions=false",
    "model.contrast={width: 16, paths: [modality, fusion]}",
    "model.matching={}",
)
STAGES = (
    "stages=[{name: vision, steps: 4, lr: 1.0e-2,"
    " streams: [{name: masked_image, source: images, objective: masked_image}]},"
    " {name: text, steps: 4, lr: 1.0e-2,"
    " trainable: ['encoder.text_embedding.*', 'encoder.type_embedding', 'encoder.*.experts.text.*',"
    " 'encoder.blocks.*.norm2.*', 'encoder.relative_positions.*', 'encoder.norm.*', 'word_head.*'],"
    " streams: [{name: text, source: texts, objective: masked_text, text_ratio: 0.15, text_masking: word}]},"
    " {name: pairs, steps: 4, lr: 1.0e-2, schedule: linear,"
    " streams: [{name: pairs, source: pairs, objective: contrast_matching, identity: colour},"
    " {name: masked_text, source: pairs, objective: masked_text, weight: 0.25, text_masking: word}]}]"
)
KEEP = "training.keep_checkpoints=4"


def overrides(tiny: Path) -> tuple[str, ...]:
    return (*MODEL, SOURCES.replace("HERE", str(tiny.parent)), STAGES, KEEP, "optimizer.weight_decay=0.5")


@pytest.fixture(scope="module")
def unbroken(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("vlmo") / "run"
    assert pretrain.main(arguments(tiny, run_dir, *overrides(tiny))) == 0
    return run_dir


def test_the_text_stage_moves_nothing_that_sees_images(unbroken: Path) -> None:
    before, after = engine_weights(unbroken, 4), engine_weights(unbroken, 8)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    others = ("image_embedding", "decoder", "contrast", "matching")
    for part in ("attention", "norm1", "gamma", "experts.image", "experts.fusion", *others):
        assert any(part in name for name in before), part
        assert not [name for name in changed if part in name], part
    # Rows of images, texts and pairs are one parameter.
    norms = [name for name in before if name.startswith("encoder.blocks") and "norm2" in name]
    assert len(norms) == 4
    for name in norms:
        moved = [not torch.equal(a, b) for a, b in zip(before[name], after[name], strict=True)]
        assert moved == [False, True, False][: len(moved)], name
    assert {name for name in before if "experts.text" in name} <= changed
    for part in ("word_head.dense.weight", "text_embedding.word.weight", "relative_positions.table_TRH"):
        assert [name for name in changed if part in name], part


def test_the_pair_stage_moves_everything(unbroken: Path) -> None:
    before, after = engine_weights(unbroken, 8), load_file(unbroken / "export" / "model.safetensors")
    still = [
        name for name in before if torch.equal(before[name], after[name]) and not name.startswith("decoder")
    ]
    assert still == []


def test_each_part_of_the_loss_is_logged(unbroken: Path) -> None:
    line = metrics(unbroken)[-1]
    for name in ("contrast_loss", "contrast_accuracy", "contrast_temperature", "contrast_pool"):
        assert f"{name}/pairs" in line
    for name in ("matching_loss", "matching_accuracy", "matching_left_out"):
        assert f"{name}/pairs" in line
    assert line["contrast_pool/pairs"] == 16
    assert "loss/masked_text" in line


@pytest.mark.parametrize("step", [4, 8, 12])
def test_resumes_in_each_stage_bit_for_bit(step: int, tiny: Path, unbroken: Path, tmp_path: Path) -> None:
    argv = arguments(tiny, tmp_path / "run", *overrides(tiny))
    hook = {4: kill_at_4, 8: kill_at_8, 12: kill_at_12}[step]
    assert run_in_child(hook, argv) == -9
    assert pretrain.main([*argv, "--resume"]) == 0
    assert metrics(tmp_path / "run") == metrics(unbroken)
    weights = Path("export", "model.safetensors")
    assert (tmp_path / "run" / weights).read_bytes() == (unbroken / weights).read_bytes()


def kill_at_4(event: str, args: tuple) -> None:
    if event == "os.rename" and "writing-00000004" in str(args[0]):
        kill()


def kill_at_8(event: str, args: tuple) -> None:
    if event == "os.rename" and "writing-00000008" in str(args[0]):
        kill()


def kill_at_12(event: str, args: tuple) -> None:
    if event == "os.rename" and "writing-00000012" in str(args[0]):
        kill()


def test_two_processes_have_the_losses_of_one(
    tiny: Path, unbroken: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    argv = arguments(tiny, tmp_path / "run", *overrides(tiny), "training.export_stages=false")
    assert two_ranks.run(pretrain.main, argv) == [0, 0]
    assert not (tmp_path / "run" / "stages").exists()
    alone, together = (
        [line for line in metrics(path) if "lr" in line] for path in (unbroken, tmp_path / "run")
    )
    assert len(alone) == len(together) == 6
    for one, two in zip(alone, together, strict=True):
        # All cosines are nearly the same after so few steps: which is largest may be rounding.
        losses = [name for name in one if "loss" in name or name in ("grad_norm", "contrast_pool/pairs")]
        assert {name: one[name] for name in losses} == pytest.approx(
            {name: two[name] for name in losses}, rel=1e-3
        )
