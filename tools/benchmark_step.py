"""Side by side, in one run: what a training step costs, and what packing and the engine change of it.

    python -m tools.benchmark_step [--recipe eve_tiny] [--batches 8] [--rounds 7] [KEY=VALUE ...]

engine   the step of `eve.pretrain`: DeepSpeed engine, unit counts, log windows, meters
plain    the same model and batches in a plain PyTorch loop: forward, backward, clip, fused AdamW
padded   as plain, but as most code bases do it: texts padded to max_text_length, masked patches stay
         in the encoder as tokens and are predicted from its output without a decoder

Rounds alternate between the three, and ratios are taken round by round: the machine's noise falls on
all alike. The batches are real: held-out shards of the recipe. tools/profile_step.py shows where the time
of a step goes.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from eve.config import Recipe, load_recipe
from eve.data.batch import Batch, Sample, collate
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


def held_out_samples(recipe: Recipe, tokenizer: Tokenizer) -> Iterator[Sample]:
    """Of the first cell of the recipe's evaluation, masked for the first stage."""
    if not recipe.evaluation.shards:
        raise UserError("evaluation.shards is empty")
    return read_samples(
        next(iter(recipe.evaluation.shards.values())),
        image_size=recipe.model.image_size,
        max_text_length=recipe.model.max_text_length,
        tokenizer=tokenizer,
        maskings={
            s.name: build_objective(s, recipe.model, visual_tokenizer=recipe.data.visual_tokenizer).masking(
                tokenizer
            )
            for s in recipe.stages[0].streams
        },
        seed=recipe.seed,
        limit=None,
    )


def real_batches(recipe: Recipe, tokenizer: Tokenizer, number: int) -> list[Batch]:
    size = recipe.data.sources[recipe.stages[0].streams[0].source].batch_size
    samples = held_out_samples(recipe, tokenizer)
    batches = []
    while len(batches) < number:
        chunk = list(islice(samples, size))
        if len(chunk) < size:
            break
        batches.append(collate(chunk))
    if not batches:
        raise UserError(f"evaluation.shards hold fewer than the {size} samples of one batch")
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


def plain_step(
    recipe: Recipe, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Callable[[Batch], None], nn.Module]:
    """The step, and the module that it trains."""
    stage = recipe.stages[0]
    codes = recipe.data.visual_tokenizer
    objectives = {s.name: build_objective(s, recipe.model, visual_tokenizer=codes) for s in stage.streams}
    module = PretrainModule(build_model(recipe.model, recipe.seed), objectives).to(device).train()
    masters = None
    if dtype != torch.float32:
        masters, module = module, copy.deepcopy(module).to(dtype)

    def losses(batch: Batch) -> list[Callable[[], Tensor]]:
        return [
            lambda s=s: module(s.name, batch, objectives[s.name].units(batch)).loss * s.weight
            for s in stage.streams
        ]

    return _loop(recipe, module, losses, device, masters), module


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
    masters: nn.Module | None = None,
) -> Callable[[Batch], None]:
    """`masters`: the fp32 copy that the optimizer updates, where the module itself is of fewer bits."""
    unclipped = recipe.optimizer.model_copy(update={"clip": None})
    optimizer = build_optimizer(module if masters is None else masters, unclipped, norm=None)
    for group in optimizer.param_groups:
        group["lr"] = recipe.stages[0].lr
    parameters: list[Tensor] = list(module.parameters())
    updated: list[Tensor] = parameters if masters is None else list(masters.parameters())

    def step(batch: Batch) -> None:
        batch = batch.to(device)
        for loss in losses(batch):
            loss().backward()
        with record_function("eve: optimizer"):
            if masters is not None:
                for parameter, master in zip(parameters, updated, strict=True):
                    master.grad = None if parameter.grad is None else parameter.grad.float()
                    parameter.grad = None
            if recipe.optimizer.clip:
                nn.utils.clip_grad_norm_(updated, recipe.optimizer.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if masters is not None:
                with torch.no_grad():
                    torch._foreach_copy_(parameters, updated)  # pyright: ignore  # pyright: ignore

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


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="eve_tiny")
    parser.add_argument("--deepspeed_config", default="ds_configs/zero0_fp32.json")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        topology = Topology.from_environment()
        batches = real_batches(recipe, Tokenizer.load(recipe.data.tokenizer), options.batches)
        steps = {
            "engine": engine_step(recipe, topology, options.deepspeed_config),
            "plain": plain_step(recipe, topology.device)[0],
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
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
