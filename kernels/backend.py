"""Where a kernel runs: the one place that chooses between Triton and plain PyTorch.

    CUDA tensor                     -> Triton
    CPU tensor                      -> the PyTorch definition
    CPU tensor, TRITON_INTERPRET=1  -> Triton's interpreter: for tests, hundreds of times slower
    no triton in this Python        -> the PyTorch definition

A kernel file imports `jit`, `tl` and `use_triton` from here and so can be imported without triton, which the
CPU build of torch does not bring. TRITON_INTERPRET is read by triton when it is imported: set it before.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None
# As triton itself reads TRITON_INTERPRET, which knows several spellings of yes.
INTERPRETED = HAS_TRITON and bool(importlib.import_module("triton").knobs.runtime.interpret)

if TYPE_CHECKING:
    import triton.language as tl  # pyright: ignore[reportMissingImports]
else:
    tl = importlib.import_module("triton.language") if HAS_TRITON else None


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`; without triton the function as it is, which nobody will launch."""
    return importlib.import_module("triton").jit(function) if HAS_TRITON else function


def use_triton(tensor: Tensor) -> bool:
    return HAS_TRITON and (tensor.is_cuda or INTERPRETED)


def check_interpreter(tensor: Tensor) -> None:
    """Before a kernel's tl.dot: the interpreter (triton 3.6, 3.7) multiplies the bits of bf16 as integers."""
    if INTERPRETED and tensor.dtype == torch.bfloat16:
        raise NotImplementedError("Triton's interpreter cannot multiply bf16; use fp16 or fp32 there.")


def rows_of(tensor: Tensor) -> Tensor:
    """The matrix with unit stride along a row, as the kernels read it; any distance between rows."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def power_of_2(size: int) -> int:
    """The smallest power of 2 that is not below `size`; 1 for 0."""
    return 1 << max(size - 1, 0).bit_length()


def divide_up(size: int, block: int) -> int:
    return -(-size // block)


@dataclass(frozen=True)
class CompileCase:
    """One specialisation of a kernel, for the test that compiles all of them without a GPU.

    A module lists its cases in `COMPILE_CASES`.

    Attributes:
        name: of the row in the report.
        kernel: the jitted function.
        types: Triton's type of each argument that is no constant, such as "*bf16" or "i64", in order.
        constants: the constexpr arguments; pointers that are None here too.
        aligned: integer arguments that are multiples of 16. All pointers are taken to be aligned.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] = field(default=())
