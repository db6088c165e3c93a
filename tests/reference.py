"""Reference numbers of the official codes: the folder of EVE_FIXTURES, whose README explains its files."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(os.environ.get("EVE_FIXTURES") or Path(__file__).parents[2] / "shared" / "fixtures")


def files(item: str) -> pytest.MarkDecorator:
    """A case for each file of that item; one that skips and says why where there is none."""
    found = sorted(FOLDER.glob(f"{item}*.json"))
    skip = pytest.mark.skip(reason=f"no {item}*.json in {FOLDER}: set EVE_FIXTURES")
    cases = [pytest.param(path, id=path.stem) for path in found] or [pytest.param(None, marks=skip)]
    return pytest.mark.parametrize("path", cases)


class Reference:
    """Inputs and outputs of a file, and which outputs have been compared."""

    def __init__(self, path: Path):
        self.about = json.loads(path.read_text())
        self.hyper = self.about["hyper"]
        tensors = load_file(path.with_suffix(".safetensors"))
        self.input = {name[6:]: value for name, value in tensors.items() if name.startswith("input.")}
        self.output = {name[7:]: value for name, value in tensors.items() if name.startswith("output.")}
        self.compared: set[str] = set()

    def equal(self, name: str, got: Tensor) -> None:
        """Integers and booleans exactly, floats to `suggested_atol` or, where there is none, to what fp32
        leaves of a number of that size."""
        expected = self.output[name]
        self.compared.add(name)
        assert got.shape == expected.shape, name
        if not expected.is_floating_point():
            assert torch.equal(got.to(expected.dtype), expected), name
            return
        size = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        atol = self.about["outputs"][name].get("suggested_atol", 5e-6 * size)
        difference = float((got.detach().double() - expected.double()).abs().max()) if got.numel() else 0.0
        assert difference <= atol, f"{name} differs by {difference:.2e}, allowed {atol:.2e}"

    def cases(self, pattern: str) -> list[re.Match[str]]:
        """Matches of the pattern among the names of the outputs."""
        return [match for name in self.output if (match := re.fullmatch(pattern, name))]

    def done(self) -> None:
        assert set(self.output) == self.compared, set(self.output) - self.compared
