"""The keys of DeepSpeed's JSON that set up the engine, with their types.

DeepSpeed reads its JSON late, passes over top-level keys that it does not know, and keeps a value of
the wrong type until it fails on it. What is not listed here has not been tried with this engine.
A tree is checked here and handed on as it was written.
"""

from __future__ import annotations

import difflib
import json
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    StrictBool,
    TypeAdapter,
    ValidationError,
    with_config,
)
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from eve.errors import UserError

# The recipe decides these, and a config may leave them to it.
AUTO_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)
# Keys that DeepSpeed knows, or values of them, and why they are refused.
LAYOUT = "tools/convert_checkpoint.py cannot read checkpoints written so"
REFUSED = {
    "optimizer": "that belongs to the recipe (optimizer)",
    "scheduler": "that belongs to the recipe (stages)",
    "zero_force_ds_cpu_optimizer": "offloaded states are updated by torch's fused AdamW, so use false",
    "zero_optimization.offload_param": "weights stay on their device; ZeRO stage 3 cuts them up",
    "zero_optimization.offload_optimizer.device": 'states go to the host ("cpu") or stay ("none")',
    "zero_optimization.offload_optimizer.ratio": "states are offloaded all (1.0) or not at all",
    "zero_optimization.offload_optimizer.nvme_path": 'states go to the host ("cpu") only',
    "zero_optimization.round_robin_gradients": f"{LAYOUT}, so use false",
    "zero_optimization.elastic_checkpoint": f"{LAYOUT}, so use false",
    "zero_optimization.parameter_alignment": f"{LAYOUT}, so use false",
}


def _only_number(value: Any) -> Any:
    # JSON writes 5e8 for an integer, so types are not strict; "5" and true are no numbers all the same.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("a number")
    return value


def _only_boolean(value: Any) -> Any:
    if not isinstance(value, bool):
        raise ValueError("a valid boolean")
    return value


Positive = Annotated[PositiveInt, BeforeValidator(_only_number)]
NotNegative = Annotated[NonNegativeInt, BeforeValidator(_only_number)]
Kind = Literal["fp32", "bf16", "fp16"]
No = Annotated[Literal[False], BeforeValidator(_only_boolean)]
CLOSED = with_config(ConfigDict(extra="forbid", allow_inf_nan=False))


@CLOSED
class OffloadOptimizer(TypedDict, total=False):
    device: Literal["none", "cpu"]
    pin_memory: StrictBool
    ratio: Annotated[float, Field(ge=1, le=1), BeforeValidator(_only_number)]


@CLOSED
class ZeroOptimization(TypedDict, total=False):
    stage: Literal[0, 1, 2, 3]
    contiguous_gradients: StrictBool
    reduce_scatter: StrictBool
    reduce_bucket_size: Positive
    use_multi_rank_bucket_allreduce: StrictBool
    allgather_partitions: StrictBool
    allgather_bucket_size: NotNegative
    overlap_comm: StrictBool
    round_robin_gradients: No
    ignore_unused_parameters: StrictBool
    elastic_checkpoint: No
    parameter_alignment: No
    offload_optimizer: OffloadOptimizer
    sub_group_size: NotNegative
    stage3_prefetch_bucket_size: NotNegative
    stage3_param_persistence_threshold: NotNegative
    stage3_model_persistence_threshold: NotNegative
    stage3_max_live_parameters: NotNegative
    stage3_max_reuse_distance: NotNegative
    stage3_module_granularity_threshold: NotNegative
    stage3_use_all_reduce_for_fetch_params: StrictBool
    stage3_gather_16bit_weights_on_model_save: StrictBool
    memory_efficient_linear: StrictBool


@CLOSED
class BFloat16(TypedDict, total=False):
    enabled: StrictBool
    check_grad_overflow: StrictBool
    immediate_grad_update: StrictBool


@CLOSED
class Float16(TypedDict, total=False):
    enabled: StrictBool
    auto_cast: StrictBool
    loss_scale: Annotated[float, Field(ge=0), BeforeValidator(_only_number)]
    initial_scale_power: NotNegative
    loss_scale_window: Positive
    hysteresis: Positive
    consecutive_hysteresis: StrictBool
    min_loss_scale: Positive


@CLOSED
class DataTypes(TypedDict, total=False):
    grad_accum_dtype: Kind


@CLOSED
class CommsLogger(TypedDict, total=False):
    enabled: StrictBool
    verbose: StrictBool
    prof_all: StrictBool
    prof_ops: list[str]
    debug: StrictBool


@CLOSED
class EngineKeys(TypedDict, total=False):
    train_batch_size: Positive
    train_micro_batch_size_per_gpu: Positive
    gradient_accumulation_steps: Positive
    gradient_clipping: Annotated[float, Field(ge=0), BeforeValidator(_only_number)]
    zero_optimization: ZeroOptimization
    zero_force_ds_cpu_optimizer: No
    bf16: BFloat16
    fp16: Float16
    data_types: DataTypes
    communication_data_type: Kind | None
    prescale_gradients: StrictBool
    gradient_predivide_factor: Annotated[float, Field(gt=0), BeforeValidator(_only_number)]
    steps_per_print: Positive | None
    wall_clock_breakdown: StrictBool
    memory_breakdown: StrictBool
    dump_state: StrictBool
    comms_logger: CommsLogger


_KEYS = TypeAdapter(EngineKeys)


def check_keys(tree: dict[str, Any], where: str) -> None:
    """Raises UserError, in one sentence, for an unknown or refused key or a value of the wrong type."""
    decided = {key: value for key, value in tree.items() if not (key in AUTO_KEYS and value == "auto")}
    try:
        _KEYS.validate_python(decided)
    except ValidationError as error:
        raise UserError(f"{where} {_mistake(error)}") from None


def _mistake(error: ValidationError) -> str:
    """The first mistake; the file is the subject of the sentence."""
    first = error.errors()[0]
    *parents, last = first["loc"]
    key = ".".join(str(part) for part in first["loc"])
    if key in REFUSED:
        unknown = first["type"] == "extra_forbidden"
        found = f"has the key {key}" if unknown else f"says {key} {json.dumps(first['input'])}"
        return f"{found}; {REFUSED[key]}"
    if first["type"] == "extra_forbidden":
        section: Any = EngineKeys
        for part in parents:
            section = get_type_hints(section)[str(part)]
        near = difflib.get_close_matches(str(last), list(get_type_hints(section)), n=1)
        return f"has the unknown key {key}" + (f"; did you mean {near[0]}?" if near else "")
    expected = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if first["type"] == "dict_type":
        expected = "an object"
    return f"says {key} {json.dumps(first['input'])}, expected {expected}"
