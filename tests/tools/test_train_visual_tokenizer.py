"""train_visual_tokenizer: files, numbers, going on after an interruption, ranks, and its mistakes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from eve.visual_tokenizer import VisualTokenizer
from tests.rank_pool import RankPool
from tests.tiny import tiny_recipe
from tools.train_visual_tokenizer import main

SIZES = ("--image-size=32", "--patch-size=8", "--codes=24", "--code-width=8", "--batch-size=16")


def call(tiny: Path, output: Path, *more: str) -> int:
    shards = tiny_recipe(tiny).data.sources["pairs"].mix[0].shards
    fixed = ("--num-workers=0", "--warmup-steps=2", "--log-every=4", "--seed=3")
    return main(["--shards", shards, "--output", str(output), *SIZES, *fixed, *more])


def state(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "visual_tokenizer.safetensors")


def test_a_run_leaves_a_tokenizer_with_its_measurements(tiny: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "made"
    assert (
        call(
            tiny,
            output,
            "--steps=100",
            "--images-every=60",
            "--log-every=25",
            "--smallest-crop=1",
            "--commitment=0.05",
        )
        == 0
    )
    said = capsys.readouterr().out
    lines = re.findall(
        r"step +(\d+)/100 \| error ([\d.]+) \| codes used ([\d.]+)%, perplexity ([\d.]+)", said
    )
    assert [int(line[0]) for line in lines] == [25, 50, 75, 100]
    assert float(lines[-1][1]) < 0.9 * float(lines[0][1])
    found = json.loads((output / "measurements.json").read_text())
    assert found["pictures"] == 90
    assert found["error"] < 0.9 * found["trivial"]
    assert f"codes used {found['use']['used']} of 24" in said
    tokenizer = VisualTokenizer.load(output)
    assert tokenizer.encode(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 16)
    drawn = sorted(path.name for path in (output / "reconstructions").iterdir())
    assert drawn == ["step-000060.png", "step-000100.png"]
    assert Image.open(output / "reconstructions" / drawn[0]).width > 400
    assert list((output / "tensorboard").iterdir())
    assert not list(output.glob("training-*"))


def test_an_interrupted_run_goes_on_to_the_same_tokenizer(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert call(tiny, whole, "--steps=9") == 0
    seen = 0
    update = VisualTokenizer.forward

    def interrupted(*inputs):
        nonlocal seen
        seen += 1
        if seen == 7:
            raise KeyboardInterrupt
        return update(*inputs)

    with monkeypatch.context() as patched:
        patched.setattr(VisualTokenizer, "forward", interrupted)
        assert call(tiny, cut, "--steps=9", "--checkpoint-every=3") == 130
    assert [path.name for path in cut.glob("training-*")] == ["training-6.pt"]
    assert call(tiny, cut, "--steps=9", "--checkpoint-every=3", "--resume") == 0
    first, second = state(whole), state(cut)
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


def test_two_ranks_make_the_tokenizer_of_one(tiny: Path, tmp_path: Path, two_ranks: RankPool) -> None:
    assert call(tiny, tmp_path / "one", "--steps=6") == 0
    assert two_ranks.run(call, tiny, tmp_path / "two", "--steps=6") == [0, 0]
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-4, rtol=1e-3, msg=name)


def test_mistakes_are_one_sentence_with_exit_code_2(tiny: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "visual_tokenizer.safetensors").write_bytes(b"")
    (tmp_path / "file").write_text("")
    for more, sentence in (
        (("--output", str(tmp_path / "old")), r"holds a visual tokenizer; give --overwrite"),
        (("--patch-size=5",), r"image_size 32 is not a multiple of patch_size 5"),
        (("--batch-size=20",), r"--batch-size 20 is not a multiple of 8"),
        (("--shards", str(tmp_path / "none")), r"none"),
        (("--held-out", str(tmp_path / "none")), r"none"),
        (("--teacher", str(tmp_path / "none")), r"is not an exported model"),
        (("--output", str(tmp_path / "file" / "below")), r"cannot write to .*below"),
    ):
        assert call(tiny, tmp_path / "new", "--steps=2", *more) == 2, more
        told = capsys.readouterr().err
        assert re.search(sentence, told), told
        assert told.count("\n") == 1
        assert not (tmp_path / "new").exists()
    with pytest.raises(SystemExit):
        call(tiny, tmp_path / "new", "--steps=0")
