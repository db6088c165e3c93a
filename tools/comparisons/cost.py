"""What a training step of each variant costs: the largest batch within a memory, and the time at it.

Memory is that of tensors alive at once, as `torch.cuda.max_memory_allocated` counts it; on a CPU it is added
up from the profiler's record of every allocation and release. Unlike the resident size of a process that sum
is the same in every run and does not depend on how the C library keeps freed pages, but it leaves out the
scratch memory inside matrix libraries.

Time is of the plain loop of tools/benchmark_step.py (forward and backward of all streams, clipping, update)
on real held-out samples. Rounds alternate between the variants, and ratios are taken round by round, so that
the machine's noise falls on all alike. A variant is built anew for each of its turns: only one is in memory.
"""

from __future__ import annotations

import gc
import json
import math
import multiprocessing
import os
import signal
import statistics
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from torch.profiler import ProfilerActivity, profile

from eve.config import Recipe
from eve.data.batch import Batch
from eve.errors import UserError
from eve.objectives import PretrainModule
from eve.training.optimizer import freeze
from eve.training.stages import learning
from tools.benchmark_step import plain_step
from tools.comparisons.definition import Budget, Variant
from tools.step_samples import Samples

FILE = "cost.json"
GIB = 2**30
# A batch is not tried where the two before it foretell more than so many times the budget.
HOPELESS = 1.25
# A turn measures steps until so many seconds or steps are over.
TURN_SECONDS, TURN_STEPS = 1.0, 10


@dataclass
class Cost:
    """Of one variant. `peaks`: bytes, by batch; `seconds`: of a step, by batch, round by round."""

    peaks: dict[int, int] = field(default_factory=dict)
    seconds: dict[int, list[float]] = field(default_factory=dict)

    def largest(self, budget: Budget) -> int | None:
        fitting = [size for size, peak in self.peaks.items() if peak <= budget.memory_gib * GIB]
        return max(fitting, default=None)


@dataclass
class Costs:
    """All that is measured; `inputs` tells whether it is of these variants, and `about` of which machine."""

    inputs: str
    about: str
    variants: dict[str, Cost]

    @staticmethod
    def read(path: Path, inputs: str, about: str | None = None) -> Costs | None:
        """None where there is none or it is of other variants, or of another machine than `about`."""
        if not path.is_file():
            return None
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["inputs"] != inputs or about not in (None, tree["about"]):
            return None
        variants = {
            name: Cost(*({int(size): value for size, value in cost[key].items()} for key in cost))
            for name, cost in tree["variants"].items()
        }
        return Costs(inputs, tree["about"], variants)

    def write(self, path: Path) -> None:
        temporary = path.with_name(f".{path.name}.writing")
        temporary.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        temporary.rename(path)

    def batch(self, name: str, budget: Budget) -> int:
        """The largest of that variant. Raises UserError where none fits."""
        size = self.variants[name].largest(budget)
        if size is None:
            least, peak = min(self.variants[name].peaks.items())
            raise UserError(
                f"a step of '{name}' with {least} pairs needs {peak / GIB:.2f} GiB, more than "
                f"budget.memory_gib {budget.memory_gib:g}"
            )
        return size

    def batches(self, name: str, budget: Budget) -> list[int]:
        """Those that are timed: the largest one of all variants together, and its own."""
        common = min(self.batch(each, budget) for each in self.variants)
        return sorted({common, self.batch(name, budget)})


def timed_recipe(variant: Variant, budget: Budget) -> Recipe:
    """With the measured stage alone. Raises UserError where that does not read one source of pairs."""
    stage = variant.recipe.stages[variant.stage_number(budget.stage)]
    kinds = [variant.recipe.data.sources[name].kind for name in stage.sources]
    if kinds != ["pair"]:
        raise UserError(
            f"variant '{variant.name}': budget measures a stage that reads one source of pairs, but "
            f"{stage.name} reads {', '.join(stage.sources)}"
        )
    return variant.recipe.model_copy(update={"stages": (stage,)})


def check_budget(variants: Iterable[Variant], budget: Budget) -> None:
    """Raises UserError where a stage cannot be measured or a batch is none of the recipe."""
    for variant in variants:
        timed_recipe(variant, budget)
        if budget.minutes is not None:
            for size in budget.batches:
                variant.changed(batch_override(variant, budget, size))


def batch_override(variant: Variant, budget: Budget, size: int) -> str:
    (source,) = variant.recipe.stages[variant.stage_number(budget.stage)].sources
    return f"data.sources.{source}.batch_size={size}"


def timed_variant(variant: Variant, budget: Budget, costs: Costs) -> Variant:
    """As it trains for `budget.minutes` at its largest batch; the warm-up is scaled with the steps."""
    if budget.minutes is None:
        return variant
    size = costs.batch(variant.name, budget)
    number = variant.stage_number(budget.stage)
    stage = variant.recipe.stages[number]
    seconds = statistics.median(costs.variants[variant.name].seconds[size])
    steps = max(1, round(60 * budget.minutes / seconds))
    return variant.changed(
        batch_override(variant, budget, size),
        f"stages.{number}.steps={steps}",
        f"stages.{number}.warmup_steps={round(steps * stage.warmup_steps / stage.steps)}",
    )


def inputs_of(variants: Iterable[Variant], budget: Budget) -> str:
    """A hash of what decides the cost."""
    parts: list[object] = [budget.model_dump(mode="json", include={"memory_gib", "batches", "stage"})]
    for variant in variants:
        recipe = timed_recipe(variant, budget)
        (stage,) = recipe.stages
        parts += [variant.name, recipe.model, stage.streams, stage.trainable, recipe.optimizer]
        parts += [recipe.training.activation_checkpointing, recipe.evaluation.shards]
    return f"{zlib.crc32(repr(parts).encode()):08x}"


def costs_of(variants: Sequence[Variant], budget: Budget, out: Path, *, measure: bool = True) -> Costs:
    """Measures what is not in OUT/cost.json, in a process of its own, whose memory is free afterwards.

    Raises UserError where no batch fits, or where there is something to measure that it may not.
    """
    path = out / FILE
    costs = Costs.read(path, inputs_of(variants, budget))
    if costs is None or not _is_complete(costs, budget):
        if not measure:
            raise UserError(f"{path} does not hold the costs of these variants; run without --table")
        measure_apart(variants, budget, path)
        costs = Costs.read(path, inputs_of(variants, budget))
        assert costs is not None
    return costs


def _is_complete(costs: Costs, budget: Budget) -> bool:
    return all(cost.peaks for cost in costs.variants.values()) and all(
        len(costs.variants[name].seconds.get(size, ())) >= budget.rounds
        for name in costs.variants
        for size in costs.batches(name, budget)
    )


def measure_apart(variants: Sequence[Variant], budget: Budget, path: Path) -> None:
    """`measure_here` in another process, which ends with this one.

    Raises UserError, also where the process dies, and SystemExit where SIGTERM or SIGINT stops both.
    """
    # Of the profiler, which says when it begins and ends.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    context = multiprocessing.get_context("spawn")
    mistakes, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_there, args=(variants, budget, path, sender), daemon=True)
    stopped_by: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopped_by.append(number)
        process.terminate()

    process.start()
    former = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        process.join()
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    if stopped_by:
        print("stopped; the same command goes on", flush=True)
        raise SystemExit(128 + stopped_by[0])
    if mistakes.poll():
        raise UserError(mistakes.recv())
    if process.exitcode:
        raise UserError(
            f"the process that measures what a step costs ended with exit code {process.exitcode}; killed "
            "(-9), it lacked memory: give smaller budget.batches"
        )


def _measure_there(variants: Sequence[Variant], budget: Budget, path: Path, mistakes: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the other process ends this one
    try:
        measure_here(variants, budget, path)
    except UserError as error:
        mistakes.send(str(error))


def measure_here(variants: Sequence[Variant], budget: Budget, path: Path) -> None:
    """Writes `path` after each part, and goes on from what it holds of the same machine. Raises UserError."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = inputs_of(variants, budget)
    path.parent.mkdir(parents=True, exist_ok=True)
    recipes = {each.name: timed_recipe(each, budget) for each in variants}
    samples = {name: Samples(each, device, limit=max(budget.batches)) for name, each in recipes.items()}
    about = f"{_machine(device)}, torch {torch.__version__}; {samples[variants[0].name].kind}"
    costs = Costs.read(path, inputs, about) or Costs(inputs, about, {each.name: Cost() for each in variants})
    for name, cost in costs.variants.items():
        if not cost.peaks:
            cost.peaks = peaks(recipes[name], samples[name], budget, device)
            if not cost.peaks:
                raise UserError(
                    f"a step of '{name}' with {budget.batches[0]} pairs does not fit the memory of the device"
                )
            shown = ", ".join(f"{size}: {peak / GIB:.2f}" for size, peak in cost.peaks.items())
            print(f"cost: {name}: GiB of a step by batch: {shown}", flush=True)
            costs.write(path)
    for number in range(budget.rounds):
        for name, cost in costs.variants.items():
            sizes = costs.batches(name, budget)
            todo = [size for size in sizes if len(cost.seconds.get(size, ())) <= number]
            if not todo:
                continue
            for size, seconds in turn(recipes[name], samples[name], todo, number, device).items():
                cost.seconds.setdefault(size, []).append(seconds)
                print(f"cost: {name}: round {number + 1}, {size} pairs: {seconds:.3f} s a step", flush=True)
            costs.write(path)


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} of {os.cpu_count()} CPU cores, fp32"


def build_step(recipe: Recipe, device: torch.device) -> Callable[[Batch], None]:
    """The step of the recipe's only stage."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    step, module = plain_step(recipe, device, dtype)
    model = cast(PretrainModule, module).model
    freeze(model, learning(recipe, recipe.stages[0]))
    if recipe.training.activation_checkpointing:
        model.enable_checkpointing()
    return step


def peaks(recipe: Recipe, samples: Samples, budget: Budget, device: torch.device) -> dict[int, int]:
    """Bytes of a step by batch, up to the first that is over the budget; none that the device cannot hold."""
    limit = budget.memory_gib * GIB
    found: dict[int, int] = {}
    # Building and the first step leave weights and optimizer state behind.
    held: list[Callable[[Batch], None]] = []

    def begin() -> None:
        held.append(build_step(recipe, device))
        held[0](samples.batch(budget.batches[0]))

    with suppress(torch.OutOfMemoryError):
        _, resting = allocated(begin, device)
        for size in budget.batches:
            if _foretold(found, size) > HOPELESS * limit:
                break
            peak, _ = allocated(lambda size=size: held[0](samples.batch(size)), device)
            found[size] = resting + peak
            if found[size] > limit:
                break
    held.clear()
    _free()
    return found


def _foretold(found: dict[int, int], size: int) -> float:
    """On the line through the last two; 0 of fewer."""
    if len(found) < 2:
        return 0.0
    (size_1, peak_1), (size_2, peak_2) = list(found.items())[-2:]
    return peak_2 + (peak_2 - peak_1) / (size_2 - size_1) * (size - size_2)


def allocated(work: Callable[[], None], device: torch.device) -> tuple[int, int]:
    """(greatest sum of bytes, sum that is left) of the tensors that the work allocates on the device."""
    _free()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        return peak, torch.cuda.memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
        gc.collect()
    inner: Any = profiler.profiler  # the stub of its events lacks their bytes
    changes = [
        (event.start_ns(), event.nbytes())
        for event in inner.kineto_results.events()
        if event.name() == "[memory]"
    ]
    total = peak = 0
    for _, number in sorted(changes, key=lambda change: change[0]):
        total += number
        peak = max(peak, total)
    return peak, total


def turn(
    recipe: Recipe, samples: Samples, sizes: Sequence[int], number: int, device: torch.device
) -> dict[int, float]:
    """Seconds of a step by batch, after one to warm up at each batch; the samples are those of the round."""
    step = build_step(recipe, device)
    found: dict[int, float] = {}
    for size in sizes:
        batches = [samples.batch(size, number), samples.batch(size, number + 1)]
        first = _timed(step, batches[:1], device)
        steps = min(TURN_STEPS, max(1, math.ceil(TURN_SECONDS / first)))
        found[size] = _timed(step, [batches[(n + 1) % 2] for n in range(steps)], device) / steps
    del step
    _free()
    return found


def _timed(step: Callable[[Batch], None], batches: Sequence[Batch], device: torch.device) -> float:
    start = time.perf_counter()
    for batch in batches:
        step(batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
