"""Equality first, then time: rounds that alternate between the peers, so that noise falls on all alike.

On a GPU a measurement begins after the L2 cache was overwritten and while the device sleeps for longer than
the host needs to launch: what is timed is the device, and the host's time is a number of its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from kernels.benchmark.case import Case
from kernels.benchmark.peer import Call, Peer, Unavailable, differentiable

# Else the profiler tells each of its starts.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

PARTS = ("forward", "backward", "both")
WARM_UP = 3
L2_BYTES = 256 << 20  # to overwrite: five times that of an H200
CLOCK = 2e9  # cycles a second at most, of a device that sleeps
# Of (norm of the difference / norm of ours), and of (largest difference / largest of ours): one wrong row in
# thousands is in the second.
TOLERANCES = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (2e-2, 6e-2)}
NOTHING = 1e-7  # root mean square of a difference that is none


@dataclass
class Row:
    """A line of the table.

    Attributes:
        reason: why there is no measurement; None where there is one.
        without: results of ours that this peer does not give.
        seconds: of each of PARTS, round by round.
        host: seconds until forward and backward were launched; only on a GPU.
        peak_bytes: the most memory allocated at once by forward and backward, inputs not counted.
        difference: largest relative norm over what was compared; None for a ceiling and for ours.
    """

    case: Case
    peer: str
    reason: str | None = None
    without: list[str] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})
    host: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    difference: float | None = None


class Different(Exception):
    """A peer computes something else."""


def run_case(
    case: Case, peers: tuple[Peer, ...], inputs: Any, device: torch.device, dtype: torch.dtype, rounds: int
) -> list[Row]:
    """The first peer is ours, which the others are compared with; one that fails is a row with a reason."""
    rows = [Row(case, peer.name) for peer in peers]
    steps: dict[str, Step] = {}
    clock = Clock(device)
    for peer, row in zip(peers, rows, strict=True):

        def prepare(peer: Peer = peer, row: Row = row) -> None:
            if peer.compiles and not case.compiled:
                raise Unavailable("not compiled at this size")
            call = peer.make(inputs)
            if peer is not peers[0]:
                if peers[0].name not in steps:
                    raise Unavailable("nothing to compare with")
                compare(call, steps[peers[0].name].call, row, dtype)
            step = Step(call)
            for _ in range(WARM_UP):
                step.both()
            row.peak_bytes = peak_bytes(step, device)
            clock.learn(step)
            steps[peer.name] = step

        attempt(row, prepare)
    for _ in range(rounds):
        for row in rows:
            if row.reason is None:
                attempt(row, lambda row=row: clock.sample(steps[row.peer], row))
    return rows


def attempt(row: Row, function: Callable[[], None]) -> None:
    try:
        function()
    except Unavailable as reason:
        row.reason = str(reason)
    except torch.OutOfMemoryError:
        row.reason = "out of memory"
    except Different as reason:
        row.reason = f"WRONG: {reason}"
    except Exception as error:  # of whatever package: the others are measured all the same
        first = (str(error).strip() or "no message").splitlines()[0]
        row.reason = f"fails: {type(error).__name__}: {first[:160]}"
    if row.reason is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------- equality


def compare(call: Call, ours: Call, row: Row, dtype: torch.dtype) -> None:
    """
    Raises:
        Different: results or gradients differ by more than TOLERANCES.
    """
    found, gradients = results_and_gradients(call, None)
    if not found:
        return  # a ceiling
    expected, expected_gradients = results_and_gradients(ours, list(found))
    row.without = [name for name in ours.comparable(ours.forward()) if name not in found]
    worst = 0.0
    for kind, mine, theirs in (("", found, expected), ("gradient of ", gradients, expected_gradients)):
        if mine.keys() != theirs.keys():
            raise Different(f"gives {sorted(mine)}, ours {sorted(theirs)}")
        for name in theirs:
            worst = max(worst, difference(f"{kind}{name}", mine[name], theirs[name], dtype))
    row.difference = worst


def results_and_gradients(
    call: Call, wanted: list[str] | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`comparable` (those `wanted`), and the gradients for fixed random gradients of these."""
    seen = call.comparable(call.forward())
    seen = seen if wanted is None else {name: seen[name] for name in wanted}
    if not seen:
        return {}, {}
    starts = {name: tensor for name, tensor in seen.items() if tensor.requires_grad}
    cotangents = []
    # A mean hands each number a small part of its gradient: large enough that none of these is nothing.
    total = sum(leaf.numel() for leaf in call.leaves.values())
    for tensor in starts.values():
        generator = torch.Generator(tensor.device).manual_seed(tensor.numel())
        random = torch.randn(tensor.shape, generator=generator, device=tensor.device)
        random = torch.full_like(random, total) if tensor.ndim == 0 else random + 1
        cotangents.append(random.to(tensor.dtype))
    leaves = call.leaves
    found = torch.autograd.grad(list(starts.values()), list(leaves.values()), cotangents)
    gradients = call.comparable_gradients(dict(zip(leaves, found, strict=True)))
    return {name: tensor.detach() for name, tensor in seen.items()}, gradients


def difference(name: str, theirs: Tensor, ours: Tensor, dtype: torch.dtype) -> float:
    """Relative norm of the difference.

    Raises:
        Different: another shape, no number, or past TOLERANCES.
    """
    if theirs.shape != ours.shape:
        raise Different(f"{name} is {tuple(theirs.shape)}, ours {tuple(ours.shape)}")
    if not ours.numel():
        return 0.0
    away = (theirs.float() - ours.float()).abs()
    norm = float(away.norm(dtype=torch.float64))
    if norm <= NOTHING * away.numel() ** 0.5:
        return 0.0
    by_norm = norm / max(float(ours.norm(dtype=torch.float64)), 1e-30)
    by_largest = float(away.max()) / max(float(ours.float().abs().max()), 1e-30)
    allowed = TOLERANCES[dtype]
    if not (by_norm <= allowed[0] and by_largest <= allowed[1]):
        raise Different(f"{name} is off by {by_norm:.2g} in norm, {by_largest:.2g} at most")
    return by_norm


# ----------------------------------------------------------------------------------------------------- time


class Step:
    """A call, and the gradients that its backward starts with: made once, not in the time."""

    def __init__(self, call: Call):
        self.call = call
        self.starts_with = [torch.ones_like(each) for each in differentiable(call.forward())]
        self.leaves = list(call.leaves.values())

    def backward(self, results: Any) -> Any:
        if self.call.backward is not None:
            return self.call.backward()
        return torch.autograd.grad(differentiable(results), self.leaves, self.starts_with)

    def both(self) -> None:
        self.backward(self.call.forward())


class Clock:
    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.scratch = torch.empty(L2_BYTES, dtype=torch.uint8, device=device) if self.cuda else None
        self.launch = 0.0  # seconds, of the slowest peer

    def learn(self, step: Step) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            start = time.perf_counter()
            step.both()
            self.launch = min(max(self.launch, time.perf_counter() - start), 0.02)

    def sample(self, step: Step, row: Row) -> None:
        """One round: forward, backward, and both without a pause between them."""
        results, forward, _ = self.timed(step.call.forward)
        _, back, _ = self.timed(partial(step.backward, results))
        del results
        _, both, host = self.timed(step.both)
        for part, seconds in zip(PARTS, (forward, back, both), strict=True):
            row.seconds[part].append(seconds())
        if self.cuda:
            row.host.append(host)

    def timed(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], float], float]:
        """(result, what gives the seconds later: nothing waits for the device here, seconds of the host)."""
        if not self.cuda:
            start = time.perf_counter()
            result = function()
            seconds = time.perf_counter() - start
            return result, lambda: seconds, seconds
        assert self.scratch is not None
        self.scratch.zero_()
        torch.cuda._sleep(int(CLOCK * (2 * self.launch + 1e-4)))
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start = time.perf_counter()
        begin.record()
        result = function()
        end.record()
        host = time.perf_counter() - start

        def elapsed() -> float:
            end.synchronize()
            return begin.elapsed_time(end) / 1e3

        return result, elapsed, host


# --------------------------------------------------------------------------------------------------- memory


def peak_bytes(step: Step, device: torch.device) -> int:
    """The most memory allocated at once by forward and backward beyond what was allocated before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step.both()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step.both()
    kineto = profiler.profiler
    assert kineto is not None
    changes = [
        (event.start_ns(), event.nbytes())  # pyright: ignore
        for event in kineto.kineto_results.events()  # pyright: ignore
        if event.name() == "[memory]"
    ]
    held = peak = 0
    for _, change in sorted(changes, key=lambda each: each[0]):
        held += change
        peak = max(peak, held)
    return peak
