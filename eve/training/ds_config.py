"""Reads the DeepSpeed JSON, fills in what the recipe decides, refuses what contradicts it.

Nothing here imports deepspeed (seconds), so that a mistake in the file is found at once. The keys
`train_batch_size`, `train_micro_batch_size_per_gpu`, `gradient_accumulation_steps` and
`gradient_clipping` are "auto" in ds_configs/: a number there must agree with the recipe.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from eve.config import Recipe, Stage
from eve.errors import UserError
from eve.training.ds_schema import check_keys

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"

PRECISIONS = ("bf16", "fp16")


@dataclass(frozen=True)
class StepPlan:
    """How a step of a stage is cut on one rank."""

    # Samples of a source in one step on one rank, and in one forward pass.
    share: dict[str, int]
    micro_batch: dict[str, int]

    def micro_batches(self, source: str) -> int:
        return self.share[source] // self.micro_batch[source]

    def passes(self, stage: Stage) -> int:
        """Forward and backward passes of one step on one rank."""
        return sum(self.micro_batches(stream.source) for stream in stage.streams)


def check_deepspeed_version() -> None:
    """Refuses releases whose gradients are known to be wrong, and those nobody has tried."""
    try:
        version = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        raise UserError("deepspeed is not installed; pip install -r requirements.txt") from None
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
    if not (0, 19, 8) <= numbers < (0, 20):
        raise UserError(
            f"deepspeed {version} is installed, expected >=0.19.8,<0.20: older ones get ZeRO gradients wrong"
        )


def read_ds_config(path: str | Path) -> dict[str, Any]:
    """The JSON as it is written. Raises UserError where unreadable or where a key or a value is wrong."""
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(sorted(str(p.name) for p in DS_CONFIGS.glob("*.json")))
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise UserError(
            f"the DeepSpeed config {path} cannot be read: {reason} (ds_configs/ has {known})"
        ) from None
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: line {error.lineno}, {error.msg.lower()}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds a {type(tree).__name__}, expected an object of DeepSpeed's keys")
    check_keys(tree, str(path))
    return tree


def zero_stage(tree: dict[str, Any]) -> int:
    return int(tree.get("zero_optimization", {}).get("stage", 0))


def precision(tree: dict[str, Any]) -> str:
    """fp32, bf16 or fp16."""
    return next((name for name in PRECISIONS if tree.get(name, {}).get("enabled", False)), "fp32")


def micro_batch_size(tree: dict[str, Any], recipe: Recipe, where: str) -> int | None:
    """Samples of a forward pass, as the config or the recipe says; None is the whole share of a rank."""
    written = tree.get("train_micro_batch_size_per_gpu", "auto")
    wanted = recipe.training.micro_batch_size
    if written != "auto" and wanted is not None and written != wanted:
        raise UserError(
            f"{where} says train_micro_batch_size_per_gpu {written}, the recipe "
            f'training.micro_batch_size {wanted}; make one of them "auto" or null'
        )
    return wanted if written == "auto" else written


def sharers(recipe: Recipe, num_shares: int) -> str:
    """Who gets a share of a batch each, in words: the processes, or groups of them that share each layer."""
    tensor = recipe.parallel.tensor
    return f"{num_shares} processes" if tensor == 1 else f"{num_shares} groups of {tensor} processes"


def plan_step(tree: dict[str, Any], recipe: Recipe, stage: Stage, num_shares: int, where: str) -> StepPlan:
    """Cuts the batch of each source of the stage into `num_shares` (Topology.data), and a share into passes.

    Raises UserError where it does not divide.
    """
    micro_batch = micro_batch_size(tree, recipe, where)
    readers = sharers(recipe, num_shares)
    if recipe.data.num_readers % num_shares:
        raise UserError(f"data.num_readers {recipe.data.num_readers} is not a multiple of the {readers}")
    shares = {}
    for stream in stage.streams:
        batch_size = recipe.data.sources[stream.source].batch_size
        key = f"data.sources.{stream.source}.batch_size {batch_size}"
        if batch_size % num_shares:
            raise UserError(f"{key} is not a multiple of the {readers}")
        shares[stream.source] = batch_size // num_shares
    for source, share in shares.items():
        if micro_batch is not None and share % micro_batch:
            common = math.gcd(*shares.values())
            works = max(size for size in range(1, min(micro_batch, common) + 1) if common % size == 0)
            written = tree.get("train_micro_batch_size_per_gpu", "auto") != "auto"
            place = f"train_micro_batch_size_per_gpu {works} in {where}"
            raise UserError(
                f"data.sources.{source}.batch_size {share * num_shares} gives each of {readers} "
                f"{share} samples, which is not a multiple of the micro-batch {micro_batch}; "
                f"give {place if written else f'training.micro_batch_size={works}'}"
            )
    return StepPlan(shares, {source: micro_batch or share for source, share in shares.items()})


def describe(config: dict[str, Any], plan: StepPlan, stage: Stage) -> str:
    """What of a resolved configuration and of the first stage's step a user wants to see, in one line."""
    cuts = [
        f"{stream.name} {plan.micro_batches(stream.source)} x {plan.micro_batch[stream.source]}"
        for stream in stage.streams
    ]
    clip = config["gradient_clipping"]
    return (
        f"ZeRO stage {zero_stage(config)}, {precision(config)}, "
        f"{f'clipping at {clip}' if clip else 'no clipping'}, passes of a step on each device "
        f"(micro-batches x samples): {', '.join(cuts)}"
    )


def resolve_ds_config(
    tree: dict[str, Any], recipe: Recipe, stage: Stage, num_shares: int, *, cuda: bool, where: str
) -> tuple[dict[str, Any], StepPlan]:
    """The configuration that the engine gets, with every "auto" filled in, and how a step is cut.

    `num_shares`: shares of a batch (Topology.data); DeepSpeed counts data-parallel ranks alike, as its
    `mpu` is a Topology.
    Raises UserError, in one sentence, for what cannot be or contradicts the recipe.
    """
    stage_number = zero_stage(tree)
    enabled = [name for name in PRECISIONS if tree.get(name, {}).get("enabled", False)]
    if len(enabled) > 1:
        raise UserError(f"{where} enables both bf16 and fp16, expected at most one")
    if enabled and stage_number == 0:
        raise UserError(
            f"{where} says {enabled[0]} with zero_optimization.stage 0, which lacks fp32 weights; use stage 1"
        )
    if enabled == ["fp16"] and not cuda:
        raise UserError(f"{where} enables fp16, which needs a CUDA device; use zero0_fp32.json on a CPU")
    if stage_number == 1 and tree["zero_optimization"].get("overlap_comm"):
        # Hooks of the last backward reduce the gradients, so a parameter that only an earlier stream
        # of the step uses would be left out.
        raise UserError(f"{where} says overlap_comm true with ZeRO stage 1, which loses gradients of streams")

    kind = precision(tree)
    accumulated = tree.get("data_types", {}).get("grad_accum_dtype", kind)
    if accumulated not in ("fp32", kind):
        raise UserError(
            f"{where} says data_types.grad_accum_dtype {accumulated}, which goes with {accumulated} enabled; "
            f"use {' or '.join(sorted({'fp32', kind}))}"
        )
    if any(feed_forward.router == "topk" for feed_forward in recipe.model.feed_forward):
        if stage_number == 3:
            raise UserError(
                f"{where} says zero_optimization.stage 3, which is for recipes without a topk router; "
                "use 1 or 2"
            )
        if kind == "fp16":
            raise UserError(f"{where} enables fp16, which is for recipes without a topk router; use bf16")

    plan = plan_step(tree, recipe, stage, num_shares, where)
    passes = plan.passes(stage)
    micro_batch = plan.micro_batch[stage.streams[0].source]
    decided = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": passes,
        "train_batch_size": micro_batch * passes * num_shares,
        "gradient_clipping": recipe.optimizer.clip or 0.0,
    }
    for key, value in decided.items():
        written = tree.get(key, "auto")
        if written != "auto" and written != value:
            raise UserError(
                f"{where} says {key} {written}, the recipe and {sharers(recipe, num_shares)} make it {value}"
            )
    return {**tree, **decided}, plan
