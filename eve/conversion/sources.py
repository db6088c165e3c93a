"""The formats that a conversion can start from: one entry each, tried in this order.

Those of other projects are files; eve/conversion/foreign/formats.py has their table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from eve.conversion.checkpoint import Checkpoint
from eve.conversion.deepspeed_reader import DeepSpeedCheckpoint
from eve.conversion.foreign.checkpoint import ForeignCheckpoint, ForeignOptions
from eve.conversion.foreign.formats import FORMATS as FOREIGN
from eve.conversion.open_directory import OpenDirectory
from eve.errors import UserError
from eve.training.checkpoint import is_complete
from eve.training.export import WEIGHTS


@dataclass(frozen=True)
class Format:
    """`matches`: whether a path looks like one; `looks` says how, for the error."""

    looks: str
    matches: Callable[[Path], bool]
    open: Callable[[Path], Checkpoint]


def _latest_of_run(directory: Path) -> Path:
    steps = sorted((directory / "checkpoints").glob("step-*"))
    complete = [path for path in steps if is_complete(path)]
    if not complete:
        raise UserError(f"{directory} has no complete checkpoint in {directory / 'checkpoints'}")
    return complete[-1]


FORMATS = {
    "deepspeed": Format(
        "a step directory (RUN/checkpoints/step-N)",
        lambda path: (path / "engine").is_dir(),
        DeepSpeedCheckpoint,
    ),
    "run": Format(
        "a run directory (its last complete checkpoint)",
        lambda path: (path / "checkpoints").is_dir(),
        lambda path: DeepSpeedCheckpoint(_latest_of_run(path)),
    ),
    "safetensors": Format(
        f"a directory with {WEIGHTS}",
        lambda path: (path / WEIGHTS).is_file(),
        OpenDirectory,
    ),
}


def open_source(path: Path, name: str | None = None, foreign: ForeignOptions | None = None) -> Checkpoint:
    """The checkpoint at a path, of the named format or of the first of ours that matches.

    Raises UserError."""
    if name in FOREIGN:
        return ForeignCheckpoint(path, name, foreign or ForeignOptions())
    if path.is_file():
        raise UserError(f"{path} is a file; say --from {'|'.join(FOREIGN)} for weights of another project")
    if not path.is_dir():
        raise UserError(f"{path} is not a directory")
    if name is not None:
        return FORMATS[name].open(path)
    for candidate in FORMATS.values():
        if candidate.matches(path):
            return candidate.open(path)
    looks = " nor ".join(candidate.looks for candidate in FORMATS.values())
    raise UserError(f"{path} is neither {looks}")
