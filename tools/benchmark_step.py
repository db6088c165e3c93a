"""Side by side, in one run: what a training step costs, and what packing and the engine change of it.

    python -m tools.benchmark_step [--recipe eve_tiny] [--batches 8] [--rounds 7] [--profile] [KEY=VALUE ...]

engine   the step of `eve.pretrain`: DeepSpeed engine, unit counts, log windows, meters
plain    the same model and batches in a plain PyTorch loop: forward, backward, clip, fused AdamW
padded   as plain, but as most code bases do it: texts padded to max_text_length, masked patches stay
         in the encoder as tokens and are predicted from its output without a decoder

Rounds alternate between the three, and ratios are taken round by round: the machine's noise falls on
all alike. The batches are real: held-out shards of the recipe.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from eve.config import Recipe, load_recipe
from eve.data.batch import Batch, collate
from eve.data.loader import read_samples
from eve.data.tokenizer import Tokenizer
from eve.errors import UserError
from eve.model import VisionLanguageModel, build_model
from eve.objectives import PretrainModule, build_objective
from eve.objectives.masked_image import image_loss
from eve.parallel.topology import Topology
from eve.training.ds_config import read_ds_config, resolve_ds_config
from eve.training.engine import Engine
from eve.training.feed import StepData
from eve.training.meter import Meter
from eve.training.optimizer import build_optimizer
from eve.training.stages import build_stage
from eve.training.window import Window


def real_batches(recipe: Recipe, tokenizer: Tokenizer, number: int) -> list[Batch]:
    stage = recipe.stages[0]
    maskings = {s.name: build_objective(s, recipe.model).masking(tokenizer) for s in stage.streams}
    size = recipe.data.sources[stage.streams[0].source].batch_size
    shards = next(iter(recipe.evaluation.shards.values()))
    samples = read_samples(
        shards,
        image_size=recipe.model.image_size,
        max_text_length=recipe.model.max_text_length,
        tokenizer=tokenizer,
        maskings=maskings,
        seed=recipe.seed,
        limit=None,
    )
    batches = []
    while len(batches) < number:
        chunk = list(islice(samples, size))
        if len(chunk) < size:
            break
        batches.append(collate(chunk))
    if not batches:
        raise UserError(f"{shards} holds fewer than the {size} samples of one batch")
    return [batches[i % len(batches)] for i in range(number)]


def engine_step(recipe: Recipe, topology: Topology, ds_path: str) -> Callable[[Batch], None]:
    stage = recipe.stages[0]
    config, _ = resolve_ds_config(
        read_ds_config(ds_path), recipe, stage, 1, cuda=topology.device.type == "cuda", where=ds_path
    )
    module = build_stage(recipe, stage, None, topology)
    objectives = module.objectives
    engine = Engine(module, recipe.optimizer, config, topology)
    window, meter = Window(topology.device), Meter(recipe, topology)

    def step(batch: Batch) -> None:
        batch = batch.to(topology.device)
        units = {s.name: objectives[s.name].units(batch) for s in stage.streams}
        for number, stream in enumerate(stage.streams):
            loss, output = engine.forward(stream.name, batch, units[stream.name], 1.0)
            engine.backward(loss * stream.weight, last=number == len(stage.streams) - 1)
            window.add_output(stream.name, output)
        engine.step(stage.lr)
        passes = [(stream, batch) for stream in stage.streams]
        meter.count(StepData(passes, units, torch.zeros(2), {}, batch.size, 0.0))

    return step


def plain_step(recipe: Recipe, device: torch.device) -> Callable[[Batch], None]:
    stage = recipe.stages[0]
    objectives = {s.name: build_objective(s, recipe.model) for s in stage.streams}
    module = PretrainModule(build_model(recipe.model, recipe.seed), objectives).to(device).train()

    def losses(batch: Batch) -> list[Callable[[], Tensor]]:
        return [
            lambda s=s: module(s.name, batch, objectives[s.name].units(batch)).loss * s.weight
            for s in stage.streams
        ]

    return _loop(recipe, module, losses, device)


def padded_step(recipe: Recipe, device: torch.device) -> Callable[[Batch], None]:
    stage, config = recipe.stages[0], recipe.model
    model = build_model(config, recipe.seed)
    model.decoder = None
    pixels = nn.Linear(config.width, 3 * config.patch_size**2)
    module = nn.ModuleDict({"model": model, "pixels": pixels}).to(device).train()

    def padded(batch: Batch, tokens_N: Tensor) -> Tensor:
        rows = tokens_N.split(batch.text_lengths)
        out = tokens_N.new_zeros(batch.size, config.max_text_length)
        for row, text in zip(out, rows, strict=True):
            row[: len(text)] = text
        return out.flatten()

    def encode(model: VisionLanguageModel, batch: Batch, tokens_N: Tensor):
        return model.encode(
            images_BCHW=batch.images_BCHW,
            tokens_N=padded(batch, tokens_N),
            text_lengths=[config.max_text_length] * batch.size,
            seed_B=batch.seed_B,
        )

    def image(batch: Batch, name: str) -> Tensor:
        masked_BM = batch.masks[name]["masked_M"]
        encoded = encode(model, batch, batch.tokens_N)  # pyright: ignore
        hidden_BMD = encoded.images_BID[:, 1:].gather(1, masked_BM[..., None].expand(-1, -1, config.width))
        stream = next(s for s in stage.streams if s.name == name)
        total, _ = image_loss(pixels(hidden_BMD), batch, masked_BM, config.patch_size, stream)
        return total / masked_BM.numel() + encoded.aux_loss()

    def text(batch: Batch, name: str) -> Tensor:
        mask = batch.masks[name]
        encoded = encode(model, batch, mask["input_N"])
        rows, begin = [], 0
        for number, sample in enumerate(batch.samples):
            count = len(sample.masks[name]["position_N"])
            rows.append(mask["position_N"][begin : begin + count] + number * config.max_text_length)
            begin += count
        logits = model.word_head(encoded.texts_ND[torch.cat(rows)]).float()
        return nn.functional.cross_entropy(logits, mask["target_N"]) + encoded.aux_loss()

    kinds = {"masked_image": image, "masked_text": text}

    def losses(batch: Batch) -> list[Callable[[], Tensor]]:
        return [lambda s=s: kinds[s.objective](batch, s.name) * s.weight for s in stage.streams]

    return _loop(recipe, module, losses, device)


def _loop(
    recipe: Recipe,
    module: nn.Module,
    losses: Callable[[Batch], list[Callable[[], Tensor]]],
    device: torch.device,
) -> Callable[[Batch], None]:
    unclipped = recipe.optimizer.model_copy(update={"clip": None})
    optimizer = build_optimizer(module, unclipped, norm=None)
    for group in optimizer.param_groups:
        group["lr"] = recipe.stages[0].lr
    parameters = list(module.parameters())

    def step(batch: Batch) -> None:
        batch = batch.to(device)
        for loss in losses(batch):
            loss().backward()
        if recipe.optimizer.clip:
            nn.utils.clip_grad_norm_(parameters, recipe.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(
    steps: dict[str, Callable[[Batch], None]], batches: list[Batch], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds a step of each, round by round; one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            for batch in batches:
                step(batch)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[name].append((time.perf_counter() - start) / len(batches))
    return seconds


def print_profile(step: Callable[[Batch], None], batches: list[Batch], device: torch.device) -> None:
    """Where the time of the engine's step goes, by operator, largest share first."""
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=kinds) as profiler:
        for batch in batches:
            step(batch)

    def own_time(event: Any) -> float:
        return event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total

    events = sorted(profiler.key_averages(), key=own_time, reverse=True)
    total = sum(own_time(event) for event in events)
    print("\nthe engine's step by operator:")
    for event in events[:16]:
        share, calls = own_time(event) / total, event.count / len(batches)
        print(f"{share:7.1%}  {event.key[:60]:60} {calls:6.0f} calls a step")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="eve_tiny")
    parser.add_argument("--deepspeed_config", default="ds_configs/zero0_fp32.json")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--profile", action="store_true", help="also print where the time goes")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        topology = Topology.from_environment()
        batches = real_batches(recipe, Tokenizer.load(recipe.data.tokenizer), options.batches)
        steps = {
            "engine": engine_step(recipe, topology, options.deepspeed_config),
            "plain": plain_step(recipe, topology.device),
            "padded": padded_step(recipe, topology.device),
        }
    except UserError as error:
        print(f"benchmark_step: {error}", file=sys.stderr)
        return 2
    seconds = measure(steps, batches, options.rounds, topology.device)
    size = batches[0].size
    print(f"{recipe.name}: {size} pairs a step, {topology.describe()}, torch {torch.__version__}")
    print(
        f"{'':8} {'s/step':>8} {'pairs/s':>8} {'vs plain':>9}   (median of {options.rounds} rounds; min..max)"
    )
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds["plain"], strict=True)]
        median = statistics.median(values)
        print(
            f"{name:8} {median:8.3f} {size / median:8.1f} {statistics.median(ratios):8.3f}x"
            f"   ({min(ratios):.3f}..{max(ratios):.3f})"
        )
    if options.profile:
        print_profile(steps["engine"], batches, topology.device)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
