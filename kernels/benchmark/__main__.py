"""The kernels side by side with their peers.

    python -m kernels.benchmark [--device cuda] [--operations dispatch combine] [--sizes quick]
                                [--eager] [--out DIR] [--rounds 20] [--minutes 10]

Every operation of kernels/ against torch's index operations, eager and compiled, torch.clone, DeepSpeed,
Liger, cut-cross-entropy and MegaBlocks, those of them that are installed: forward, backward and both, peak
memory, share of the roofline. Results of a peer are compared with ours before it is timed. bf16 on a GPU,
fp32 on a CPU. DIR gets kernels.md and kernels.json after each shape, kernels.png at the end; exit code 1
where a peer computes something else, 2 where a word of the command is wrong.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from kernels.backend import HAS_TRITON
from kernels.benchmark import feed_forward, losses, report, routing, rows
from kernels.benchmark.case import OPERATIONS, Case, cases
from kernels.benchmark.cost import measured, published
from kernels.benchmark.measure import Row, run_case
from kernels.benchmark.peer import Peer


@dataclass(frozen=True)
class Operation:
    inputs: Callable[[Case, torch.device, torch.dtype], Any]
    peers: tuple[Peer, ...]


BY_NAME = {
    "routing": Operation(routing.inputs, routing.ROUTING),
    "dispatch": Operation(rows.rows, rows.DISPATCH),
    "combine": Operation(rows.rows, rows.COMBINE),
    "combine_residual": Operation(rows.rows, rows.COMBINE_RESIDUAL),
    "dispatch_feed_forward": Operation(feed_forward.tokens, feed_forward.DISPATCH_FEED_FORWARD),
    "expert_feed_forward": Operation(feed_forward.inputs, feed_forward.EXPERT_FEED_FORWARD),
    "masked_text_loss": Operation(losses.words, losses.MASKED_TEXT_LOSS),
    "masked_pixel_loss": Operation(losses.pixels, losses.MASKED_PIXEL_LOSS),
}


def measure(case: Case, device: torch.device, dtype: torch.dtype, rounds: int) -> list[Row]:
    """The rows of one case; one row with a reason where not even its inputs can be made."""
    operation = BY_NAME[case.operation]
    torch.compiler.reset()  # else shapes of the cases before count against its limit
    try:
        inputs = operation.inputs(case, device, dtype)
    except torch.OutOfMemoryError:
        return [Row(case, "inputs", reason="out of memory")]
    return run_case(case, operation.peers, inputs, device, dtype, rounds)


def versions() -> str:
    found = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    if HAS_TRITON:
        import triton

        found.append(f"triton {triton.__version__}")
    return ", ".join(found)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--operations", nargs="+", default=OPERATIONS, choices=OPERATIONS)
    parser.add_argument("--sizes", choices=("quick", "full"), default="quick")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--eager", action="store_true", help="leave out what torch.compile makes of peers")
    parser.add_argument("--rounds", type=int, help="20 on a GPU, 5 on a CPU")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no shape after that")
    options = parser.parse_args(argv)
    try:
        device = torch.device(options.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        print(f"error: --device {options.device}: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    if device.type not in ("cuda", "cpu"):
        print(f"error: --device is {options.device!r}, expected cuda or cpu", file=sys.stderr)
        return 2
    if options.rounds is not None and options.rounds < 1:
        print(f"error: --rounds is {options.rounds}, expected at least 1", file=sys.stderr)
        return 2
    if not options.minutes > 0:
        print(f"error: --minutes is {options.minutes:g}, expected more than 0", file=sys.stderr)
        return 2
    cuda = device.type == "cuda"
    rounds, dtype = options.rounds or (20 if cuda else 5), torch.bfloat16 if cuda else torch.float32
    end = time.monotonic() + 60 * options.minutes
    name = torch.cuda.get_device_name(device) if cuda else f"{platform.processor() or platform.machine()} CPU"
    machine = report.Machine(
        device=name if cuda else f"{name}, {torch.get_num_threads()} threads",
        versions=versions(),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        command=" ".join(["python -m kernels.benchmark", *(sys.argv[1:] if argv is None else argv)]),
        dtype=dtype,
        measured=measured(device, dtype),
        published=published(device),
    )
    print("\n".join(report.machine_lines(machine)), flush=True)
    results: list[list[Row]] = []
    left_out: list[str] = []
    grid = cases(options.operations, options.sizes, cuda)
    for number, case in enumerate(grid):
        # After each shape: whoever stops this process in the midst of one finds those before it.
        left_out = [f"{each.operation}: {each.describe()}" for each in grid[number:]]
        if options.out is not None:
            report.write(results, machine, left_out, options.out)
        if time.monotonic() > end:
            break
        case = replace(case, compiled=case.compiled and not options.eager)
        results.append(measure(case, device, dtype, rounds))
        left_out = left_out[1:]
        print(f"\n{case.operation}: {case.describe()}\n")
        print("\n".join(report.case_table(results[-1], machine)), flush=True)
    if left_out:
        print(f"\n{len(left_out)} shapes not measured: --minutes {options.minutes:g} had passed")
    if options.out is not None:
        report.write(results, machine, left_out, options.out)
        try:
            report.plot(results, options.out / "kernels.png")
        except ImportError:
            print("no kernels.png: matplotlib is not installed", file=sys.stderr)
    wrong = [row for rows in results for row in rows if (row.reason or "").startswith("WRONG")]
    timed = sum(row.reason is None for rows in results for row in rows)
    print(
        f"\nshapes: {len(results)}, measurements: {timed}, of peers that compute something else: {len(wrong)}"
    )
    for row in wrong:
        print(f"{row.case.operation}, {row.peer}: {row.reason}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
