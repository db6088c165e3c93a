"""What a launcher tells a process about the others: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.

`deepspeed` and `torchrun` set these. What SLURM sets is translated:

    srun --nodes 4 --ntasks-per-node 8 python -m eve.pretrain ...

And what it does to a process that it leaves: `deepspeed --hostfile`, stopped by Ctrl-C, closes the ssh
connections at once, so that the next line printed would be an error in a run that is saving.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
from collections.abc import MutableMapping
from typing import Any, TextIO

import psutil

# Below the ports that systems give out by themselves.
FIRST_PORT, NUM_PORTS = 20000, 10000


def read_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Completes the environment in place; changes nothing where no launcher has started this process."""
    # The script of an `sbatch` job has SLURM_PROCID as well, but is no step: it may start another launcher.
    if "RANK" not in environment and {"SLURM_PROCID", "SLURM_STEP_ID"} <= environment.keys():
        _translate_slurm(environment)
    if int(environment.get("WORLD_SIZE", 1)) > 1:
        # gloo takes the address of the host's own name, which on many is 127.0.1.1: no way for the others.
        interface = _interface_of(own_address(environment["MASTER_ADDR"]))
        if interface is not None:
            environment.setdefault("GLOO_SOCKET_IFNAME", interface)


class Console:
    """stdout or stderr of a process that saves and stops, as for SIGTERM, when nobody reads it any more."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._closed = False

    @classmethod
    def install(cls) -> None:
        sys.stdout, sys.stderr = cls(sys.stdout), cls(sys.stderr)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except BrokenPipeError:
            self._stop()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._stop()

    def _stop(self) -> None:
        if not self._closed:
            self._closed = True
            os.kill(os.getpid(), signal.SIGTERM)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _translate_slurm(environment: MutableMapping[str, str]) -> None:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment.get("SLURM_STEP_NUM_TASKS") or environment["SLURM_NTASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment.setdefault("MASTER_ADDR", first_host(nodes))
    environment.setdefault("MASTER_PORT", str(FIRST_PORT + int(environment["SLURM_JOB_ID"]) % NUM_PORTS))


def first_host(nodes: str) -> str:
    """Of SLURM's list: `gpu[007-009,012],login` -> `gpu007`, `rack1-[2,4]-gpu[1-8]` -> `rack1-2-gpu1`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group())


def own_address(other: str) -> str | None:
    """This host's address as the other one sees it; None where that is unknown or no network is between."""
    try:
        family, _, _, _, target = socket.getaddrinfo(other, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    return None if own == "::1" or own.startswith("127.") else own


def _interface_of(address: str | None) -> str | None:
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address.split("%")[0] == address for found in addresses):
            return name
    return None
