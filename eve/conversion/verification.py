"""Whether two checkpoints hold the same tensors, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

from eve.conversion.checkpoint import MOMENTS, Checkpoint, Kind
from eve.conversion.open_directory import checksum
from eve.parallel.sharding import EXPERT, placement


def differences(
    source: Checkpoint, result: Checkpoint, *, training_state: bool, progress: Callable[[], None]
) -> list[str]:
    """One sentence for each tensor that is not the same in both: missing, of another shape (number of
    elements, of experts), or of another checksum. Both are read from the disk, a tensor at a time."""
    theirs = {parameter.name: parameter for parameter in source.parameters}
    ours = {parameter.name: parameter for parameter in result.parameters}
    found = [
        f"{name} is in {(source if name in theirs else result).where} only"
        for name in sorted(theirs.keys() ^ ours.keys())
    ]
    for name in (name for name in theirs if name in ours):
        one, other = theirs[name], ours[name]
        if one.shape != other.shape:
            experts = placement(name, theirs) == EXPERT and one.shape[0] != other.shape[0]
            before, after = (one.shape[0], other.shape[0]) if experts else (one.shape, other.shape)
            found.append(f"{name} has {before}{' experts' if experts else ''}, then {after}")
            continue
        kinds: tuple[Kind, ...] = ("weight",)
        if training_state:
            if one.step != other.step:
                found.append(f"{name} had {one.step} updates, then {other.step}")
            kinds = ("weight", *MOMENTS) if one.learns and other.learns else kinds
        for checkpoint in (source, result):
            if not checkpoint.copies_agree(name, checkpoint.read(name, "weight")):
                found.append(f"{checkpoint.where} has weights of {name} that are not the optimizer's")
        for kind in kinds:
            if checksum(source.read(name, kind)) != checksum(result.read(name, kind)):
                found.append(f"{kind} of {name} has another checksum")
            progress()
    return found
