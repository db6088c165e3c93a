"""Worker processes of the loader: each makes its part of every step ahead of time.

Processes come from a fork server, which is started once, imports torch once, and has no other threads:
forking the training process itself, with its gloo, CUDA and autograd threads, can deadlock, and spawning
pays the import in every worker.

Parent and worker are joined by a socket. The parent asks for a step by one empty message and keeps
`PREFETCH` of them open; the worker answers each with a pickled header, then the bytes of the images, which go
straight from and into uint8 arrays (shared memory would save one copy, but container engines give
/dev/shm 64 MB). A thread per worker takes in the answers. Whoever dies closes the socket, and the other
side notices.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import queue
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch

from eve.data.batch import Sample
from eve.errors import UserError

# Steps that a worker may be ahead.
PREFETCH = 3


class Share(Protocol):
    """A part of every step."""

    def step(self) -> tuple[list[Sample], dict[str, Any]]:
        """(samples, state after them)."""
        ...


@dataclass(frozen=True)
class _Failure:
    """What ended a worker."""

    user_error: bool
    text: str


class Workers:
    """One process for each share; `step` gives (samples, state) of all of them, in their order."""

    def __init__(self, make_shares: Sequence[Callable[[], Share]]) -> None:
        """`make_shares` are picklable; each is called in its own process."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, "eve.data.loader"])
        self._sockets: list[Connection] = []
        self._processes: list[Any] = []
        self._threads: list[threading.Thread] = []
        self._answers: list[queue.SimpleQueue[Any]] = []
        # multiprocessing joins its children at exit; these end when their socket is closed.
        atexit.register(self.close)
        with _no_main_module():
            for make_share in make_shares:
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, make_share), daemon=True)
                process.start()
                theirs.close()
                answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
                thread = threading.Thread(target=_take_in, args=(ours, answers), daemon=True)
                thread.start()
                self._sockets.append(ours)
                self._processes.append(process)
                self._answers.append(answers)
                self._threads.append(thread)
                for _ in range(PREFETCH):
                    self._ask(ours)

    def step(self) -> list[tuple[list[Sample], dict[str, Any]]]:
        """Raises UserError as the worker did; RuntimeError where it failed otherwise or is gone."""
        parts = []
        for ours, answers, process in zip(self._sockets, self._answers, self._processes, strict=True):
            part = answers.get()
            if part is None:
                process.join(timeout=5)
                raise RuntimeError(f"a data worker ended with exit code {process.exitcode}")
            if isinstance(part, _Failure):
                raise UserError(part.text) if part.user_error else RuntimeError(f"data worker:\n{part.text}")
            self._ask(ours)
            parts.append(part)
        return parts

    @staticmethod
    def _ask(ours: Connection) -> None:
        # A worker that is gone is found when its answer is missed.
        with suppress(OSError):
            ours.send_bytes(b"")

    def close(self) -> None:
        """Ends the processes; what they have made ahead is dropped."""
        atexit.unregister(self.close)
        for ours in self._sockets:
            # Closing alone would wake neither our thread nor the worker.
            with suppress(OSError), socket.socket(fileno=os.dup(ours.fileno())) as handle:
                handle.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for ours in self._sockets:
            ours.close()
        for process in self._processes:
            process.join(timeout=10)
            if process.exitcode is None:
                process.kill()
                process.join()
            process.close()
        self._sockets, self._processes, self._threads, self._answers = [], [], [], []


@contextmanager
def _no_main_module() -> Iterator[None]:
    """multiprocessing imports the main module again in every child: for an entry point that is DeepSpeed,
    seven seconds of imports that a data worker has no use for."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


# --- in the parent's threads ------------------------------------------------------------------------------


def _take_in(ours: Connection, answers: queue.SimpleQueue[Any]) -> None:
    """Receives until the socket is closed; None is last."""
    with suppress(OSError, EOFError):
        while True:
            answer = pickle.loads(ours.recv_bytes())
            if not isinstance(answer, _Failure):
                samples, shape, state = answer
                if shape is not None:
                    images = np.empty(shape, dtype=np.uint8)
                    _receive_into(ours.fileno(), images)
                    samples = [
                        replace(sample, image_CHW=image)
                        for sample, image in zip(samples, images, strict=True)
                    ]
                answer = (samples, state)
            answers.put(answer)
    answers.put(None)


def _receive_into(file: int, array: np.ndarray) -> None:
    view = array.data.cast("B")
    while view:
        count = os.readv(file, [view])
        if not count:
            raise EOFError
        view = view[count:]


# --- in the worker ----------------------------------------------------------------------------------------


def _work(theirs: Connection, make_share: Callable[[], Share]) -> None:
    # Ctrl-C and a scheduler's SIGTERM go to the whole process group; the parent decides when to end, and
    # wants its data until then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    try:
        share = make_share()
        while True:
            theirs.recv_bytes()
            samples, state = share.step()
            _send(theirs, samples, state)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except UserError as error:
        failure = _Failure(user_error=True, text=str(error))
    except Exception:
        failure = _Failure(user_error=False, text=traceback.format_exc())
    with suppress(OSError):
        theirs.send_bytes(pickle.dumps(failure))


def _send(theirs: Connection, samples: list[Sample], state: dict[str, Any]) -> None:
    """Header, then each image's bytes: all images of a source are of one size."""
    images = [sample.image_CHW for sample in samples if sample.image_CHW is not None]
    shape = (len(images), *images[0].shape) if images else None
    bare = [replace(sample, image_CHW=None) for sample in samples]
    theirs.send_bytes(pickle.dumps((bare, shape, state), protocol=5))
    for image in images:
        view = image.data.cast("B")
        while view:
            view = view[os.write(theirs.fileno(), view) :]
