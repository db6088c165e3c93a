"""The topology-free directory: what eve/training/export.py writes, and the state of training beside it.

model.safetensors  recipe.yaml  tokenizer.model  metadata.json     a released model
exp_avg.safetensors  exp_avg_sq.safetensors                        the moments of what learns
state.json         data cursors and counters of the run, order of the parameters, updates of each
metrics.jsonl      what the run had logged
checksums.json     sha256 of the bytes of each tensor, by file
complete.json      all files with their sizes
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import eve
from eve.config import load_recipe
from eve.conversion.checkpoint import MOMENTS, Checkpoint, Kind, Parameter, Run
from eve.conversion.deepspeed_reader import check_complete
from eve.errors import UserError
from eve.training.checkpoint import MARKER
from eve.training.export import WEIGHTS

STATE = "state.json"
METRICS = "metrics.jsonl"
CHECKSUMS = "checksums.json"
FILES: dict[Kind, str] = {
    "weight": WEIGHTS,
    "exp_avg": "exp_avg.safetensors",
    "exp_avg_sq": "exp_avg_sq.safetensors",
}


class OpenDirectory(Checkpoint):
    def __init__(self, directory: Path) -> None:
        self.where = directory
        if not (directory / WEIGHTS).is_file():
            raise UserError(f"{directory} is not an exported model: it has no {WEIGHTS}")
        for name in ("recipe.yaml", "tokenizer.model", "metadata.json"):
            if not (directory / name).is_file():
                raise UserError(f"{directory / name} is missing")
        if (directory / MARKER).is_file():
            check_complete(directory)
        self.recipe = load_recipe(str(directory / "recipe.yaml"))
        self.tokenizer = (directory / "tokenizer.model").read_bytes()
        self.step = _json(directory / "metadata.json").get("step", 0)
        self._checksums = _json(directory / CHECKSUMS) if (directory / CHECKSUMS).is_file() else {}
        self._files = {"weight": _opened(directory / WEIGHTS)}
        shapes = _shapes(self._files["weight"])
        if not (directory / STATE).is_file():
            self.run = None
            self.parameters = tuple(Parameter(name, shape, 0) for name, shape in shapes.items())
            return
        state = _json(directory / STATE)
        metrics = directory / METRICS
        self.run = Run(state["run"], state["counters"], metrics.read_bytes() if metrics.is_file() else b"")
        steps: dict[str, int | None] = state["steps"]
        _compare(shapes, steps, directory / WEIGHTS)
        self.parameters = tuple(Parameter(name, shapes[name], step) for name, step in steps.items())
        learning = {parameter.name: parameter.shape for parameter in self.parameters if parameter.learns}
        for kind in MOMENTS:
            path = directory / FILES[kind]
            self._files[kind] = _opened(path)
            found = _shapes(self._files[kind])
            _compare(found, learning, path)
            for name, shape in found.items():
                if shape != learning[name]:
                    raise UserError(f"{path}: {name} is {shape}, expected {learning[name]}")

    def read(self, name: str, kind: Kind) -> Tensor:
        """Raises UserError where the bytes are not those that were written."""
        tensor = self._files[kind].get_tensor(name)
        expected = self._checksums.get(FILES[kind], {}).get(name)
        if expected is not None and checksum(tensor) != expected:
            raise UserError(f"{self.where / FILES[kind]}: the checksum of {name} is not that of {CHECKSUMS}")
        return tensor.to(torch.float32)


def write_open(
    source: Checkpoint, directory: Path, *, training_state: bool, progress: Callable[[], None]
) -> None:
    """Writes into a directory that is there and empty. Raises UserError where the state is not there."""
    if training_state and source.run is None:
        raise UserError(f"{source.where} has no training state; convert it without --training-state")
    kinds: tuple[Kind, ...] = ("weight", *MOMENTS) if training_state else ("weight",)
    sums: dict[str, dict[str, str]] = {}
    for kind in kinds:
        chosen = [p for p in source.parameters if kind == "weight" or p.learns]
        with open(directory / FILES[kind], "wb") as file:
            sums[FILES[kind]] = write_safetensors(
                file, chosen, lambda name, k=kind: source.read(name, k), progress
            )
    (directory / "recipe.yaml").write_text(source.recipe.to_yaml())
    (directory / "tokenizer.model").write_bytes(source.tokenizer)
    count = sum(torch.Size(parameter.shape).numel() for parameter in source.parameters)
    about = {"format": 1, "eve": eve.__version__, "parameters": count, "step": source.step}
    (directory / "metadata.json").write_text(json.dumps(about, indent=1) + "\n")
    (directory / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n")
    if training_state and source.run:
        steps = {parameter.name: parameter.step for parameter in source.parameters}
        state = {"run": source.run.state, "counters": source.run.counters, "steps": steps}
        (directory / STATE).write_text(json.dumps(state))
        if source.run.metrics:
            (directory / METRICS).write_bytes(source.run.metrics)


def write_safetensors(
    file: BinaryIO,
    parameters: Iterable[Parameter],
    read: Callable[[str], Tensor],
    progress: Callable[[], None],
) -> dict[str, str]:
    """Writes fp32 tensors one after another, as safetensors.torch.save_file writes them all at once.

    Returns their checksums. The format: length of the header, header (JSON), data in the order of names.
    """
    ordered = sorted(parameters, key=lambda parameter: parameter.name)
    header, end = {}, 0
    for parameter in ordered:
        begin, end = end, end + 4 * torch.Size(parameter.shape).numel()
        header[parameter.name] = {
            "dtype": "F32",
            "shape": list(parameter.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    sums = {}
    for parameter in ordered:
        tensor = read(parameter.name)
        assert tensor.shape == parameter.shape, parameter.name
        file.write(_bytes(tensor))
        sums[parameter.name] = checksum(tensor)
        progress()
    return sums


def checksum(tensor: Tensor) -> str:
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _shapes(file: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _compare(found: Iterable[str], expected: Iterable[str], path: Path) -> None:
    theirs, ours = set(found), set(expected)
    for name in sorted(theirs ^ ours):
        raise UserError(f"{path} {'has no' if name in ours else 'has the unknown name'} {name}")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
