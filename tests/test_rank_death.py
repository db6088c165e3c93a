"""Real launchers: what they tell a process, and what becomes of a run when one process of it dies."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.rank_pool import RankPool, free_port
from tests.test_layouts import pretrain_on_every_rank
from tests.test_resume import arguments, metrics

ROOT = Path(__file__).parents[1]
ZERO = ("--deepspeed_config", "ds_configs/zero1_fp32.json")
STEPS = 40
LONG = (f"stages.0.steps={STEPS}", "training.checkpoint_every=5", "training.log_every=1")
# The proof is ten; every one costs a start of four processes.
KILLS = int(os.environ.get("EVE_KILLS", "2"))


@contextmanager
def started(command: list[str], output: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """The command in the repository; whatever is left of it at the end is killed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    with open(output, "ab") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=clean | environment, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        yield process
    finally:
        with_children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        for child in with_children:
            child.kill()
        process.kill()
        process.wait()


def until(condition: Callable[[], object], process: subprocess.Popen[bytes], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended with exit code {process.returncode}"
        assert time.monotonic() < end, f"still waiting after {seconds} s"
        time.sleep(0.05)


def last_step(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    try:
        return json.loads(lines[-1])["step"]
    except (IndexError, json.JSONDecodeError):
        return 0


def rank_processes(run_dir: Path) -> dict[int, psutil.Process]:
    """By rank."""
    found = {}
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            if "-m" in command and "eve.pretrain" in command and str(run_dir) in command:
                found[int(process.environ()["RANK"])] = process
        except (psutil.Error, KeyError):
            continue
    return found


def relaunch(hostfile: str | Path, *argv: str) -> list[str]:
    start = [sys.executable, "-m", "tools.relaunch", "--hostfile", str(hostfile)]
    return [*start, "--master-port", str(free_port()), "--max-restarts", "20", "--", *argv]


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[RankPool]:
    pool = RankPool(4)
    yield pool
    pool.close()


def test_killed_again_and_again_it_is_the_unbroken_run(
    tiny: Path, four_ranks: RankPool, tmp_path: Path
) -> None:
    """One of four processes is killed at a random point, KILLS times: while it starts, computes or saves."""
    argv = arguments(tiny, tmp_path / "unbroken", *ZERO, *LONG)
    assert four_ranks.run(pretrain_on_every_rank, argv) == [0] * 4
    four_ranks.close()
    hostfile, run_dir, output = tmp_path / "hosts", tmp_path / "run", tmp_path / "output"
    hostfile.write_text("localhost slots=4  # all of them\n")
    draw = random.Random(5)
    with started(relaunch(hostfile, *arguments(tiny, run_dir, *ZERO, *LONG)), output) as process:
        for kill in range(KILLS):
            until(lambda: len(rank_processes(run_dir)) == 4, process)
            ranks = rank_processes(run_dir)
            if kill % 5 == 4:
                time.sleep(draw.uniform(0, 6))
            else:
                goal = draw.uniform(kill, kill + 1) * STEPS / KILLS
                until(lambda goal=goal: last_step(run_dir) >= min(goal, STEPS - 1), process)
                time.sleep(draw.uniform(0, 0.1))
            victim = draw.randrange(4)
            print(f"kill {kill + 1}: rank {victim} at step {last_step(run_dir)}")
            ranks[victim].kill()
            for other in ranks.values():
                other.wait(60)
        assert process.wait(180) == 0, output.read_text()
    said = output.read_text()
    assert said.count("relaunch: start ") == KILLS + 1
    assert metrics(run_dir) == metrics(tmp_path / "unbroken")
    weights = Path("export", "model.safetensors")
    assert (run_dir / weights).read_bytes() == (tmp_path / "unbroken" / weights).read_bytes()
