"""The tiny recipes of VL-MoE and MoMo on a smaller model: killed and resumed, and on two processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from eve import pretrain
from eve.config import load_recipe
from tests.rank_pool import RankPool
from tests.test_resume import kill, metrics, run_in_child

SMALL = (
    "model.image_size=32",
    "model.patch_size=8",
    "model.width=32",
    "model.heads=2",
    "model.hidden=64",
    "model.vocab_size=40",
    "model.max_text_length=16",
    "model.text_positions=16",
    "model.drop_path=0.1",
    "data.num_readers=4",
    "data.shuffle_buffer=64",
    "training.num_workers=0",
    "training.log_every=2",
    "training.images_every=1000",
    "training.checkpoint_every=3",
    "training.keep_checkpoints=5",
    "optimizer.eps=1.0e-4",
)
ROTATE = tuple(f"stages.{number}.gradients=rotate" for number in (1, 2))
SYSTEMS = {"vl_moe_tiny": (), "momo_tiny": ("model.contrast.width=16",)}
KILLED_AT = 6


def arguments(name: str, tiny: Path, run_dir: Path, *more: str) -> list[str]:
    recipe = load_recipe(name)
    data = [f"data.tokenizer={tiny.parent}/tokenizer.model"]
    for source in recipe.data.sources:
        data += [f"data.sources.{source}.mix.0.shards={tiny.parent}/train/*.tar"]
        data += [f"data.sources.{source}.batch_size=16"]
    steps = [f"stages.{i}.steps=4" for i in range(len(recipe.stages))]
    if len(recipe.stages) == 1:
        steps = ["stages.0.steps=8"]
    warm = [f"stages.{i}.warmup_steps=1" for i in range(len(recipe.stages))]
    if name == "momo_tiny":
        data += ["stages.2.streams.3.identity=colour"]
    argv = ["--recipe", name, "--run_dir", str(run_dir), *SMALL, *SYSTEMS[name], *data, *steps, *warm]
    return [*argv, "evaluation.shards={}", *more]


def kill_at(event: str, args: tuple) -> None:
    if event == "os.rename" and f"writing-{KILLED_AT:08d}" in str(args[0]):
        kill()


@pytest.mark.parametrize(("name", "more"), [("vl_moe_tiny", ()), ("momo_tiny", ()), ("momo_tiny", ROTATE)])
def test_resumes_bit_for_bit(name: str, more: tuple[str, ...], tiny: Path, tmp_path: Path) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert pretrain.main(arguments(name, tiny, unbroken, *more)) == 0
    argv = arguments(name, tiny, broken, *more)
    assert run_in_child(kill_at, argv) == -9
    assert pretrain.main([*argv, "--resume"]) == 0
    assert metrics(broken) == metrics(unbroken)
    weights = Path("export", "model.safetensors")
    assert (broken / weights).read_bytes() == (unbroken / weights).read_bytes()


def test_steps_take_the_sources_in_turn(tiny: Path, tmp_path: Path) -> None:
    more = (*ROTATE, "training.log_every=1")
    assert pretrain.main(arguments("momo_tiny", tiny, tmp_path / "run", *more)) == 0
    logged = [line for line in metrics(tmp_path / "run") if "lr" in line]
    streams = [sorted(name.split("/")[-1] for name in line if name.startswith("loss/")) for line in logged]
    assert streams[:4] == [["images"]] * 4
    assert streams[4:8] == [["images"], ["texts"]] * 2
    # Contrast and matching report their losses under other names.
    assert streams[8:] == [["texts"], ["masked_image", "masked_text"]] * 2


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("vl_moe_tiny", ("parallel.expert=2",)),
        ("vl_moe_tiny", ("parallel.tensor=2",)),
        ("momo_tiny", ()),
    ],
)
def test_two_processes_have_the_losses_of_one(
    name: str, more: tuple[str, ...], tiny: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    assert pretrain.main(arguments(name, tiny, tmp_path / "one")) == 0
    assert two_ranks.run(pretrain.main, arguments(name, tiny, tmp_path / "two", *more)) == [0, 0]
    alone, together = ([line for line in metrics(tmp_path / run) if "lr" in line] for run in ("one", "two"))
    assert len(alone) == len(together) >= 4
    for one, two in zip(alone, together, strict=True):
        losses = [key for key in one if "loss" in key or key == "grad_norm"]
        assert {key: one[key] for key in losses} == pytest.approx({key: two[key] for key in losses}, rel=1e-3)


def test_dropped_choices_and_cut_texts_are_told(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = "data.sources.texts.max_text_length=4"
    assert pretrain.main(arguments("vl_moe_tiny", tiny, tmp_path / "run", cut)) == 0
    said = capsys.readouterr().out
    assert said.count("100.0% of the latest texts of source texts are longer than 4 tokens and were cut") == 1
    assert "stage pretrain, 1 of 1: steps 1 to 8" in said
    logged = [line for line in metrics(tmp_path / "run") if "lr" in line]
    assert {line["cut_texts/texts"] for line in logged} == {1.0}
    assert all(line["cut_texts/pairs"] < 1 for line in logged)
    names = set().union(*metrics(tmp_path / "run"))
    for stream, kinds in {"images": ["image"], "texts": ["text"], "pairs": ["image", "text"]}.items():
        for kind in ("image", "text"):
            found = f"router/layer_01/dropped_{kind}/{stream}" in names
            assert found == (kind in kinds), (stream, kind)
    # Pairs take the dense expert of the top block.
    assert "router/layer_05/dropped_image/images" in names
    assert not [name for name in names if name.startswith("router/layer_05") and name.endswith("/pairs")]
