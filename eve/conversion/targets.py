"""A result appears whole or not at all: it is written beside its place, brought to the disk, renamed."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from eve.conversion.checkpoint import Checkpoint
from eve.conversion.deepspeed_writer import write_deepspeed
from eve.conversion.layout import Layout
from eve.conversion.open_directory import METRICS, write_open
from eve.errors import UserError
from eve.training.checkpoint import fsync_directory, seal

_STEP = re.compile(r"step-(\d+)")


def convert_to_open(
    source: Checkpoint, target: Path, *, training_state: bool, progress: Callable[[], None]
) -> None:
    """Writes a topology-free directory. Raises UserError."""

    def write(directory: Path) -> None:
        write_open(source, directory, training_state=training_state, progress=progress)
        seal(directory)

    _write_aside(target, target.with_name(f".{target.name}.writing"), write)


def convert_to_deepspeed(
    source: Checkpoint, target: Path, layout: Layout, *, progress: Callable[[], None]
) -> None:
    """Writes a run directory, or a step directory of one (`RUN/checkpoints/step-N`). Raises UserError."""
    step = f"step-{source.step:08d}"

    def write_step(directory: Path) -> None:
        write_deepspeed(source, directory, layout, progress=progress)
        seal(directory)

    def write_run(directory: Path) -> None:
        inside = directory / "checkpoints" / step
        inside.mkdir(parents=True)
        write_step(inside)
        (directory / "recipe.yaml").write_text(layout.of(source.recipe).to_yaml())
        (directory / METRICS).write_bytes(source.run.metrics if source.run else b"")
        for path in (directory / "recipe.yaml", directory / METRICS):
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        fsync_directory(directory / "checkpoints")
        fsync_directory(directory)

    if _STEP.fullmatch(target.name) and target.parent.name == "checkpoints":
        if target.name != step:
            raise UserError(f"{source.where} is of step {source.step}, so {target} must be called {step}")
        # Under this name a run takes it for what a crash has left, and removes it.
        _write_aside(target, target.with_name(step.replace("step", "writing")), write_step)
    else:
        _write_aside(target, target.with_name(f".{target.name}.writing"), write_run)


def _write_aside(target: Path, temporary: Path, write: Callable[[Path], None]) -> None:
    if target.exists():
        raise UserError(f"{target} exists; give a path that does not")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        temporary.rename(target)
        fsync_directory(target.parent)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
