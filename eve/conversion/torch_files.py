"""The files that torch.save wrote, through memory maps: what is not touched costs no memory.

Reading runs no code of the file: of DeepSpeed's own objects, which no conversion needs, nothing is made.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import safe_globals, set_default_mmap_options, skip_data

from eve.conversion.layout import Slot
from eve.errors import UserError


class _Unread:
    """Stands for an object of DeepSpeed in a file."""

    def __init__(self, *values: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_UNREAD: list[Any] = [
    (_Unread, name)
    for name in (
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
    )
]


def load(path: Path, *, shared: bool = False) -> Any:
    """The tree of a file, its tensors mapped; `shared`: what is put into them goes to the file.

    Raises UserError.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing")
    try:
        flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
        with safe_globals(_UNREAD), set_default_mmap_options(flags):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        # What a damaged file raises may be of any type.
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from None


def save(path: Path, tree: Any) -> list[tuple[Slot, Tensor]]:
    """Writes a file with room for every slot of the tree; returns each with its tensor there, still zero."""
    with FakeTensorMode():
        hollow = replace_slots(tree, lambda slot: torch.empty(slot.shape, dtype=slot.dtype))
        with skip_data(materialize_fake_tensors=True):
            torch.save(hollow, path)
    with open(path, "rb+") as file:
        # A full disk is an error here; later, through the map, it would be the end of the process.
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    slots = []
    for slot, tensor in pairs(tree, load(path, shared=True), str(path)):
        if slot.step is not None:
            tensor.fill_(slot.step)
        slots.append((slot, tensor))
    return slots


def replace_slots(tree: Any, make: Callable[[Slot], Any]) -> Any:
    if isinstance(tree, Slot):
        return make(tree)
    if isinstance(tree, dict):
        return type(tree)((key, replace_slots(value, make)) for key, value in tree.items())
    if isinstance(tree, list):
        return [replace_slots(value, make) for value in tree]
    return tree


def _shapes(slot: Slot) -> list[tuple[int, ...]]:
    return [slot.shape, (slot.shape[0] + slot.padding,)] if slot.padding else [slot.shape]


def pairs(tree: Any, loaded: Any, where: str) -> Iterator[tuple[Slot, Tensor]]:
    """Each slot of the tree with the tensor at its place in what was loaded.

    Raises UserError where there is none, or one of another size.
    """
    if isinstance(tree, Slot):
        if not isinstance(loaded, Tensor) or tuple(loaded.shape) not in _shapes(tree):
            found = tuple(loaded.shape) if isinstance(loaded, Tensor) else type(loaded).__name__
            raise UserError(f"{where} is {found}, expected a tensor {tree.shape}")
        yield tree, loaded
    elif isinstance(tree, dict):
        for key, value in tree.items():
            if not isinstance(loaded, dict) or key not in loaded:
                raise UserError(f"{where} has no {key}")
            yield from pairs(value, loaded[key], f"{where}: {key}")
    elif isinstance(tree, list) and any(isinstance(value, Slot | dict | list) for value in tree):
        if not isinstance(loaded, list) or len(loaded) != len(tree):
            raise UserError(f"{where} is not a list of {len(tree)}")
        for number, value in enumerate(tree):
            yield from pairs(value, loaded[number], f"{where}, {number}")
