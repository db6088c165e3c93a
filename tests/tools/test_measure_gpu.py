"""tools/measure_gpu.py: real parts at tiny size on a CPU, parts that fail or take too long, the targets."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.measure_gpu import SHARES, Part, main, read, run_part, summary, targets


def test_without_a_gpu_it_says_so_and_does_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: this machine has no GPU")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_step_on_a_cpu(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    words = ["--device", "cpu", "--parts", "step", "--rounds", "1", "--batch", "8", "--recipe", str(tiny)]
    assert main([*words, "--out", str(tmp_path)]) == 0
    step = json.loads((tmp_path / "step.json").read_text())
    assert step["batch"] == 8
    assert step["samples"].startswith("generated pictures")
    assert set(step["steps"]) == {"plain loop", "plain loop, no routed experts", "engine"}
    for speed in step["steps"].values():
        assert speed["seconds"] > 0
        assert speed["mfu"] is None  # nobody knows the peak of a CPU
    # Two experts of a token instead of one, in one block of two: more operations.
    assert step["steps"]["plain loop"]["flops"] > step["steps"]["plain loop, no routed experts"]["flops"]
    assert set(step["groups"]) == {"plain loop", "engine"}
    for groups in step["groups"].values():
        assert groups["grouped products"] > 0
        assert groups["routing"] > 0
        assert groups["optimizer"] > 0
    ratio = step["layer"]["routed"][0] / step["layer"]["dense"][0]
    assert step["layer_ratio"] == pytest.approx(ratio)
    text = (tmp_path / "summary.md").read_text()
    assert f"| {ratio:.3f}x | not judged on a CPU |" in text
    assert "## A step of tiny" in text
    about = json.loads((tmp_path / "environment.json").read_text())
    assert about["packages"]["torch"] == torch.__version__
    assert about["command"].endswith(f"--out {tmp_path}")


def test_a_part_that_fails_leaves_the_others(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--parts", "step", "kernels", "--operations", "masked_pixel_loss", "--eager"]
    words += ["--rounds", "1", "--recipe", "eve_bas", "--batch", "1", "--out", str(tmp_path)]
    (tmp_path / "step.md").write_text("of a run before")
    assert main(words) == 1
    ended = json.loads((tmp_path / "summary.json").read_text())["parts"]
    assert ended["step"]["reason"] == "exit code 2"
    assert "did you mean eve_base?" in ended["step"]["last_line"]
    assert ended["kernels"]["reason"] is None
    assert (
        ended["kernels"]["last_line"] == "shapes: 1, measurements: 3, of peers that compute something else: 0"
    )
    text = (tmp_path / "summary.md").read_text()
    assert "### masked_pixel_loss" in text
    assert "of a run before" not in text
    assert {path.name for path in tmp_path.iterdir()} == {
        "environment.json", "kernels.json", "kernels.log", "kernels.md", "kernels.png", "step.log",
        "summary.json", "summary.md",
    }  # fmt: skip


def test_a_part_past_its_time_is_stopped_with_its_children(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print('begun', child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    start = time.monotonic()
    part = run_part([sys.executable, "-c", script], tmp_path / "log", 2.0)
    assert time.monotonic() - start < 20
    assert part.reason == "stopped after 2 s"
    word, child = part.last_line.split()
    assert word == "begun"
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child lives on")
    assert run_part([sys.executable, "-c", "print('one\\ntwo')"], tmp_path / "log", 20).last_line == "two"


def kernels_of(times: dict[str, float]) -> dict[str, Any]:
    """What the benchmark writes, of one dispatch, one combine and two sizes of the text loss."""

    def row(
        operation: str, peer: str, tokens: int, both: float, memory: int, **share: float
    ) -> dict[str, Any]:
        return {
            "case": {"operation": operation, "tokens": tokens, "width": 768},
            "peer": peer,
            "reason": None,
            "median": {"both": both},
            "peak_bytes": memory,
            "share": {"measured": share},
        }

    rows = [
        row("dispatch", "ours", 32768, 1.0, 1, forward=0.90, backward=0.84),
        row("dispatch", "ours", 1024, 1.0, 1, forward=0.10, backward=0.10),
        {**row("combine", "ours", 32768, 1.0, 1), "reason": "out of memory"},
    ]
    for tokens in (2560, 512):
        rows.append(row("masked_text_loss", "ours", tokens, times["ours"], 50))
        rows.append(row("masked_text_loss", "torch cross_entropy", tokens, times["torch"], 100))
    return {"rows": rows}


def test_targets_are_judged_by_what_was_measured() -> None:
    step = {
        "layer_ratio": 1.07,
        "steps": {"engine": "not measured: deepspeed is not installed", "plain loop": {"mfu": 0.44}},
    }
    found = {
        t.what: t for t in targets(kernels_of({"ours": 1.0, "torch": 1.0}), step, Part(1, None, "9 passed"))
    }
    met = {what.split(",")[0] if "text" not in what else what: target.met for what, target in found.items()}
    assert met == {
        "tests of the GPU": True,
        "dispatch forward": True,
        "dispatch backward": False,
        "combine forward": None,
        "combine backward": None,
        "masked text loss, 2560 rows: time over torch cross_entropy": False,
        "masked text loss, 2560 rows: memory over torch cross_entropy": True,
        "masked text loss, 512 rows: time over torch cross_entropy": True,
        "soft-MoE layer over a dense one of equal active operations": True,
        "model FLOP utilisation of the step": False,
    }
    assert found["masked text loss, 2560 rows: memory over torch cross_entropy"].measured == "0.50x"
    engine = {**step, "layer_ratio": 1.09, "steps": {**step["steps"], "engine": {"mfu": 0.46}}}
    *_, layer, share = targets(None, engine, Part(1, "exit code 1", "1 failed"))
    assert (layer.met, share.met, share.measured) == (False, True, "46.0%")
    assert all(target.met is None for target in targets(None, None, None))


def test_the_summary_says_what_is_missing(tmp_path: Path) -> None:
    about = {
        "device": "NVIDIA H200", "date": "today", "commit": "abc", "command": "make gpu", "system": "Linux",
        "python": "3.12.1", "packages": {"torch": "2.11.0", "deepspeed": None}, "missing": ["pydantic"],
    }  # fmt: skip
    parts = {"step": Part(3.2, "exit code 1", "No module named 'pydantic'")}
    text = summary(about, parts, targets(None, None, None), True, tmp_path)
    assert "Not installed: deepspeed" in text
    assert "| step | 3 | **exit code 1**: No module named 'pydantic' |" in text
    assert "need: pip install pydantic" in text
    assert text.count("| not measured |") == 9


def test_a_file_cut_short_is_no_measurement(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    assert read(path) is None
    whole = json.dumps(kernels_of({"ours": 1.0, "torch": 2.0}))
    for text in ("", whole[: len(whole) // 2], "3"):
        path.write_text(text)
        assert read(path) is None
    path.write_text(whole)
    assert read(path) == json.loads(whole)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--rounds", "0"], "--rounds is 0, expected at least 1"),
        (["--batch", "0"], "--batch is 0, expected at least 1"),
        (["--minutes", "-1"], "--minutes is -1, expected more than 0"),
        (["--minutes", "nan"], "--minutes is nan, expected more than 0"),
    ],
)
def test_mistakes_get_one_sentence(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--device", "cpu", "--out", str(tmp_path / "out"), *words]) == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"
    assert not (tmp_path / "out").exists()


def test_the_parts_together_stay_below_the_minutes() -> None:
    assert sum(SHARES.values()) == pytest.approx(1)
