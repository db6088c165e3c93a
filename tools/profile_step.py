"""A training step on this device: how large a batch fits, how fast it is, and where its time goes.

    python -m tools.profile_step [--recipe eve_base] [--batch N] [--steps 10] [--out DIR] [KEY=VALUE ...]

    batch      the largest that fits, by doubling and bisection; on a CPU --batch must say it
    step       the DeepSpeed engine's step, and the plain PyTorch loop's with and without routed experts:
               seconds, pairs a second, model FLOP utilisation
    kernels    the step by groups of kernels: grouped and dense products, attention, dispatch, routing, ...
    layer      a routed feed-forward beside a dense one of equal active operations, forward and backward

On a GPU weights are bf16, with fp32 copies that the optimizer keeps; on a CPU fp32. Batches lie on the
device and are real where the recipe's evaluation.shards and tokenizer are there; else pictures and captions
are generated, and the output says so. DIR gets step.md and step.json.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from eve.config import FeedForward, Model, Recipe, load_recipe
from eve.data.batch import Batch
from eve.errors import UserError
from eve.model import build_model
from eve.objectives import build_objective
from eve.parallel.topology import Topology
from eve.training.flops import batch_flops, mfu, peak_flops
from tools.benchmark_step import engine_step, plain_step
from tools.kernel_groups import routers_named, seconds_by_group
from tools.step_samples import Samples

Step = Callable[[Batch], None]
NUM_BATCHES = 2
WARM_UP = 3
PROFILED = 3  # steps at most


# ------------------------------------------------------------------------------------------ largest batch


def largest_batch(fits: Callable[[int], bool], first: int, most: int) -> int:
    """By doubling from `first`, then bisection to an eighth; 0 where not even `first` fits."""
    good, bad = 0, most + 1
    size = min(first, most)
    while size > good:
        if fits(size):
            good = size
            size = min(2 * good, most)
        else:
            bad = size
            break
    while good and bad - good > max(1, good // 8):
        size = (good + bad) // 2
        if fits(size):
            good = size
        else:
            bad = size
    return good


def fitting_batch(step: Step, samples: Samples, limit: int) -> int:
    """Of steps whose allocator never holds more than `limit` bytes."""

    def fits(size: int) -> bool:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            batch = samples.batch(size)
            for _ in range(2):
                step(batch)
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            return False
        return torch.cuda.max_memory_reserved() <= limit

    return largest_batch(fits, first=32, most=8192)


# ------------------------------------------------------------------------------------------------ the step


@dataclass(frozen=True)
class Speed:
    """`flops`: of the model, a step. `peak_bytes` is None on a CPU."""

    seconds: float
    spread: float
    pairs: int
    flops: int
    peak_bytes: int | None

    def utilisation(self, device: torch.device) -> float | None:
        return mfu(self.flops, self.seconds, 1, name_of(device))


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def speed(step: Step, batches: list[Batch], recipe: Recipe, steps: int, device: torch.device) -> Speed:
    """Median of `steps` steps."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for number in range(WARM_UP + steps):
        wait(device)
        start = time.perf_counter()
        step(batches[number % len(batches)])
        wait(device)
        seconds.append(time.perf_counter() - start)
    seconds = sorted(seconds[WARM_UP:])
    flops = [
        sum(
            batch_flops(recipe.model, stream, batch, checkpointing=False).model
            for stream in recipe.stages[0].streams
        )
        for batch in batches
    ]
    return Speed(
        seconds=statistics.median(seconds),
        spread=(seconds[-1] - seconds[0]) / statistics.median(seconds),
        pairs=batches[0].size,
        flops=round(statistics.mean(flops)),
        peak_bytes=torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    )


def breakdown(step: Step, batches: list[Batch], steps: int, device: torch.device) -> dict[str, float]:
    """Seconds a step by group."""
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    step(batches[0])
    wait(device)
    with profile(activities=kinds) as profiler:
        for number in range(steps):
            step(batches[number % len(batches)])
        wait(device)
    found = seconds_by_group(profiler.events() or (), device)
    return {group: seconds / steps for group, seconds in found.items()}


def without_routed_experts(model: Model) -> Model:
    """Its learned routers become hard ones, by modality."""
    layers = [
        FeedForward(blocks=each.blocks, router="modality") if each.router == "topk" else each
        for each in model.feed_forward
    ]
    return model.model_copy(update={"feed_forward": layers})


# ------------------------------------------------------------------------------------------- one layer


def layer_with_inputs(
    model: Model, recipe: Recipe, block: int, batch: Batch, device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, tuple[Any, ...]]:
    """The feed-forward of a block, and what it is called with in the pass of the recipe's last stream."""
    found: list[tuple[Any, ...]] = []
    whole = build_model(model, recipe.seed).to(device, dtype).train()
    layer = whole.encoder.blocks[block].feed_forward
    handle = layer.register_forward_pre_hook(lambda _, given: found.append(given))  # pyright: ignore
    stream = recipe.stages[0].streams[-1]
    objective = build_objective(stream, model, visual_tokenizer=recipe.data.visual_tokenizer)
    with torch.no_grad():
        objective(whole, batch, objective.units(batch), 1.0)
    handle.remove()  # pyright: ignore
    return layer, found[-1]  # pyright: ignore


def dense_twin(model: Model, k: int) -> Model:
    """One feed-forward in each block, for all tokens, as wide as the k experts of a token together."""
    layer = FeedForward(blocks=tuple(range(model.depth)), router="shared")
    return model.model_copy(update={"feed_forward": [layer], "hidden": k * model.hidden})


def layer_seconds(
    recipe: Recipe, batch: Batch, rounds: int, device: torch.device, dtype: torch.dtype
) -> dict[str, list[float]] | None:
    """{"routed", "dense": seconds of forward and backward, round by round}; None without a learned router.

    Of the last block whose router is learned, and of its dense twin.
    """
    model = recipe.model
    blocks = [block for block in range(model.depth) if model.feed_forward_of(block).router == "topk"]
    if not blocks:
        return None
    calls = {
        name: layer_with_inputs(each, recipe, blocks[-1], batch, device, dtype)
        for name, each in (
            ("routed", model),
            ("dense", dense_twin(model, model.feed_forward_of(blocks[-1]).k)),
        )
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + WARM_UP):
        for name, (layer, (x_TD, *others)) in calls.items():
            x_TD = x_TD.detach().requires_grad_()
            grad_TD = torch.ones_like(x_TD)
            wait(device)
            start = time.perf_counter()
            results = layer(x_TD, *others)
            y_TD = results[0] if isinstance(results, tuple) else results
            y_TD.backward(grad_TD)
            wait(device)
            if number >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
            layer.zero_grad(set_to_none=True)
    return seconds


# ------------------------------------------------------------------------------------------------- the whole


def measure(options: argparse.Namespace, recipe: Recipe) -> dict[str, Any]:
    topology = Topology.from_environment()
    device = torch.device(options.device)
    if device.type == "cpu" and options.batch is None:
        raise UserError("on a CPU give --batch: only the memory of a GPU tells what fits")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    samples = Samples(recipe, device)
    plain, module = plain_step(recipe, device, dtype)
    size, how = options.batch, "given"
    if size is None:
        limit = int(options.memory * torch.cuda.get_device_properties(device).total_memory)
        size = fitting_batch(plain, samples, limit)
        how = f"the largest that fits {limit / 2**30:.0f} GiB, to an eighth, by doubling and bisection"
        if not size:
            raise UserError(f"not even 32 samples fit {limit / 2**30:.0f} GiB")
    batches = [samples.batch(size, number) for number in range(NUM_BATCHES)]
    speeds: dict[str, Speed | str] = {"plain loop": speed(plain, batches, recipe, options.steps, device)}
    profiled = min(options.steps, PROFILED)
    with routers_named(module):
        groups = {"plain loop": breakdown(plain, batches, profiled, device)}
    del plain, module
    free()
    dense = recipe.model_copy(update={"model": without_routed_experts(recipe.model)})
    if dense.model != recipe.model:
        step, module = plain_step(dense, device, dtype)
        speeds["plain loop, no routed experts"] = speed(step, batches, dense, options.steps, device)
        del step, module
        free()
    layer = layer_seconds(recipe, batches[0], options.steps, device, dtype)
    free()
    speeds["engine"], groups_of_engine = engine_part(recipe, topology, options, batches, device)
    if groups_of_engine:
        groups["engine"] = groups_of_engine
    return {
        "recipe": recipe.name,
        "device": name_of(device),
        "torch": torch.__version__,
        "samples": samples.kind,
        "batch": size,
        "batch_is": how,
        "peak_flops": peak_flops(name_of(device)),
        "steps": {
            name: found if isinstance(found, str) else {**vars(found), "mfu": found.utilisation(device)}
            for name, found in speeds.items()
        },
        "groups": groups,
        "layer": layer,
        "layer_ratio": None if layer is None else layer_ratio(layer),
    }


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def engine_part(
    recipe: Recipe,
    topology: Topology,
    options: argparse.Namespace,
    batches: list[Batch],
    device: torch.device,
) -> tuple[Speed | str, dict[str, float]]:
    """(speed or why there is none, seconds by group)."""
    if importlib.util.find_spec("deepspeed") is None:
        return "not measured: deepspeed is not installed", {}
    default = "ds_configs/zero1_bf16.json" if device.type == "cuda" else "ds_configs/zero0_fp32.json"
    try:
        step = engine_step(recipe, topology, options.deepspeed_config or default)
        found = speed(step, batches, recipe, options.steps, device)
        return found, breakdown(step, batches, min(options.steps, PROFILED), device)
    except torch.OutOfMemoryError:
        return "not measured: out of memory at the batch that the plain loop fits", {}


# ---------------------------------------------------------------------------------------------- the report


def markdown(found: dict[str, Any]) -> str:
    peak = found["peak_flops"]
    lines = [
        f"# A step of {found['recipe']}",
        "",
        f"{found['device']}, torch {found['torch']}; {found['samples']}; batch {found['batch']} "
        f"({found['batch_is']}); peak of the device "
        + ("not known" if peak is None else f"{peak / 1e12:.0f} TFLOP/s (dense bf16, data sheet)"),
        "",
        "| step | s | spread | pairs/s | TFLOP a step | MFU | peak GB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, step in found["steps"].items():
        if isinstance(step, str):
            lines.append(f"| {name} | {step} | | | | | |")
            continue
        share = "" if step["mfu"] is None else f"{step['mfu']:.1%}"
        memory = "" if step["peak_bytes"] is None else f"{step['peak_bytes'] / 1e9:.1f}"
        seconds = step["seconds"]
        lines.append(
            f"| {name} | {seconds:.4f} | {step['spread']:.1%} | {step['pairs'] / seconds:.1f} | "
            f"{step['flops'] / 1e12:.4f} | {share} | {memory} |"
        )
    for name, groups in found["groups"].items():
        total = sum(groups.values())
        lines += ["", f"**{name}, by kernel** (share of the time that was seen)", "", "| | ms | share |"]
        lines += ["|---|---:|---:|"]
        lines += [f"| {g} | {s * 1e3:.2f} | {s / total:.1%} |" for g, s in groups.items() if s]
    lines += ["", layer_line(found["layer"]), ""]
    return "\n".join(lines)


def layer_ratio(layer: dict[str, list[float]]) -> float:
    """Routed over dense, the median round by round."""
    return statistics.median(a / b for a, b in zip(layer["routed"], layer["dense"], strict=True))


def layer_line(layer: dict[str, list[float]] | None) -> str:
    if layer is None:
        return "No layer of this recipe has a learned router."
    routed, dense = (statistics.median(layer[name]) * 1e3 for name in ("routed", "dense"))
    return (
        f"Routed feed-forward {routed:.3f} ms, dense one of equal active operations {dense:.3f} ms: "
        f"{layer_ratio(layer):.3f}x."
    )


def check(options: argparse.Namespace) -> None:
    """Raises UserError."""
    for name in ("steps", "batch"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}, expected at least 1")
    if not 0 < options.memory <= 1:
        raise UserError(f"--memory is {options.memory:g}, expected a share above 0, at most 1")
    if options.device not in ("cuda", "cpu"):
        raise UserError(f"--device is {options.device!r}, expected cuda or cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but this machine has no GPU that torch can use")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.profile_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", default="eve_base")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--deepspeed_config")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--memory", type=float, default=0.92, help="share of the GPU's memory to fill")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args(argv)
    try:
        check(options)
        recipe = load_recipe(options.recipe, options.overrides)
        found = measure(options, recipe)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = markdown(found)
    print(text)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "step.md").write_text(text)
        (options.out / "step.json").write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
