"""When one process of a run dies, all end within a minute, and each says why.

A launcher ends the processes of its own host when one of them fails, but nobody tells the other hosts: they
wait in a collective until it times out, half an hour later. So every process keeps one TCP connection to a
hub in rank 0, from the first second to the last:

    killed, crashed         the system closes its connection          known at once
    an exception            it tells the hub which, then waits        known at once
    stopped, host lost      nothing comes from it any more            known after SILENCE seconds
    rank 0 itself           all connections close, or fall silent     as above

The hub passes the first cause on to all; they print it and end with exit code 1. Threads of their own do
this, so a long compilation, import or checkpoint is no silence, and where the main thread hangs in
a collective it is ended too. What only hangs in Python, and still lives, is left to the timeout of the
collective that the others wait in (30 minutes, Topology.join).
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore

from eve.parallel.launcher import own_address

# Seconds. A thread that cannot run once in SILENCE seconds is on a host that swaps, or holds Python's lock.
BEAT, SILENCE = 1.0, 30
# How long processes may take to come, from the first to the last; and after one has failed.
ARRIVAL, LATE_ARRIVAL = 600, 20
# A collective that fails is mostly the echo of a process that was lost: so long the hub waits for that news.
ECHO = 5
KEY = f"eve/watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
OTHER_PORT = "give the launcher another --master_port (torchrun: --rdzv-endpoint)"
ECHOES = ("gloo", "nccl", "connection closed by peer", "connection reset", "broken pipe")


class Watchdog:
    """Of one process; does nothing where it is the only one."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self._name = f"rank {rank} on {socket.gethostname()}"
        self._store: Any = None
        self._outbox: list[dict[str, Any]] = []
        self._finished = threading.Event()

    @classmethod
    def start(cls) -> Watchdog:
        """Of this process, by the launcher's environment. Before it joins a process group."""
        watchdog = cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
        if watchdog.world_size > 1:
            threading.Thread(target=watchdog._watch, name="watchdog", daemon=True).start()
        return watchdog

    def report(self, error: BaseException) -> NoReturn:
        """Ends the run for this error of this process."""
        if self.world_size > 1:
            text = f"{type(error).__name__}: {error}"
            echo = isinstance(error, dist.DistError) or any(sign in text.lower() for sign in ECHOES)
            first_line = text.strip().splitlines()[0][:500]
            self._outbox.append({"cause": f"{self._name} raised {first_line}", "echo": echo})
            # The thread ends the process with the answer.
            time.sleep(ECHO + 5)
        os._exit(1)

    def stop(self, exit_code: int) -> None:
        """This process is done. Where the others are not, they end for it after SILENCE seconds."""
        if self.world_size > 1:
            self._outbox.append({"done": exit_code})
            self._finished.wait(SILENCE + 5)

    def _watch(self) -> None:
        try:
            connection, token, host = self._connect()
        except dist.DistError as error:
            address = "{MASTER_ADDR}:{MASTER_PORT}".format(**os.environ)
            if "address already in use" in str(error).lower():
                self._end(f"{address} is in use by another run or program; {OTHER_PORT}")
            self._end(f"no process of rank 0 has answered at {address} for {ARRIVAL} s, or it is gone again")
        except OSError as error:
            # A firewall that lets only some ports through. The run may still work.
            with suppress(OSError):
                os.write(2, f"{self._name} goes on without a watchdog: {error}\n".encode())
            return
        hello = {"token": token, "rank": self.rank, "name": f"{self._name} (process {os.getpid()})"}
        peer = _Peer(connection)
        peer.send(hello)
        while True:
            done = False
            for message in self._outbox[:]:
                self._outbox.remove(message)
                peer.send(message)
                done = done or "done" in message
            if done and self.rank > 0:
                self._finished.set()
                return
            peer.send({})
            messages = peer.receive(BEAT)
            for message in messages:
                if "cause" in message:
                    self._end(message["cause"])
                if "bye" in message:
                    self._finished.set()
                    return
            if peer.closed:
                self._end(f"rank 0 on {host} is gone: it was killed or crashed")
            if peer.silent > SILENCE:
                self._end(f"rank 0 on {host} has not answered for {SILENCE} s: stopped, or its host is lost")

    def _connect(self) -> tuple[socket.socket, str, str]:
        """(connection to the hub, its password, its host's name)."""
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # The one that the process group will use: that of torchrun's agent, or of rank 0.
        owner = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        limit = timedelta(seconds=ARRIVAL)
        store = TCPStore(address, port, None, owner, limit, wait_for_workers=False, multi_tenant=True)
        self._store = store  # its server lives as long as it
        if self.rank == 0:
            hub = _Hub(self.world_size)
            threading.Thread(target=hub.serve, name="watchdog hub", daemon=True).start()
            where = [own_address(address) or address, hub.port, hub.token, socket.gethostname()]
            store.set(KEY, json.dumps(where))
        where = json.loads(store.get(KEY))
        return socket.create_connection((where[0], where[1]), timeout=SILENCE), where[2], where[3]

    def _end(self, cause: str) -> NoReturn:
        # Not through sys.stderr, whose lock the main thread may hold. Nobody may be there to read it.
        with suppress(OSError):
            os.write(2, f"{self._name} ends: {cause}\n".encode())
        os._exit(1)


@dataclass
class _Peer:
    """One end of a connection: lines of JSON. `silent` counts beats without news, not seconds, as this
    process may have been stopped itself."""

    connection: socket.socket
    silent: int = 0
    closed: bool = False
    # Of the hub: who that is, and the exit code of a rank that is done.
    rank: int | None = None
    name: str = ""
    exit_code: int | None = None
    buffer: bytes = field(default=b"", repr=False)

    def send(self, message: dict[str, Any]) -> None:
        try:
            self.connection.settimeout(BEAT)
            self.connection.sendall(json.dumps(message).encode() + b"\n")
        except TimeoutError:
            pass  # the other end does not read: it will fall silent
        except OSError:
            self.closed = True

    def receive(self, wait: float) -> list[dict[str, Any]]:
        """What has come; waits so long for the first of it."""
        try:
            self.connection.settimeout(wait)
            data = self.connection.recv(1 << 16)
        except TimeoutError:
            self.silent += 1
            return []
        except OSError:
            data = b""
        if not data:
            self.closed = True
            return []
        self.silent = 0
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        try:
            return [dict(json.loads(line)) for line in lines]
        except (ValueError, TypeError):
            self.closed = True  # somebody else who tries all ports
            return []


class _Hub:
    """In rank 0: hears all ranks (its own too), and tells all the first cause."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.token = secrets.token_hex(16)
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, backlog=4096, dualstack_ipv6=dual)
        self.port = self._listener.getsockname()[1]
        self._peers: list[_Peer] = []
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._beats = 0
        self._beats_since_done = 0
        self._echo: str | None = None
        self._beats_since_echo = 0

    def serve(self) -> None:
        next_beat = time.monotonic() + BEAT
        while True:
            cause = self._hear(max(0.0, next_beat - time.monotonic()))
            if cause is None and time.monotonic() >= next_beat:
                next_beat = time.monotonic() + BEAT
                cause = self._beat()
            if cause is not None:
                self._tell_all(cause)
                return
            ranks = self._ranks()
            if len(ranks) == self.world_size and all(peer.exit_code is not None for peer in ranks.values()):
                ranks[0].send({"bye": True})
                return

    def _ranks(self) -> dict[int, _Peer]:
        return {peer.rank: peer for peer in self._peers if peer.rank is not None}

    def _tell_all(self, cause: str) -> None:
        """Also those who are still to come: they would wait for a rank 0 that is gone."""
        told = {0}
        end = time.monotonic() + LATE_ARRIVAL
        while True:
            for rank, peer in self._ranks().items():
                if rank not in told:
                    peer.send({"cause": cause})
                    told.add(rank)
            if (len(told) == self.world_size and 0 in self._ranks()) or time.monotonic() > end:
                break
            self._hear(BEAT)
        # Its end is that of the hub.
        self._ranks()[0].send({"cause": cause})

    def _hear(self, wait: float) -> str | None:
        for key, _ in self._selector.select(wait):
            if key.fileobj is self._listener:
                connection, _ = self._listener.accept()
                peer = _Peer(connection)
                self._peers.append(peer)
                self._selector.register(connection, selectors.EVENT_READ, peer)
                continue
            peer: _Peer = key.data
            for message in peer.receive(BEAT):
                if peer.rank is None:
                    if message.get("token") != self.token:
                        peer.closed = True  # no process of this run
                        break
                    if message["rank"] in self._ranks():
                        # Of a second run that was given the same port.
                        peer.send(
                            {"cause": f"another run has the port {os.environ['MASTER_PORT']}; {OTHER_PORT}"}
                        )
                        peer.closed = True
                        break
                    peer.rank, peer.name = message["rank"], message["name"]
                if message.get("echo"):
                    self._echo = self._echo or message["cause"]
                elif "cause" in message:
                    return message["cause"]
                if "done" in message:
                    peer.exit_code = message["done"]
            if peer.closed:
                self._selector.unregister(peer.connection)
                peer.connection.close()
                if peer.rank is None:
                    self._peers.remove(peer)
                elif peer.exit_code is None:
                    return f"{peer.name} is gone: it was killed or crashed"
        return None

    def _beat(self) -> str | None:
        """Once in BEAT seconds: shows that the hub lives, and looks for who does not."""
        self._beats += 1
        ranks = self._ranks().values()
        running = [peer for peer in ranks if peer.exit_code is None]
        for peer in running:
            peer.send({})
            peer.silent += 1
            if peer.silent > SILENCE:
                return f"{peer.name} has not answered for {SILENCE} s: it is stopped, or its host is lost"
        if len(ranks) < self.world_size and self._beats > ARRIVAL:
            late = sorted(set(range(self.world_size)) - {peer.rank for peer in ranks})
            return f"of {self.world_size} processes, ranks {late} have not come in {ARRIVAL} s"
        if len(running) < len(ranks):
            self._beats_since_done += 1
            if self._beats_since_done > SILENCE:
                first = next(peer for peer in ranks if peer.exit_code is not None)
                return f"{first.name} ended with exit code {first.exit_code}, and the others went on"
        if self._echo is not None:
            self._beats_since_echo += 1
            if self._beats_since_echo > ECHO:
                return self._echo
        return None
