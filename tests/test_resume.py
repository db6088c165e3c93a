"""A run that was killed and resumed is, in every metric of every later step, the run that was not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from eve import pretrain
from tests.rank_pool import fork_server


def arguments(recipe: Path, run_dir: Path, *more: str) -> list[str]:
    return ["--recipe", str(recipe), "--run_dir", str(run_dir), *more]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith("time/")}
        for line in lines
    ]


@pytest.fixture(scope="module")
def unbroken(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    assert pretrain.main(arguments(tiny, run_dir)) == 0
    return run_dir


def assert_same_run(run_dir: Path, unbroken: Path) -> None:
    assert metrics(run_dir) == metrics(unbroken)
    weights = Path("export", "model.safetensors")
    assert (run_dir / weights).read_bytes() == (unbroken / weights).read_bytes()
    kept = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert kept == ["step-00000008", "step-00000012"]


def run_in_child(hook: Callable[..., None], argv: list[str]) -> int:
    """`eve.pretrain` in a process of its own that the hook, called for every file operation, may kill.

    It prints into RUN_DIR.out.
    """
    process = fork_server().Process(target=hooked, args=(hook, argv))
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def hooked(hook: Callable[..., None], argv: list[str]) -> None:
    # The fork server is older than what captures the output of a test.
    os.dup2(os.open(f"{argv[3]}.out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    sys.addaudithook(hook)
    sys.exit(pretrain.main(argv))


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_with_state_half_written(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and "writing-00000008" in str(args[0]) and str(args[0]).endswith("recipe.yaml"):
        kill()


def kill_before_the_marker(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and "writing-00000008" in str(args[0]) and str(args[0]).endswith("complete.json"):
        kill()


def kill_before_the_rename(event: str, args: tuple[Any, ...]) -> None:
    if event == "os.rename" and "writing-00000008" in str(args[0]):
        kill()


def kill_while_the_oldest_is_removed(event: str, args: tuple[Any, ...]) -> None:
    if event == "shutil.rmtree" and "deleting-00000004" in str(args[0]):
        kill()


def kill_in_the_first_checkpoint(event: str, args: tuple[Any, ...]) -> None:
    if event == "os.rename" and "writing-00000004" in str(args[0]):
        kill()


@pytest.mark.parametrize(
    ("hook", "resumes_at"),
    [
        (kill_in_the_first_checkpoint, 0),
        (kill_with_state_half_written, 4),
        (kill_before_the_marker, 4),
        (kill_before_the_rename, 4),
        (kill_while_the_oldest_is_removed, 12),
    ],
)
def test_killed_while_writing_a_checkpoint(
    hook: Callable[..., None],
    resumes_at: int,
    tiny: Path,
    unbroken: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run_dir = tmp_path / "run"
    assert run_in_child(hook, arguments(tiny, run_dir)) == -signal.SIGKILL
    left = {path.name.split("-")[0] for path in (run_dir / "checkpoints").iterdir()}
    assert left & {"writing", "deleting"}
    capfd.readouterr()
    assert pretrain.main(arguments(tiny, run_dir, "--resume")) == 0
    said = capfd.readouterr().out
    assert f"at step {resumes_at}" in said if resumes_at else "starting" in said
    assert_same_run(run_dir, unbroken)


def signal_at_step_6(numbers: tuple[int, ...], event: str, args: tuple[Any, ...]) -> None:
    """While the picture of step 6 is saved, two steps after a checkpoint and two before the next."""
    if event == "open" and str(args[0]).endswith("step-00000006.png"):
        for number in numbers:
            os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("numbers", "exit_code", "saved"),
    [
        ((signal.SIGKILL,), -9, "step-00000004"),
        # All finish the step that is under way, here in the middle of a log window, and save.
        ((signal.SIGTERM,), 143, "step-00000007"),
        ((signal.SIGINT,), 130, "step-00000007"),
        # Ctrl-C of a terminal, and what DeepSpeed's launcher makes of it.
        ((signal.SIGINT, signal.SIGTERM), 130, "step-00000007"),
    ],
)
def test_a_signal_between_two_checkpoints(
    numbers: tuple[int, ...],
    exit_code: int,
    saved: str,
    tiny: Path,
    unbroken: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run_dir = tmp_path / "run"
    argv = arguments(tiny, run_dir, "training.images_every=6")
    assert run_in_child(partial(signal_at_step_6, numbers), argv) == exit_code
    assert max(path.name for path in (run_dir / "checkpoints").glob("step-*")) == saved
    sentence = f"stopped at step 7, saved {run_dir}/checkpoints/{saved}; go on with --resume"
    assert (sentence in (tmp_path / "run.out").read_text().splitlines()) == (numbers != (signal.SIGKILL,))
    assert pretrain.main(arguments(tiny, run_dir, "--resume")) == 0
    assert capfd.readouterr().out.splitlines()[-1] == f"finished: {run_dir}/export"
    assert metrics(run_dir) == metrics(unbroken)


def test_a_finished_run_resumes_to_nothing(tiny: Path, unbroken: Path) -> None:
    before = metrics(unbroken)
    (unbroken / "export" / "model.safetensors").unlink()
    assert pretrain.main(arguments(tiny, unbroken, "--resume")) == 0
    assert metrics(unbroken) == before
    assert (unbroken / "export" / "model.safetensors").exists()


def test_training_keys_may_change(tiny: Path, unbroken: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    stop = ("training.checkpoint_every=5",)
    assert run_in_child(kill_before_the_second, arguments(tiny, run_dir, *stop)) == -signal.SIGKILL
    assert pretrain.main(arguments(tiny, run_dir, "--resume", "training.num_workers=2")) == 0
    assert metrics(run_dir) == metrics(unbroken)


def test_moved_data_resumes(
    tiny: Path, unbroken: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir, moved = tmp_path / "run", shutil.copytree(tiny.parent, tmp_path / "moved")
    argv = arguments(tiny, run_dir, "training.images_every=6")
    assert run_in_child(partial(signal_at_step_6, (signal.SIGKILL,)), argv) == -signal.SIGKILL
    paths = (
        f"data.tokenizer={moved}/tokenizer.model",
        f"data.sources.pairs.mix.0.shards={moved}/train/*.tar",
    )
    assert pretrain.main(arguments(tiny, run_dir, "--resume", *paths)) == 0
    assert "at step 4" in capfd.readouterr().out
    assert metrics(run_dir) == metrics(unbroken)


def kill_before_the_second(event: str, args: tuple[Any, ...]) -> None:
    if event == "os.rename" and "writing-00000010" in str(args[0]):
        kill()
