"""One of three processes dies in some way: all end, and all say which it was. SILENCE is shortened."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from eve.parallel import watchdog
from tests.rank_pool import fork_server, free_port

NUM_RANKS = 3
Act = Callable[[int], int]


def member(rank: int, port: int, output: Path, act: Act) -> None:
    """A process as eve.pretrain.program makes it, with `act` for the training."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(NUM_RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    watchdog.SILENCE, watchdog.ARRIVAL, watchdog.LATE_ARRIVAL, watchdog.ECHO = 4, 6, 2, 2
    dog = watchdog.Watchdog.start()
    try:
        code = act(rank)
    except Exception as error:
        dog.report(error)
    dog.stop(code)
    sys.exit(code)


def run(act: Act, output: Path, num_started: int = NUM_RANKS) -> tuple[list[int | None], str]:
    """(the processes, ended but for those that are stopped, what they printed)."""
    port = free_port()
    context = fork_server()
    processes = [
        context.Process(target=member, args=(rank, port, output, act)) for rank in range(num_started)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            if act is not stopped or process is not processes[1]:
                process.join(60)
    finally:
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
    return codes, output.read_text()


def killed(rank: int) -> int:
    time.sleep(1.5)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(100)
    return 0


def first_is_killed(rank: int) -> int:
    time.sleep(1.5)
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(100)
    return 0


def killed_in_a_collective(rank: int) -> int:
    """The others get an error of gloo at once, which is not the cause."""
    dist.init_process_group("gloo", rank=rank, world_size=NUM_RANKS)
    dist.barrier()
    if rank == 1:
        time.sleep(1.5)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(4))
    return 0


def stopped(rank: int) -> int:
    time.sleep(1.5)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(100)
    return 0


def raises(rank: int) -> int:
    if rank == 1:
        raise ValueError("no such thing\nand more")
    time.sleep(100)
    return 0


def first_raises(rank: int) -> int:
    if rank == 0:
        raise ValueError("no such thing")
    time.sleep(100)
    return 0


def leaves_alone(rank: int) -> int:
    if rank == 1:
        return 2
    time.sleep(100)
    return 0


@pytest.mark.parametrize(
    ("act", "codes", "cause"),
    [
        (killed, [1, -9, 1], "rank 1 on {host} (process "),
        (first_is_killed, [-9, 1, 1], "rank 0 on {host} is gone"),
        (killed_in_a_collective, [1, -9, 1], "rank 1 on {host} (process "),
        (stopped, [1, None, 1], "has not answered for 4 s"),
        (raises, [1, 1, 1], "rank 1 on {host} raised ValueError: no such thing"),
        (first_raises, [1, 1, 1], "rank 0 on {host} raised ValueError: no such thing"),
        (leaves_alone, [1, 2, 1], "ended with exit code 2, and the others went on"),
    ],
)
def test_all_end_for_the_same_cause(act: Act, codes: list[int | None], cause: str, tmp_path: Path) -> None:
    found, said = run(act, tmp_path / "output")
    assert found == codes, said
    cause = cause.format(host=os.uname().nodename)
    for rank, code in enumerate(codes):
        if code == 1:
            line = next(line for line in said.splitlines() if line.startswith(f"rank {rank} "))
            assert " ends: " in line
            assert cause in line


def test_one_that_never_comes_is_named(tmp_path: Path) -> None:
    codes, said = run(killed, tmp_path / "output", num_started=1)
    assert codes == [1]
    assert "ends: of 3 processes, ranks [1, 2] have not come in 6 s" in said


def silent_but_alive(rank: int) -> int:
    """Longer than SILENCE without a word from the main thread, then not all are done at the same time."""
    time.sleep(6 + rank)
    return 143


def test_slow_phases_and_an_end_in_turn_are_no_death(tmp_path: Path) -> None:
    assert run(silent_but_alive, tmp_path / "output") == ([143, 143, 143], "")


def slow(rank: int) -> int:
    time.sleep(6)
    return 0


def test_a_second_run_on_the_same_port_leaves_the_first_alone(tmp_path: Path) -> None:
    port, context = free_port(), fork_server()

    def start(ranks: list[int], output: Path) -> list[Any]:
        processes = [context.Process(target=member, args=(rank, port, output, slow)) for rank in ranks]
        for process in processes:
            process.start()
        return processes

    first = start([0, 1, 2], tmp_path / "first")
    time.sleep(3)
    second = start([0, 1], tmp_path / "second")
    for process in [*first, *second]:
        process.join(30)
    said = (tmp_path / "second").read_text()
    assert [process.exitcode for process in first] == [0, 0, 0], (tmp_path / "first").read_text()
    assert [process.exitcode for process in second] == [1, 1], said
    assert f"127.0.0.1:{port} is in use by another run or program; give the launcher another" in said
    assert f"another run has the port {port}; give the launcher another" in said
