"""Keeps a run going: python -m tools.relaunch --hostfile HOSTS [--max-restarts N] -- --recipe eve_base ...

Starts `deepspeed --hostfile HOSTS --module eve.pretrain --resume ...`, and again when it fails: on the
hosts that still answer ssh, from the last complete checkpoint. Where fewer (or again more) processes fit,
the largest number that divides the batches and the readers is taken, so the global batch and the order
of the data stay as they are, and a checkpoint that is cut by processes is brought to the new layout
first (tools/convert_checkpoint.py).

Ends with the exit code of the run when that is finished (0), when the user has to mend something (2), after N
failures in a row without a new checkpoint, or when told to: SIGTERM and SIGINT pass to the run, which
saves and stops.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from eve import pretrain
from eve.config import Recipe, load_recipe
from eve.errors import UserError
from eve.parallel.topology import Topology, check_degrees
from eve.training.checkpoint import CheckpointStore, is_complete
from eve.training.ds_config import plan_step, read_ds_config

# A host that takes longer to answer is taken for lost, also in the middle of a run.
SSH = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
SSH_OF_THE_RUN = "-o ServerAliveInterval=10 -o ServerAliveCountMax=3 -o ConnectTimeout=10"
HOST_LINE = re.compile(r"(\S+)\s+slots=(\d+)")


@dataclass(frozen=True)
class Layout:
    """`hosts` in the order of the hostfile, with the number of processes on each."""

    hosts: dict[str, int]
    tensor: int
    expert: int

    @property
    def world_size(self) -> int:
        return sum(self.hosts.values())

    def __str__(self) -> str:
        degrees = f", tensor {self.tensor}, expert {self.expert}" if self.tensor * self.expert > 1 else ""
        return f"{self.world_size} processes on {', '.join(self.hosts)}{degrees}"


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    try:
        return Relauncher(options).run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.relaunch", description="Starts a run again when it fails."
    )
    parser.add_argument(
        "--hostfile", type=Path, help="lines `HOST slots=N`; default: all GPUs of this machine"
    )
    parser.add_argument("--max-restarts", type=int, default=3, help="failures in a row without progress")
    parser.add_argument("--master-port", type=int, default=29500, help="the first; each start takes the next")
    parser.add_argument("pretrain", nargs="+", help="after --: the arguments of eve.pretrain")
    return parser.parse_args(argv)


class Relauncher:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.all_hosts = read_hostfile(options.hostfile)
        given = pretrain.parse_arguments(options.pretrain)
        self.recipe = load_recipe(given.recipe, given.overrides)
        self.ds_tree: dict[str, Any] = {}
        if given.deepspeed_config:
            self.ds_tree = read_ds_config(given.deepspeed_config)
        given.resume = True
        self.run_dir: Path = given.run_dir or pretrain.default_run_dir(given, self.recipe)
        alone = Topology(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
        self.store = CheckpointStore(self.run_dir / "checkpoints", alone, keep=1)
        self.arguments = list(options.pretrain)
        for argument, present in (("--resume", "--resume" in self.arguments), ("--run_dir", given.run_dir)):
            if not present:
                self.arguments[:0] = [argument] if argument == "--resume" else [argument, str(self.run_dir)]
        self.stop_signal: int | None = None

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask_to_stop)
        failures, starts = 0, 0
        while True:
            hosts = self._reachable(first=starts == 0)
            layout = choose_layout(hosts, self.recipe, self.ds_tree)
            self._settle(layout)
            before = self._step()
            if self.stop_signal is not None:
                return 128 + self.stop_signal
            starts += 1
            say(f"start {starts} from step {before}: {layout}")
            code = self._launch(layout, self.options.master_port + starts % 1000)
            # The launcher says 0 as well where a signal has ended it.
            if code == 2 or (code == 0 and self._is_finished()):
                return code
            if self.stop_signal is not None:
                return 128 + self.stop_signal
            failures = 0 if self._step() > before else failures + 1
            say(
                f"the run ended with exit code {code}; the last complete checkpoint is of step {self._step()}"
            )
            if failures > self.options.max_restarts:
                say(f"given up after {failures} failures in a row without a new checkpoint")
                return code
            for host in hosts:
                # Where the ssh connection was lost, processes may be left over, with their memory.
                self._signal_ranks(host, "KILL", "[0-9]+")

    def _reachable(self, *, first: bool) -> dict[str, int]:
        hosts = answering(self.all_hosts)
        lost = ", ".join(sorted(self.all_hosts.keys() - hosts.keys()))
        if lost and (first or not hosts):
            raise UserError(f"{lost} of {self.options.hostfile} cannot be reached by ssh without a password")
        if lost:
            say(f"{lost} cannot be reached, going on without")
        return hosts

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        self.stop_signal = number

    def _is_finished(self) -> bool:
        steps = sum(stage.steps for stage in self.recipe.stages)
        return self._step() == steps and (self.run_dir / "export").is_dir()

    def _step(self) -> int:
        latest = self.store.latest()
        return 0 if latest is None else int(latest.name.removeprefix("step-"))

    def _launch(self, layout: Layout, port: int) -> int:
        arguments = [*self.arguments, f"parallel.tensor={layout.tensor}", f"parallel.expert={layout.expert}"]
        environment = os.environ.copy()
        appended = environment.get("PDSH_SSH_ARGS_APPEND", "")
        environment["PDSH_SSH_ARGS_APPEND"] = f"{appended} {SSH_OF_THE_RUN}".strip()
        with tempfile.NamedTemporaryFile("w", prefix="hosts-") as hostfile:
            hostfile.writelines(f"{host} slots={slots}\n" for host, slots in layout.hosts.items())
            hostfile.flush()
            command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", hostfile.name]
            command += ["--no_ssh_check", "--log_level=error", f"--master_port={port}"]
            if len(layout.hosts) == 1 and is_here(next(iter(layout.hosts))):
                command += ["--master_addr=127.0.0.1"]
            else:
                # Without it the launcher runs the processes of a single host here, whatever its name.
                command += ["--force_multi"]
                # A shell on each host reads them; those with a space get quotes from the launcher.
                arguments = [word if " " in word else shlex.quote(word) for word in arguments]
            command += ["--module", "eve.pretrain", *arguments]
            process = subprocess.Popen(command, env=environment, start_new_session=True)
            self._wait(process, next(iter(layout.hosts)))
        return process.returncode if process.returncode >= 0 else 128 - process.returncode

    def _wait(self, process: subprocess.Popen[bytes], first_host: str) -> None:
        told = False
        while process.poll() is None:
            time.sleep(0.2)
            if self.stop_signal is not None and not told:
                told = True
                # One process is enough, they stop together. The launchers are left alone: they give the
                # processes half a minute, a large checkpoint may need more.
                if not self._signal_ranks(first_host, "TERM", "0"):
                    os.killpg(process.pid, signal.SIGTERM)  # it is still starting them

    def _signal_ranks(self, host: str, name: str, local_rank: str) -> bool:
        """To the processes of this run on a host; False where there are none."""
        # The brackets keep the shell that runs pkill from matching itself; -o: not the workers of a process.
        run_dir = re.escape(str(self.run_dir))
        pattern = f"-m [e]ve.pretrain --local_rank={local_rank} .*--run_dir[ =]{run_dir}( |$)"
        oldest = "-o" if name == "TERM" else ""
        return on_host(host, f"pkill -{name} {oldest} -f -- '{pattern}'") == 0

    def _settle(self, layout: Layout) -> None:
        """Brings the last checkpoint to the layout; the old one goes when the new one is whole."""
        aside = self.run_dir / "resharding"
        for resharded in aside.glob("checkpoints/step-*"):
            if is_complete(resharded) and not (self.store.directory / resharded.name).exists():
                resharded.rename(self.store.directory / resharded.name)  # killed between the renames below
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint = self.store.latest()
        if checkpoint is None or fits(checkpoint, layout):
            return
        resharded = aside / "checkpoints" / checkpoint.name
        state = json.loads((checkpoint / "state.json").read_text())
        say(f"bringing {checkpoint} from {state['world_size']} processes to {layout}")
        command = [sys.executable, "-m", "tools.convert_checkpoint", str(checkpoint), str(resharded)]
        command += ["--world-size", str(layout.world_size)]
        command += ["--tensor", str(layout.tensor), "--expert", str(layout.expert)]
        command += ["--zero-stage", str(state["zero_stage"]), "--precision", state["precision"]]
        if state["state_format"] == "ZeRO":
            command += ["--offload"]  # the other of two ways to lay out bf16 at stage 1
        if subprocess.run(command, start_new_session=True).returncode:
            raise UserError(f"{checkpoint} cannot be brought to {layout}; the sentence above says why")
        retired = checkpoint.with_name(checkpoint.name.replace("step", "deleting"))
        checkpoint.rename(retired)
        resharded.rename(checkpoint)
        shutil.rmtree(retired)
        shutil.rmtree(aside)


def say(text: str) -> None:
    print(f"relaunch: {text}", flush=True)


def read_hostfile(path: Path | None) -> dict[str, int]:
    """{host: slots}, in order. Raises UserError."""
    if path is None:
        if not torch.cuda.is_available():
            raise UserError(
                "this machine has no GPU to count; give --hostfile with a line `localhost slots=N`"
            )
        return {"localhost": torch.cuda.device_count()}
    try:
        lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    except OSError as error:
        raise UserError(f"the hostfile {path} cannot be read: {error.strerror}") from None
    hosts = {}
    for number, line in enumerate(lines, 1):
        match = HOST_LINE.fullmatch(line)
        if line and (match is None or match[1] in hosts):
            raise UserError(f"line {number} of {path} is {line!r}, expected `HOST slots=N`, each host once")
        if match:
            hosts[match[1]] = int(match[2])
    if sum(hosts.values()) == 0:
        raise UserError(f"the hostfile {path} has no slots, expected lines `HOST slots=N`")
    return hosts


def is_here(host: str) -> bool:
    return host in ("localhost", "127.0.0.1", socket.gethostname(), socket.getfqdn())


def on_host(host: str, command: str) -> int:
    """Exit code of a shell command there; 255 where the host does not answer."""
    remote = ["sh", "-c", command] if is_here(host) else ["ssh", *SSH, host, command]
    try:
        return subprocess.run(remote, stdin=subprocess.DEVNULL, timeout=30).returncode
    except subprocess.TimeoutExpired:
        return 255


def answering(hosts: dict[str, int]) -> dict[str, int]:
    """Those of the hosts that ssh reaches; twice tried, as a busy host may miss one."""
    with ThreadPoolExecutor(max_workers=64) as pool:
        codes = list(pool.map(lambda host: on_host(host, "true") and on_host(host, "true"), hosts))
    return {host: slots for (host, slots), code in zip(hosts.items(), codes, strict=True) if code == 0}


def choose_layout(hosts: dict[str, int], recipe: Recipe, ds_tree: dict[str, Any]) -> Layout:
    """The most processes that the recipe can be cut for, filling hosts in order; its degrees if they fit.

    Raises UserError where nothing fits.
    """
    parallel = recipe.parallel
    degrees = [
        (tensor, expert)
        for tensor in range(parallel.tensor, 0, -1)
        for expert in range(parallel.expert, 0, -1)
        if parallel.tensor % tensor == 0 and parallel.expert % expert == 0
    ]
    reason: UserError | None = None
    for world_size in range(sum(hosts.values()), 0, -1):
        for tensor, expert in degrees:
            changed = recipe.model_copy(
                update={"parallel": parallel.model_copy(update={"tensor": tensor, "expert": expert})}
            )
            try:
                check_degrees(changed.parallel, recipe.model, world_size)
                for stage in recipe.stages:
                    plan_step(ds_tree, changed, stage, world_size // tensor, where="the DeepSpeed config")
            except UserError as error:
                reason = reason or error
                continue
            return Layout(first_slots(hosts, world_size), tensor, expert)
    raise UserError(f"no number of processes on {', '.join(hosts) or 'no host'} fits the recipe: {reason}")


def first_slots(hosts: dict[str, int], number: int) -> dict[str, int]:
    chosen = {}
    for host, slots in hosts.items():
        taken = min(slots, number)
        number -= taken
        if taken:
            chosen[host] = taken
    return chosen


def fits(checkpoint: Path, layout: Layout) -> bool:
    """Whether the processes of the layout can load it as it is."""
    state = json.loads((checkpoint / "state.json").read_text())
    degrees = state["tensor"], state["expert"]
    if degrees != (layout.tensor, layout.expert):
        return False
    whole = state["zero_stage"] == 0 and degrees == (1, 1)
    return whole or state["world_size"] == layout.world_size


if __name__ == "__main__":
    sys.exit(main())
