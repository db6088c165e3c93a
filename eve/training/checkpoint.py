"""Checkpoints that a crash at any instant cannot take away.

    checkpoints/
      step-00001000/
        engine/            what DeepSpeed writes: weights, optimizer, its counters
        state.json         step, data cursors, metrics under way (TrainState of loop.py)
        recipe.yaml  tokenizer.model
        complete.json      the list of all files with their sizes; written last
      writing-00002000/    under way, or left over from a crash

A checkpoint is written under another name, brought to the disk, and gets its name by one rename. Older
ones go only after that. Ranks share the file system, as for any DeepSpeed checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from eve.errors import UserError
from eve.parallel.topology import Topology

MARKER = "complete.json"
# How torch.save reports that the disk did not take what it wrote.
WRITE_FAILED = "PytorchStreamWriter|inline_container|iostream error"


class CheckpointStore:
    def __init__(self, directory: Path, topology: Topology, keep: int) -> None:
        self.directory = directory
        self.topology = topology
        self.keep = keep

    def completed(self) -> list[Path]:
        """The whole checkpoints, oldest first."""
        found = self.directory.glob("step-*") if self.directory.is_dir() else []
        return sorted(path for path in found if is_complete(path))

    def latest(self) -> Path | None:
        return next(iter(reversed(self.completed())), None)

    def clean(self) -> None:
        """Removes what a crash has left half written. One rank calls it, before any checkpoint is saved."""
        if self.directory.is_dir():
            for path in self.directory.iterdir():
                if re.fullmatch(r"(writing|deleting|step)-\d+", path.name) and not (
                    path.name.startswith("step-") and is_complete(path)
                ):
                    shutil.rmtree(path)

    def save(
        self, step: int, write_rank: Callable[[Path], None], write_shared: Callable[[Path], None]
    ) -> Path:
        """All ranks call it, once a step. `write_rank(directory)` runs on all, `write_shared` on rank 0.

        Raises UserError on all ranks where the disk refuses; the checkpoints before it stay.
        """
        target = self.directory / f"step-{step:08d}"
        temporary = self.directory / f"writing-{step:08d}"
        latest = self.latest()
        need = directory_size(latest) if latest else 0
        self._on_rank_0(lambda: self._prepare(temporary, need))
        self.topology.raise_together(_user_error(lambda: write_rank(temporary), temporary))

        def complete() -> None:
            write_shared(temporary)
            seal(temporary)
            temporary.rename(target)
            fsync_directory(self.directory)
            for path in self.completed()[: -self.keep]:
                retired = path.with_name(path.name.replace("step", "deleting"))
                path.rename(retired)
                shutil.rmtree(retired)

        self._on_rank_0(complete, leftover=temporary)
        return target

    def _prepare(self, temporary: Path, need: int) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.directory).free
        if free < need:
            raise UserError(
                f"no space left for a checkpoint in {self.directory}: {need / 2**30:.2f} GiB needed, "
                f"{free / 2**30:.2f} GiB free; the last complete one is kept"
            )
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()

    def _on_rank_0(self, action: Callable[[], None], leftover: Path | None = None) -> None:
        error = _user_error(action, leftover) if self.topology.rank == 0 else None
        self.topology.raise_together(error)


def _user_error(action: Callable[[], None], leftover: Path | None) -> UserError | None:
    """Runs it; what the disk refuses is the user's to mend, and the half-written files are removed."""
    try:
        action()
    except UserError as error:
        return error
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search(WRITE_FAILED, str(error)):
            raise
        reason = error.strerror if isinstance(error, OSError) else "the disk is full or not writable"
        where = leftover.parent if leftover else "the run directory"
        if leftover:
            shutil.rmtree(leftover, ignore_errors=True)
        return UserError(
            f"the checkpoint cannot be written to {where}: {reason}; the last complete one is kept"
        )
    return None


def seal(directory: Path) -> None:
    """Brings every file to the disk and writes the marker."""
    sizes = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
            sizes[str(path.relative_to(directory))] = path.stat().st_size
        else:
            fsync_directory(path)
    with open(directory / MARKER, "w") as file:
        json.dump({"version": 1, "files": sizes}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    fsync_directory(directory)


def is_complete(directory: Path) -> bool:
    """The marker is there and every file it lists has its size."""
    try:
        files = json.loads((directory / MARKER).read_text())["files"]
        return all((directory / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def directory_size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
