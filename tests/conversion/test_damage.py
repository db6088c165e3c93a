"""A source that is not whole is an error in one sentence, and leaves nothing behind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eve.conversion.layout import Layout
from eve.training.checkpoint import MARKER, seal
from tests.conversion.runs import options, write_trained
from tests.tiny import tiny_recipe
from tools.convert_checkpoint import main

RANK = "zero_pp_rank_1_mp_rank_01_optim_states.pt"
EXPERT = "layer_0_expert_2_mp_rank_01_model_states.pt"
MODEL = "mp_rank_01_model_states.pt"


@pytest.fixture
def step(tiny: Path, tmp_path: Path) -> Path:
    """A whole checkpoint of 4 processes; its vocabulary of 40 words is padded to 48."""
    write_trained(tiny_recipe(tiny, "model.vocab_size=40"), tmp_path / "open")
    run = str(tmp_path / "run")
    layout = Layout(4, tensor=2, expert=2, zero_stage=1)
    assert main([str(tmp_path / "open"), run, *options(layout), "--verify"]) == 0
    return tmp_path / "run" / "checkpoints" / "step-00000004"


def changed(path: Path, change: Callable[[Any], None]) -> None:
    """Rewrites a file of the engine, and the list of sizes with it."""
    tree = torch.load(path, weights_only=False)
    change(tree)
    torch.save(tree, path)
    sealed_again(path.parents[1])


def sealed_again(step: Path) -> None:
    (step / MARKER).unlink()
    seal(step)


def remove_a_rank(step: Path) -> None:
    (step / "engine" / RANK).unlink()


def forget_a_rank(step: Path) -> None:
    (step / "engine" / RANK).unlink()
    sealed_again(step)


def forget_an_expert(step: Path) -> None:
    (step / "engine" / EXPERT).unlink()
    sealed_again(step)


def cut_off(step: Path) -> None:
    path = step / "engine" / RANK
    path.write_bytes(path.read_bytes()[:-1000])


def cut_off_and_list(step: Path) -> None:
    cut_off(step)
    sealed_again(step)


def no_marker(step: Path) -> None:
    (step / MARKER).unlink()


def add_a_name(step: Path) -> None:
    changed(step / "engine" / MODEL, lambda tree: tree["module"].update({"model.extra": torch.zeros(2)}))


def drop_a_name(step: Path) -> None:
    changed(step / "engine" / MODEL, lambda tree: tree["module"].pop("model.decoder.mask_token"))


def drop_a_part_of_an_expert(step: Path) -> None:
    changed(step / "engine" / EXPERT, lambda tree: tree.pop(next(name for name in tree if "w1" in name)))


def shorten_a_group(step: Path) -> None:
    def change(tree: dict[str, Any]) -> None:
        groups = tree["optimizer_state_dict"]["single_partition_of_fp32_groups"]
        groups[0] = groups[0][:-2].clone()

    changed(step / "engine" / RANK, change)


def lose_a_moment(step: Path) -> None:
    def change(tree: dict[str, Any]) -> None:
        tree["optimizer_state_dict"]["base_optimizer_state"]["state"][3].pop("exp_avg_sq")

    changed(step / "engine" / RANK, change)


def reorder(step: Path) -> None:
    def change(tree: dict[str, Any]) -> None:
        shapes = tree["param_shapes"][0]
        shapes.move_to_end(next(iter(shapes)))

    changed(step / "engine" / MODEL, change)


def touch_the_padding(step: Path) -> None:
    """Of the word embedding: words 40 to 47 are the last 8 of the second tensor rank."""

    def change(tree: dict[str, Any]) -> None:
        moments = tree["optimizer_state_dict"]["base_optimizer_state"]["state"][1]["exp_avg"]
        # Its vector lies in equal halves on two ranks.
        moments[WORDS - len(moments)] = 1e-3

    changed(step / "engine" / RANK, change)


# Parameters without decay before the words, in the order of the modules: types, class token, positions of
# patches and its projection's bias, positions of words. Then 24 words of 32, of which 8 are padding.
WORDS = 2 * 32 + 32 + 17 * 32 + 32 + 16 * 32 + 24 * 32 - 1


def other_experts(step: Path) -> None:
    path = step / "recipe.yaml"
    path.write_text(path.read_text().replace("num_experts: 4", "num_experts: 8"))
    sealed_again(step)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (remove_a_rank, rf"engine/{RANK} is missing"),
        (forget_a_rank, rf"engine/{RANK} is missing"),
        (forget_an_expert, rf"engine/{EXPERT} is missing"),
        (cut_off, rf"engine/{RANK} has [\d,]+ bytes, complete.json says [\d,]+"),
        (cut_off_and_list, rf"engine/{RANK} cannot be read: "),
        (no_marker, r"step-00000004 is not a complete checkpoint: it has no readable complete.json"),
        (add_a_name, rf"engine/{MODEL} has the unknown name model.extra"),
        (drop_a_name, rf"engine/{MODEL} has no model.decoder.mask_token"),
        (drop_a_part_of_an_expert, rf"engine/{EXPERT} has no model.encoder.\S+.deepspeed_experts.2.w1_EDF"),
        (
            shorten_a_group,
            rf"{RANK}: \S+: single_partition_of_fp32_groups, 0 is \(\d+,\), expected .* \(\d+,\)",
        ),
        (lose_a_moment, rf"{RANK}: .*: 3 has no exp_avg_sq"),
        (reorder, rf"{MODEL} groups its parameters otherwise, as with round_robin_gradients"),
        (
            touch_the_padding,
            r"exp_avg of encoder.text_embedding.word.weight is not zero in the padding after 40",
        ),
        (other_experts, r"has 4 experts of encoder.blocks.1.feed_forward.experts, its recipe has 8"),
    ],
)
def test_damage_is_named(
    damage: Callable[[Path], None], sentence: str, step: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(step)
    capfd.readouterr()
    target = step.parents[2] / "target"
    before = sorted(target.parent.iterdir())
    assert main([str(step), str(target), "--training-state"]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert re.search(sentence, error), error
    assert sorted(target.parent.iterdir()) == before


def flip(directory: Path) -> None:
    path = directory / "exp_avg.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def lose_the_end(directory: Path) -> None:
    path = directory / "exp_avg.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    sealed_again(directory)


def lose_the_state(directory: Path) -> None:
    (directory / "state.json").unlink()
    sealed_again(directory)


def forget_a_step(directory: Path) -> None:
    path = directory / "state.json"
    state = json.loads(path.read_text())
    del state["steps"]["decoder.mask_token"]
    path.write_text(json.dumps(state))
    sealed_again(directory)


def unequal_steps(directory: Path) -> None:
    path = directory / "state.json"
    state = json.loads(path.read_text())
    state["steps"]["decoder.mask_token"] = 3
    path.write_text(json.dumps(state))
    sealed_again(directory)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (flip, r"exp_avg.safetensors: the checksum of word_head\S+ is not that of checksums.json"),
        (lose_the_end, r"exp_avg.safetensors cannot be read"),
        (lose_the_state, r"open has no training state; it was written without --training-state"),
        (forget_a_step, r"model.safetensors has the unknown name decoder.mask_token"),
        (unequal_steps, r"decoder.mask_token had 3 updates and \S+ 4, but ZeRO keeps one count for both"),
    ],
)
def test_damage_to_a_topology_free_directory(
    damage: Callable[[Path], None], sentence: str, step: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory, target = step.parents[2] / "again" / "open", step.parents[2] / "target"
    assert main([str(step), str(directory), "--training-state"]) == 0
    damage(directory)
    capfd.readouterr()
    assert main([str(directory), str(target), *options(Layout(2, zero_stage=2))]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert re.search(sentence, error), error
    assert not list(target.parent.glob("*target*"))
