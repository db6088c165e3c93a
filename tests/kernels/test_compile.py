"""Every kernel compiles for the GPUs we run on, on a machine that has none, without a spill.

A kernel is found by the list COMPILE_CASES of its module. What each uses is printed at the session's end.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
from pathlib import Path

import pytest

import kernels
from kernels.backend import HAS_TRITON, INTERPRETED, CompileCase

CASES: list[CompileCase] = [
    case
    for module in pkgutil.iter_modules(kernels.__path__)
    for case in getattr(importlib.import_module(f"kernels.{module.name}"), "COMPILE_CASES", [])
]

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="needs triton (pip install triton==3.7.1)"),
    pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing"),
]


def compiled(case: CompileCase, capability: int):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    assert set(names) == {*case.types, *case.constants}, case.name
    signature = {name: case.types.get(name, "constexpr") for name in names}
    multiples = [name for name, kind in case.types.items() if kind.startswith("*") or name in case.aligned]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in multiples}
    source = ASTSource(case.kernel, signature, dict(case.constants), attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(cubin: bytes, directory: Path) -> dict[str, int]:
    """Registers of a thread, and its bytes on the stack: where values go that registers do not hold."""
    from triton import knobs

    file = directory / "kernel.cubin"
    file.write_bytes(cubin)
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(number) for key, number in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}


def widest_access(ptx: str) -> int:
    """Bytes of the widest access to global memory by one thread."""
    found = re.findall(r"(?:ld|st)\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx)
    return max((int(count or 1) * int(bits) // 8 for count, bits in found), default=0)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
def test_compiles_without_spills(case, capability, tmp_path, record_property):
    kernel = compiled(case, capability)
    used = resources(kernel.asm["cubin"], tmp_path)
    widest = widest_access(kernel.asm["ptx"])
    spilled = used["STACK"] + used["LOCAL"]
    record_property(
        "resources",
        f"sm_{capability} {case.name:<40} {case.num_warps:2d} warps {used['REG']:4d} registers "
        f"{spilled:4d} B spilled {kernel.metadata.shared:6d} B shared {widest:3d} B accesses",
    )
    assert used["STACK"] == 0
    assert used["LOCAL"] == 0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
def test_offsets_into_tensors_are_64_bits_wide(case):
    """A tile's pointer is base + offset; an offset of 32 bits would wrap past 2^31 elements."""
    text = compiled(case, 90).asm["ttir"]
    kinds = re.findall(r"tt\.addptr .* : tensor<[^>]*!tt\.ptr<\w+>>, tensor<(?:\d+x)*(i\d+)>", text)
    assert kinds
    assert not re.findall(r"arith\.muli .* : (?:tensor<(?:\d+x)*)?i32", text)
