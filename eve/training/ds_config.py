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


def offloads(tree: dict[str, Any]) -> bool:
    """Whether the optimizer's states and fp32 weights lie on the host, where AdamW updates them."""
    offload = tree.get("zero_optimization", {}).get("offload_optimizer", {})
    return offload.get("device", "none") == "cpu"


def precision(tree: dict[str, Any]) -> str:
    """fp32, bf16 or fp16."""
    return next((name for name in PRECISIONS if tree.get(name, {}).get("enabled", False)), "fp32")


def state_format(tree: dict[str, Any]) -> str:
    """What of the config, besides ZeRO stage and precision, decides how DeepSpeed writes optimizer states.

    At stage 1 bf16 with fp32 gradients has a wrapper of its own (BF16_Optimizer), but not when it offloads.
    """
    kind = precision(tree)
    accumulated = tree.get("data_types", {}).get("grad_accum_dtype", kind)
    apart = (zero_stage(tree), kind, accumulated) == (1, "bf16", "fp32") and not offloads(tree)
    return "BF16_Optimizer" if apart else "ZeRO"


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


def routing_group(recipe: Recipe) -> int:
    """What the samples of a forward pass must be a multiple of: every learned router fills whole groups."""
    return math.lcm(*(ff.group_size for ff in recipe.model.feed_forward if ff.router == "topk"))


def plan_step(tree: dict[str, Any], recipe: Recipe, stage: Stage, num_shares: int, where: str) -> StepPlan:
    """Cuts the batch of each source of the stage into `num_shares` (Topology.data), and a share into passes.

    Raises UserError, naming a micro-batch that works, where it does not divide.
    """
    micro_batch = micro_batch_size(tree, recipe, where)
    readers = sharers(recipe, num_shares)
    if recipe.data.num_readers % num_shares:
        raise UserError(f"data.num_readers {recipe.data.num_readers} is not a multiple of the {readers}")
    shares, group = {}, routing_group(recipe)
    for stream in stage.streams:
        batch_size = recipe.data.sources[stream.source].batch_size
        key = f"data.sources.{stream.source}.batch_size {batch_size}"
        if batch_size % num_shares:
            raise UserError(f"{key} is not a multiple of the {readers}")
        share = batch_size // num_shares
        if share % group:
            raise UserError(
                f"{key} gives each of {readers} {share} samples, which is not a multiple of {group}, "
                f"the group_size of the topk routers"
            )
        shares[stream.source] = share
    for source, share in shares.items():
        if micro_batch is None or (share % micro_batch == 0 and micro_batch % group == 0):
            continue
        common = math.gcd(*shares.values())
        fitting = [size for size in range(group, common + 1, group) if common % size == 0]
        works = max((size for size in fitting if size <= micro_batch), default=group)
        written = tree.get("train_micro_batch_size_per_gpu", "auto") != "auto"
        place = f"train_micro_batch_size_per_gpu {works} in {where}"
        cut = (
            f"data.sources.{source}.batch_size {share * num_shares} gives each of {readers} {share} samples, "
            f"which is not a multiple of the micro-batch {micro_batch}"
            if share % micro_batch
            else f"the micro-batch {micro_batch} is not a multiple of {group}, the group_size of the routers"
        )
        raise UserError(f"{cut}; give {place if written else f'training.micro_batch_size={works}'}")
    for stream in stage.streams:
        share = shares[stream.source]
        if stream.is_pooled and stream.pool == "step" and micro_batch is not None and micro_batch < share:
            raise UserError(
                f"stream {stream.name} of stage {stage.name} compares all {share * num_shares} samples of a "
                f"step, but the micro-batch {micro_batch} is less than the {share} of each of {readers}; "
                "give training.micro_batch_size that, take more processes, or pool: micro_batch, which "
                f"compares {micro_batch * num_shares}"
            )
        if stream.is_pooled and num_shares * (micro_batch or share) < 2:
            raise UserError(
                f"stream {stream.name} of stage {stage.name} has nothing to compare: a pass is of one sample"
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
        f"{'states of the optimizer on the host, ' if offloads(config) else ''}"
        f"{f'clipping at {clip}' if clip else 'no clipping'}, passes of a step on each device "
        f"(micro-batches x samples): {', '.join(cuts)}"
    )


def check_combinations(tree: dict[str, Any], recipe: Recipe, *, cuda: bool, where: str) -> None:
    """Raises UserError, in one sentence, for the first combination that cannot work."""
    number, kind, zero = zero_stage(tree), precision(tree), tree.get("zero_optimization", {})
    accumulated = tree.get("data_types", {}).get("grad_accum_dtype", kind)
    learned = any(feed_forward.router == "topk" for feed_forward in recipe.model.feed_forward)
    degrees = {"tensor": recipe.parallel.tensor, "expert": recipe.parallel.expert}
    spread = next((f"parallel.{name} {degree}" for name, degree in degrees.items() if degree > 1), None)
    refused = (
        (
            all(tree.get(name, {}).get("enabled", False) for name in PRECISIONS),
            "enables both bf16 and fp16, expected at most one",
        ),
        (
            kind != "fp32" and number == 0,
            f"says {kind} with zero_optimization.stage 0, where DeepSpeed starts its fp32 weights from "
            "rounded ones; use stage 1, which sends as much and needs less memory",
        ),
        (
            kind == "fp16" and not cuda,
            "enables fp16, which needs a CUDA device; use zero0_fp32.json on a CPU",
        ),
        (kind == "fp16" and learned, "enables fp16, which is for recipes without a topk router; use bf16"),
        (
            accumulated not in ("fp32", kind),
            f"says data_types.grad_accum_dtype {accumulated}, which goes with {accumulated} enabled; "
            f"use {' or '.join(sorted({'fp32', kind}))}",
        ),
        # Hooks of the last backward reduce the gradients, so a parameter that only an earlier stream
        # of the step uses would be left out.
        (
            number == 1 and zero.get("overlap_comm", False),
            "says overlap_comm true with ZeRO stage 1, which loses gradients of streams",
        ),
        (
            number == 0 and offloads(tree),
            "says offload_optimizer with zero_optimization.stage 0, which keeps its states; use 1 or 2",
        ),
        (
            number == 3 and learned,
            "says zero_optimization.stage 3, which is for recipes without a topk router; use 1 or 2",
        ),
        (
            number == 3 and spread is not None,
            f"says zero_optimization.stage 3, which does not go with {spread} of the recipe; use 1 or 2",
        ),
    )
    for found, sentence in refused:
        if found:
            raise UserError(f"{where} {sentence}")
    if recipe.training.compile and spread is not None:
        raise UserError(f"training.compile does not go with {spread}; set one of them to its default")


def resolve_ds_config(
    tree: dict[str, Any], recipe: Recipe, stage: Stage, num_shares: int, *, cuda: bool, where: str
) -> tuple[dict[str, Any], StepPlan]:
    """The configuration that the engine gets, with every "auto" filled in, and how a step is cut.

    `num_shares`: shares of a batch (Topology.data); DeepSpeed counts data-parallel ranks alike, as its
    `mpu` is a Topology.
    Raises UserError, in one sentence, for what cannot be or contradicts the recipe.
    """
    check_combinations(tree, recipe, cuda=cuda, where=where)
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
    # DeepSpeed would insist on its own AdamW for offloaded states.
    return {**tree, **decided, "zero_force_ds_cpu_optimizer": False}, plan
