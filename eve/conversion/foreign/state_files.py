"""The files that official states come in: safetensors, or what torch.save wrote.

Reading a pickle runs none of its code: objects that are no tensors, such as a training script's options, are
read as empty ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from eve.errors import UserError

# Under which of these a training script keeps the weights, the first that is there.
NESTS = ("state_dict", "module", "model")
# What DistributedDataParallel puts before all names.
WRAPPED = "module."


class _Unread:
    """Stands for an object of a class that we do not have."""

    def __init__(self, *values: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_state(path: Path) -> dict[str, Tensor]:
    """Weights by name. Raises UserError where the file cannot be read or holds none."""
    if not path.is_file():
        raise UserError(f"{path} is {'a directory, not a file' if path.is_dir() else 'missing'}")
    tree: Any = _read(path)
    while isinstance(tree, Mapping) and (nest := next((n for n in NESTS if _is_nest(tree, n)), None)):
        tree = tree[nest]
    if not isinstance(tree, Mapping) or not any(isinstance(value, Tensor) for value in tree.values()):
        raise UserError(f"{path} holds no weights by name, nor has it them under {', '.join(NESTS)}")
    for name, value in tree.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{path}: {name} is no tensor but {type(value).__name__}")
    cut = len(WRAPPED) if all(name.startswith(WRAPPED) for name in tree) else 0
    return {name[cut:]: value for name, value in tree.items()}


def write_state(path: Path, state: dict[str, Tensor]) -> None:
    """As safetensors where the name ends so, else as torch.save of a flat dictionary. Raises UserError."""
    if path.exists():
        raise UserError(f"{path} exists; give a path that does not")
    temporary = path.with_name(f".{path.name}.writing")
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_file(state, temporary)
        else:
            torch.save(state, temporary)
        temporary.rename(path)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{path} cannot be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _is_nest(tree: Mapping[str, Any], name: str) -> bool:
    return isinstance(tree.get(name), Mapping) and len(tree[name]) > 0


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        try:
            unknown = get_unsafe_globals_in_checkpoint(path)
        except ValueError:
            # Written before PyTorch 1.6: no zip, and cannot be mapped.
            with safe_globals([(_Unread, "argparse.Namespace")]):
                return torch.load(path, map_location="cpu", weights_only=True)
        with safe_globals([(_Unread, name) for name in unknown]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        # What a damaged file raises may be of any type.
        reason = " ".join(str(error).split()).rpartition("WeightsUnpickler error: ")[2]
        raise UserError(f"{path} cannot be read: {reason[:200]}") from None
