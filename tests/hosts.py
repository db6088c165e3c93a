"""Two hosts on this machine: network namespaces with an address, a name and an ssh server each.

    with two_hosts(directory) as hosts:
        process = hosts.start(["deepspeed", "--hostfile", hosts.hostfile(slots=2), ...])

`start` runs a command on the first host. `ssh host-a` and `ssh host-b` work from there as they do for a
user who has set up keys, and so do pdsh and `deepspeed --hostfile`; the file system is shared. Each
host has one interface, eth0; it needs root with CAP_NET_ADMIN and the Debian packages of `missing`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PACKAGES = {"sshd": "openssh-server", "pdsh": "pdsh", "ip": "iproute2"}
ROOT = Path(__file__).parents[1]
PREFIX = "eve-test"
SSHD = """
Port 22
ListenAddress {address}
HostKey {directory}/host_key
AuthorizedKeysFile {directory}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
MaxStartups 100
"""
SSH = """
Host host-a
  HostName 10.77.0.1
Host host-b
  HostName 10.77.0.2
Host *
  IdentityFile {directory}/key
  IdentitiesOnly yes
  UserKnownHostsFile /dev/null
  StrictHostKeyChecking no
  LogLevel ERROR
"""


def missing() -> str | None:
    """Why there can be no hosts here, in one line."""
    search = os.pathsep.join((os.environ["PATH"], "/usr/sbin", "/sbin"))
    packages = [package for program, package in PACKAGES.items() if not shutil.which(program, path=search)]
    if packages:
        return f"two hosts need the Debian packages {', '.join(packages)}: apt install {' '.join(packages)}"
    if subprocess.run(["ip", "netns", "add", f"{PREFIX}-{os.getpid()}-try"], capture_output=True).returncode:
        return "two hosts need root with CAP_NET_ADMIN, to make network namespaces"
    subprocess.run(["ip", "netns", "delete", f"{PREFIX}-{os.getpid()}-try"], check=True)
    return None


class Hosts:
    """`names` are what ssh and a hostfile know, `spaces` the network namespaces."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.names = ("host-a", "host-b")
        self.addresses = ("10.77.0.1", "10.77.0.2")
        self.spaces = tuple(f"{PREFIX}-{os.getpid()}-{letter}" for letter in "ab")

    def hostfile(self, slots: int) -> str:
        path = self.directory / "hosts"
        path.write_text("".join(f"{name} slots={slots}\n" for name in self.names))
        return str(path)

    def start(self, command: Sequence[str], output: Path) -> subprocess.Popen[bytes]:
        """The command on the first host, in the repository, with its output in a file."""
        # What a user would write into .deepspeed_env for the processes on the other hosts.
        environment_file = self.directory / "deepspeed_env"
        environment_file.write_text("OMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\n")
        environment = os.environ | {
            "PATH": f"{self.directory}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "DS_ENV_FILE": str(environment_file),
            "DS_ACCELERATOR": "cpu",
        }
        with open(output, "wb") as file:
            return subprocess.Popen(
                self.inside(0, *command), cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
            )

    def inside(self, host: int, *command: str) -> list[str]:
        """The command as it has to be started to run on a host; it keeps its process id."""
        script = f'hostname {self.names[host]}; exec "$@"'
        return [
            "ip",
            "netns",
            "exec",
            self.spaces[host],
            "unshare",
            "--uts",
            "sh",
            "-c",
            script,
            "-",
            *command,
        ]

    def processes(self, host: int, text: str) -> list[int]:
        """The ids of the processes of a host whose command line contains the text, oldest first."""
        listed = subprocess.run(["ip", "netns", "pids", self.spaces[host]], capture_output=True, text=True)
        found = []
        for pid in map(int, listed.stdout.split()):
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if text in command:
                found.append(pid)
        return sorted(found)

    def disconnect(self, host: int) -> None:
        """Takes the host off the network without a word to the other, as when its power fails."""
        subprocess.run(["ip", "-n", self.spaces[host], "link", "set", "eth0", "down"], check=True)

    def _begin(self) -> None:
        directory = self.directory
        for name in ("key", "host_key"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / name], check=True
            )
        (directory / "ssh_config").write_text(SSH.format(directory=directory))
        (directory / "bin").mkdir()
        wrapper = directory / "bin" / "ssh"
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {directory}/ssh_config "$@"\n')
        wrapper.chmod(0o755)
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it, and its package makes it at boot only
        first, second = self.spaces
        for space in self.spaces:
            subprocess.run(["ip", "netns", "add", space], check=True)
            subprocess.run(["ip", "-n", space, "link", "set", "lo", "up"], check=True)
        pair = f"link add eth0 netns {first} type veth peer name eth0 netns {second}"
        subprocess.run(["ip", *pair.split()], check=True)
        for host, (space, address) in enumerate(zip(self.spaces, self.addresses, strict=True)):
            subprocess.run(["ip", "-n", space, "address", "add", f"{address}/24", "dev", "eth0"], check=True)
            subprocess.run(["ip", "-n", space, "link", "set", "eth0", "up"], check=True)
            config = directory / f"sshd_{host}"
            config.write_text(SSHD.format(address=address, directory=directory))
            server = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
            assert server is not None
            with open(directory / f"sshd_{host}.log", "wb") as log:
                command = self.inside(host, server, "-D", "-e", "-f", str(config))
                subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        for name in self.names:
            self._wait_for(name)

    def _wait_for(self, name: str) -> None:
        for _ in range(50):
            trial = subprocess.run(
                self.inside(0, str(self.directory / "bin" / "ssh"), name, "true"),
                capture_output=True,
                text=True,
            )
            if trial.returncode == 0:
                return
            time.sleep(0.2)
        raise RuntimeError(f"no ssh server answers on {name}: {trial.stderr}")


@contextmanager
def two_hosts(directory: Path) -> Iterator[Hosts]:
    """Ends everything that still runs on them when it is left."""
    for space in _spaces():
        if not Path("/proc", space.split("-")[2]).exists():
            _delete(space)  # of a run that was killed
    hosts = Hosts(directory)
    try:
        hosts._begin()
        yield hosts
    finally:
        for space in set(hosts.spaces) & set(_spaces()):
            _delete(space)


def _spaces() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    names = [line.split()[0] for line in listed.stdout.splitlines() if line]
    return [name for name in names if name.startswith(f"{PREFIX}-")]


def _delete(space: str) -> None:
    listed = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True)
    for pid in map(int, listed.stdout.split()):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    subprocess.run(["ip", "netns", "delete", space], check=True)
