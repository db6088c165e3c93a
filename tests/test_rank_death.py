"""Real launchers: what they tell a process, and what becomes of a run when one process of it dies."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.conversion.runs import pretrain_as_first
from tests.rank_pool import RankPool, free_port
from tests.test_layouts import pretrain_on_every_rank
from tests.test_resume import arguments, metrics

ROOT = Path(__file__).parents[1]
ZERO = ("--deepspeed_config", "ds_configs/zero1_fp32.json")
# Of a rank, at random points. Ten for the README; each costs a start of four processes.
KILLS = int(os.environ.get("EVE_KILLS", "1"))
STEPS = 4 * KILLS + 20
SHORT = ("stages.0.steps=4",)
LONG = (f"stages.0.steps={STEPS}", "training.checkpoint_every=5", "training.log_every=1")


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


def until(condition: Callable[[], object], process: subprocess.Popen[bytes], seconds: float = 400) -> None:
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


def trains(output: Path, start: int) -> bool:
    """Whether the relauncher's start of this number has made a step."""
    _, *starts = output.read_text().split("relaunch: start ")
    return len(starts) == start and re.search(r"^\s*step\s", starts[-1], re.MULTILINE) is not None


def test_killed_again_and_again_it_is_the_unbroken_run(
    tiny: Path, four_ranks: RankPool, tmp_path: Path
) -> None:
    """One of four processes is killed at a random point, KILLS times: while it starts, computes or saves.

    Then the launcher is killed; then the relauncher is told to stop, and a run from there is the rest.
    """
    layout = ("parallel.tensor=2", "parallel.expert=2")
    argv = arguments(tiny, tmp_path / "unbroken", *ZERO, *LONG, *layout)
    assert four_ranks.run(pretrain_as_first, argv) == [0] * 4
    hostfile, run_dir, output = tmp_path / "hosts", tmp_path / "run", tmp_path / "output"
    hostfile.write_text("localhost slots=4  # all of them\n")
    draw = random.Random(5)
    argv = arguments(tiny, run_dir, *ZERO, *LONG, *layout)
    with started(relaunch(hostfile, *argv), output) as process:
        for kill in range(KILLS):
            until(lambda: len(rank_processes(run_dir)) == 4, process)
            ranks = rank_processes(run_dir)
            if kill % 5 == 4:
                time.sleep(draw.uniform(0, 6))
            else:
                goal = 5 + 4 * draw.uniform(kill, kill + 1)
                until(lambda goal=goal: last_step(run_dir) >= goal, process)
                time.sleep(draw.uniform(0, 0.1))
            victim = draw.randrange(4)
            print(f"kill {kill + 1}: rank {victim} at step {last_step(run_dir)}")
            ranks[victim].kill()
            for other in ranks.values():
                other.wait(60)
        until(lambda: trains(output, KILLS + 1), process)
        # DeepSpeed's outer launcher ends with exit code 0 then, and leaves the ranks alone.
        psutil.Process(rank_processes(run_dir)[0].ppid()).kill()
        until(lambda: trains(output, KILLS + 2), process)
        process.terminate()
        assert process.wait(60) == 143, output.read_text()
    said = output.read_text()
    ended = "relaunch: the run ended with exit code"
    assert said.count(f"{ended} ") == KILLS + 1
    assert said.count(f"{ended} 0; the last complete checkpoint is of step ") == 1
    saved = max((run_dir / "checkpoints").glob("step-*"))
    assert f"saved {saved}; go on with --resume" in said
    assert not rank_processes(run_dir)
    assert four_ranks.run(pretrain_as_first, [*argv, "--resume"]) == [0] * 4
    assert metrics(run_dir) == metrics(tmp_path / "unbroken")
    weights = Path("export", "model.safetensors")
    assert (run_dir / weights).read_bytes() == (tmp_path / "unbroken" / weights).read_bytes()


def test_a_mistake_of_the_user_is_not_tried_again(tiny: Path, tmp_path: Path) -> None:
    hostfile, run_dir, output = tmp_path / "hosts", tmp_path / "run", tmp_path / "output"
    hostfile.write_text("localhost slots=1\n")
    argv = arguments(tiny, run_dir, f"data.tokenizer={tmp_path}/none.model")
    with started(relaunch(hostfile, *argv), output) as process:
        assert process.wait(120) == 2
    said = output.read_text()
    assert said.count("relaunch: start ") == 1
    assert said.count("error: ") == 1


def test_torchrun_with_rendezvous(tiny: Path, two_ranks: RankPool, tmp_path: Path) -> None:
    run_dir, output = tmp_path / "run", tmp_path / "output"
    rendezvous = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}")
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", "2"]
    argv = arguments(tiny, run_dir, *ZERO, *SHORT)
    with started([*command, *rendezvous, "-m", "eve.pretrain", *argv], output) as process:
        assert process.wait(120) == 0, output.read_text()
    argv = arguments(tiny, tmp_path / "expected", *ZERO, *SHORT)
    assert two_ranks.run(pretrain_on_every_rank, argv) == [0, 0]
    assert metrics(run_dir) == metrics(tmp_path / "expected")


def slurm(rank: int) -> dict[str, str]:
    """What srun gives a task, of two on one node; the port follows from the job, so jobs differ."""
    return {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NTASKS": "2",
        "SLURM_JOB_NODELIST": "localhost",
    }


def test_srun_and_without_a_launcher_to_end_it_the_other_rank_ends(tiny: Path, tmp_path: Path) -> None:
    run_dir, outputs = tmp_path / "run", [tmp_path / "output-0", tmp_path / "output-1"]
    steps = ("stages.0.steps=100000", "training.log_every=1")
    command = [sys.executable, "-m", "eve.pretrain", *arguments(tiny, run_dir, *ZERO, *steps)]
    with (
        started(command, outputs[0], **slurm(0)) as first,
        started(command, outputs[1], **slurm(1)) as second,
    ):
        until(lambda: last_step(run_dir) >= 3, first)
        second.kill()
        assert first.wait(60) == 1
    said = outputs[0].read_text()
    assert "2 processes on cpu" in said
    cause = f"rank 1 on {os.uname().nodename} (process {second.pid}) is gone: it was killed or crashed"
    assert f"ends: {cause}" in said


def test_whose_output_is_read_no_more_saves_and_stops(tiny: Path, tmp_path: Path) -> None:
    """As when `deepspeed --hostfile` gets Ctrl-C: ssh is closed first, then the processes are told."""
    steps = ("stages.0.steps=100000", "training.checkpoint_every=100000", "training.log_every=1")
    command = [sys.executable, "-m", "eve.pretrain", *arguments(tiny, tmp_path / "run", *steps)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    for line in process.stdout:
        if line.split()[:2] == [b"step", b"3/100,000"]:
            break
    process.stdout.close()
    assert process.wait(60) == 143
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 1
