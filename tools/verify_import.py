"""Compares imported weights with what the official code computes with them.

    python tools/verify_import.py FIXTURE.safetensors [...]

A fixture holds a state in an official layout (`state.*`), inputs (`input.*`) and what the official code makes
of them (`output.*`); the json of the same name says the sizes (`hyper`) and how far each output may be off
(`suggested_atol`). The state is imported through the same table as in tools/convert_checkpoint.py, and one
line is printed for each output: its name, the largest difference, the allowed one, ok or MISSED.

Exit code 1: an output is missed or missing; 2: a mistake in the call, or a fixture of another kind.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from eve.errors import UserError
from tools.import_checks import beit, beit3, eve, mae, vlmo
from tools.import_checks.fixture import Fixture, read_fixture

CHECKS: dict[str, Callable[[Fixture], dict[str, Tensor]]] = {
    **vlmo.CHECKS,
    **eve.CHECKS,
    **beit.CHECKS,
    **beit3.CHECKS,
    **mae.CHECKS,
}
# Fixtures that are compared elsewhere: in tests, which are marked `fixtures`.
OTHERS = {
    "routing": "routers and their losses",
    "beit_mask_statistics": "masks",
    "retrieval_metrics": "metrics",
    "vqa_metrics": "metrics",
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python tools/verify_import.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("fixtures", type=Path, nargs="+", metavar="FIXTURE.safetensors")
    options = parser.parse_args(arguments)
    try:
        # All are read first, so that a mistake is told before anything is computed.
        checks = [_check_of(read_fixture(path)) for path in options.fixtures]
        return max(_report(fixture, check) for fixture, check in checks)
    except UserError as error:
        print(f"verify_import: {error}", file=sys.stderr)
        return 2


def _check_of(fixture: Fixture) -> tuple[Fixture, Callable[[Fixture], dict[str, Tensor]]]:
    kinds = [kind for kind in (*CHECKS, *OTHERS) if f"{fixture.name}_".startswith(f"{kind}_")]
    kind = max(kinds, key=len, default=None)
    if kind in OTHERS:
        raise UserError(f"{fixture.where} is about {OTHERS[kind]}, not about imported weights")
    if kind is None:
        raise UserError(f"{fixture.where} is of no known kind; those are {', '.join(CHECKS)}")
    return fixture, CHECKS[kind]


@torch.no_grad()
def _report(fixture: Fixture, check: Callable[[Fixture], dict[str, Tensor]]) -> int:
    found = check(fixture)
    print(fixture.where)
    width = max((len(name) for name in fixture.outputs), default=0)
    missed = 0
    for name, expected in fixture.outputs.items():
        allowed = fixture.tolerances[name]
        difference = None if name not in found else largest_difference(found[name], expected)
        ok = difference is not None and difference <= allowed
        missed += not ok
        shown = "missing" if difference is None else f"{difference:.2e}"
        print(f"  {name:{width}}  {shown:>8}  allowed {allowed:.2e}  {'ok' if ok else 'MISSED'}")
    return 1 if missed else 0


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """inf for another shape, or for numbers that are not finite in one of them only."""
    if found.shape != expected.shape:
        return math.inf
    if not found.numel():
        return 0.0
    if not expected.is_floating_point():
        return 0.0 if torch.equal(found.to(expected.dtype), expected) else math.inf
    same = (found == expected) | (found.isnan() & expected.isnan())
    return float(torch.where(same, 0, found.double() - expected.double()).abs().nan_to_num(math.inf).max())


if __name__ == "__main__":
    sys.exit(main())
