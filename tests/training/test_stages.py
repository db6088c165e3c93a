"""Stages of a run: what learns in each, where its weights come from; and what must not change a result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eve import pretrain
from eve.config import load_recipe
from eve.errors import UserError
from eve.training.ds_config import DS_CONFIGS, read_ds_config
from eve.training.export import load_exported, stage_exports
from eve.training.stages import check_stage, stage_at
from tests.test_resume import arguments, kill, metrics, run_in_child
from tests.tiny import tiny_recipe

TWO_STAGES = (
    "stages=[{name: images, steps: 6, lr: 1.0e-2, schedule: constant, trainable: ['encoder.*', 'decoder.*'],"
    " streams: [{name: masked_image, source: pairs, objective: masked_image}]},"
    " {name: words, steps: 6, lr: 1.0e-2, schedule: constant, trainable: ['word_head.*', '*.blocks.1.*'],"
    " streams: [{name: masked_text, source: pairs, objective: masked_text}]}]"
)


@pytest.fixture(scope="module")
def two_stages(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("stages") / "run"
    assert pretrain.main(arguments(tiny, run_dir, TWO_STAGES, "training.keep_checkpoints=4")) == 0
    return run_dir


def test_a_step_belongs_to_one_stage(tiny: Path) -> None:
    recipe = load_recipe(str(tiny), [TWO_STAGES])
    assert [stage_at(recipe, step) for step in (0, 5, 6, 7, 12)] == [(0, 0), (0, 5), (0, 6), (1, 1), (1, 6)]


def engine_weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    path = run_dir / "checkpoints" / f"step-{step:08d}" / "engine" / "mp_rank_00_model_states.pt"
    module = torch.load(path, weights_only=False)["module"]
    return {name.removeprefix("model."): tensor for name, tensor in module.items()}


def test_each_stage_changes_what_it_trains(two_stages: Path) -> None:
    """The second goes on from the weights of the first: what it does not train is as the first left it."""
    first, last = engine_weights(two_stages, 6), load_file(two_stages / "export" / "model.safetensors")
    changed = {name for name in first if not torch.equal(first[name], last[name])}
    assert all(name.startswith("word_head.") or ".blocks.1." in name for name in changed)
    assert any(name.startswith("word_head.") for name in changed)
    assert any(".blocks.1." in name for name in changed)


def test_losses_are_named_by_the_streams_of_their_stage(two_stages: Path) -> None:
    lines = [line for line in metrics(two_stages) if "lr" in line]
    assert ["loss/masked_image" in line for line in lines] == [True] * 3 + [False] * 3
    assert ["loss/masked_text" in line for line in lines] == [False] * 3 + [True] * 3


def kill_in_the_second_stage(event: str, args: tuple) -> None:
    if event == "os.rename" and "writing-00000008" in str(args[0]):
        kill()


def kill_before_the_export_of_the_first_stage(event: str, args: tuple) -> None:
    """Its last checkpoint is complete, and so is what the export has written under another name."""
    if event == "os.rename" and ".0_images.writing" in str(args[0]):
        kill()


@pytest.mark.parametrize("hook", [kill_in_the_second_stage, kill_before_the_export_of_the_first_stage])
def test_resumes_across_stages(hook, tiny: Path, two_stages: Path, tmp_path: Path) -> None:
    argv = arguments(tiny, tmp_path / "run", TWO_STAGES)
    assert run_in_child(hook, argv) == -9
    made = hook is kill_in_the_second_stage
    assert (tmp_path / "run" / "stages" / "0_images").is_dir() == made
    assert pretrain.main([*argv, "--resume"]) == 0
    assert metrics(tmp_path / "run") == metrics(two_stages)
    for export in ("stages/0_images", "stages/1_words", "export"):
        for name in ("model.safetensors", "metadata.json"):
            found = (tmp_path / "run" / export / name).read_bytes()
            assert found == (two_stages / export / name).read_bytes(), (export, name)


def test_each_stage_leaves_an_export(tiny: Path, two_stages: Path) -> None:
    """The weights of the checkpoint of its last step. The last is the run's own, on the disk once."""
    stages = two_stages / "stages"
    assert sorted(path.name for path in stages.iterdir()) == ["0_images", "1_words"]
    exported, saved = load_file(stages / "0_images" / "model.safetensors"), engine_weights(two_stages, 6)
    assert exported.keys() == saved.keys()
    assert all(torch.equal(exported[name], saved[name]) for name in saved)
    about = json.loads((stages / "0_images" / "metadata.json").read_text())
    assert (about["stage"], about["stage_number"], about["step"]) == ("images", 0, 6)
    last, own = (path / "model.safetensors" for path in (stages / "1_words", two_stages / "export"))
    assert last.samefile(own)
    assert stage_exports(two_stages, tiny_recipe(tiny)) == []


def test_a_stage_starts_from_exported_weights(tiny: Path, two_stages: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    start = ("stages.0.steps=1", "stages.0.warmup_steps=0", "stages.0.lr=1.0e-30", "optimizer.weight_decay=0")
    init = f"stages.0.init_from={two_stages}/export"
    assert pretrain.main(arguments(tiny, run_dir, init, *start)) == 0
    before = load_file(two_stages / "export" / "model.safetensors")
    after = load_file(run_dir / "export" / "model.safetensors")
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-20, msg=name)


def test_an_export_needs_nothing_else(two_stages: Path, tmp_path: Path) -> None:
    export = (two_stages / "export").rename(tmp_path / "export")
    model, recipe, tokenizer = load_exported(export)
    export.rename(two_stages / "export")
    assert recipe.stages[1].name == "words"
    assert tokenizer.vocab_size == recipe.model.vocab_size
    weights = load_file(two_stages / "export" / "model.safetensors")
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    about = json.loads((two_stages / "export" / "metadata.json").read_text())
    assert about["step"] == 12
    assert about["parameters"] == sum(p.numel() for p in model.parameters())


def test_activation_checkpointing_changes_no_bit(tiny: Path, tmp_path: Path) -> None:
    for name, flag in (("kept", "false"), ("recomputed", "true")):
        override = f"training.activation_checkpointing={flag}"
        assert pretrain.main(arguments(tiny, tmp_path / name, override)) == 0
    assert metrics(tmp_path / "recomputed") == metrics(tmp_path / "kept")


def test_micro_batches_change_rounding_only(tiny: Path, tmp_path: Path) -> None:
    """But for the load-balance loss, which is not a sum over tokens."""
    lines = {}
    for size in (16, 4):
        run_dir = tmp_path / str(size)
        override = (f"training.micro_batch_size={size}", "model.feed_forward.1.load_balance_weight=0.0")
        assert pretrain.main(arguments(tiny, run_dir, *override)) == 0
        lines[size] = [line for line in metrics(run_dir) if "lr" in line]
    for whole, cut in zip(lines[16], lines[4], strict=True):
        assert cut == pytest.approx(whole, rel=1e-4)


def test_spread_experts_have_to_learn(tiny: Path) -> None:
    frozen = "stages.0.trainable=['decoder.*']"
    check(tiny, "zero1_fp32", frozen)
    check(tiny, "zero0_fp32", frozen, "parallel.expert=2")
    with pytest.raises(UserError, match="stage pretrain trains no expert of a learned router"):
        check(tiny, "zero1_fp32", frozen, "parallel.expert=2")
    check(tiny, "zero1_fp32", EXPERTS, "parallel.expert=2")


def check(tiny: Path, config: str, *overrides: str) -> None:
    recipe = tiny_recipe(tiny, *overrides)
    where = f"{config}.json"
    check_stage(recipe, recipe.stages[0], read_ds_config(DS_CONFIGS / where), where)


EXPERTS = "stages.0.trainable=['encoder.blocks.1.feed_forward.experts.*']"
WHOLE = "stages.0.trainable=['encoder.norm.*', 'word_head.dense.*']"


@pytest.mark.parametrize(("trainable", "layout"), [(EXPERTS, "expert=2"), (WHOLE, "tensor=2")])
def test_every_rank_counts_something_in_the_norm_of_bf16(trainable: str, layout: str, tiny: Path) -> None:
    check(tiny, "zero2_bf16", trainable, f"parallel.{layout}")
    check(tiny, "zero1_bf16", trainable)
    with pytest.raises(UserError, match=r"trains too little for zero1_bf16\.json .* use zero2_bf16\.json"):
        check(tiny, "zero1_bf16", trainable, f"parallel.{layout}")
