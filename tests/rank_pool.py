"""Processes for tests, forked from a server that has imported torch, DeepSpeed and eve once.

A pool's processes stay: they join a gloo group, then run what tests send.

    pool = RankPool(2)
    results = pool.run(function, argument)      # [function(argument) on rank 0, on rank 1]

`function` is a module-level function. Where a rank raises, or none answers in time, the processes are
ended, the traceback is raised here, and the next call starts new ones.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver as forkserver
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

SECONDS = 240


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def fork_server() -> Any:
    """The context to start processes from. DeepSpeed takes seconds to import."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deepspeed", "eve.pretrain"])
    forkserver.ensure_running()
    return context


class RankPool:
    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._ranks: list[tuple[BaseProcess, Connection]] = []

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        if not self._ranks:
            self._start()
        for _, connection in self._ranks:
            connection.send((function, arguments))
        deadline = time.monotonic() + SECONDS
        answers = []
        for rank, (process, connection) in enumerate(self._ranks):
            if not connection.poll(max(0.0, deadline - time.monotonic())):
                self.close()
                raise TimeoutError(f"rank {rank} of {self.num_ranks} gave no answer in {SECONDS} s")
            try:
                good, answer = connection.recv()
            except EOFError:
                self.close()
                raise RuntimeError(f"rank {rank} ended with exit code {process.exitcode}") from None
            if not good:
                self.close()
                raise RuntimeError(f"rank {rank} raised:\n{answer}")
            answers.append(answer)
        return answers

    def _start(self) -> None:
        context = fork_server()
        port = free_port()
        for rank in range(self.num_ranks):
            here, there = context.Pipe()
            # Not daemons: a run has worker processes of its own.
            process = context.Process(target=_serve, args=(there, rank, self.num_ranks, port))
            process.start()
            there.close()
            self._ranks.append((process, here))

    def close(self) -> None:
        for process, connection in self._ranks:
            connection.close()
            process.terminate()
            process.join(5)
            if process.is_alive():
                process.kill()
        self._ranks = []


def _serve(connection: Connection, rank: int, num_ranks: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    import torch

    from eve.parallel.topology import Topology

    torch.set_num_threads(1)
    Topology.from_environment()
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = True, function(*arguments)
        except BaseException:
            answer = False, traceback.format_exc()
        connection.send(answer)
