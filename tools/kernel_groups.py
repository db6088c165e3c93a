"""Where the time of a step goes: what a profiler saw, in the groups that people ask about.

An operator belongs to the nearest scope around it: an operator of kernels/, attention, the optimizer, a
router (`routers_named`). What the backward runs for an operator belongs where that operator does; autograd
numbers both alike. What is in no scope belongs by its own name.

On a GPU the time is that of the device's kernels, each counted with the operator that launched it; on a CPU
that of the operators themselves.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.profiler import record_function

# Else the profiler tells each of its starts.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

SCOPES = {
    "grouped products": r"expert_feed_forward|grouped_linear|grouped_mm|grouped_product",
    "dispatch, combine": r"eve_kernels::_?(dispatch|combine)|^_?(Dispatch|Combine)(Backward)?$|row_tiles",
    "routing": r"eve_kernels::_?route|eve: routing",
    "losses": r"masked_text_loss|masked_pixel_loss|_ShardLoss|cross_entropy|nll_loss",
    "attention": r"scaled_dot_product|varlen|flash_attention|efficient_attention|flex_attention",
    "optimizer": r"^Optimizer\.step|_fused_adam|eve: optimizer|clip_grad",
}
NAMES = {
    "dense products": r"aten::(mm|addmm|addmv|bmm|baddbmm|matmul|linear|mv|dot)$|gemm|nvjet|cutlass|cublas",
    "copies": r"aten::(copy_|_to_copy|to|clone|contiguous|cat|stack|pin_memory|item|_local_scalar_dense)$"
    r"|Memcpy|Memset|CatArray",
    "norms, elementwise": r"^aten::|elementwise|layer_norm|reduce|softmax|index|gather|scatter|triton_",
}
GROUPS = (*SCOPES, *NAMES, "other")
_SCOPES = {group: re.compile(pattern) for group, pattern in SCOPES.items()}
_NAMES = {group: re.compile(pattern) for group, pattern in NAMES.items()}
_BACKWARD = "autograd::engine::evaluate_function"


@contextmanager
def routers_named(module: nn.Module) -> Iterator[None]:
    """Within, the forward of each router is a scope of its own."""
    handles = []
    for router in module.modules():
        if not type(router).__name__.endswith("Router"):
            continue
        scopes: list[Any] = []

        def enter(*_: Any, scopes: list[Any] = scopes) -> None:
            scopes.append(record_function("eve: routing").__enter__())

        def leave(*_: Any, scopes: list[Any] = scopes) -> None:
            scopes.pop().__exit__(None, None, None)

        handles += [router.register_forward_pre_hook(enter), router.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def seconds_by_group(events: Iterable[Any], device: torch.device) -> dict[str, float]:
    """Of `torch.profiler.profile.events()`; all of GROUPS, largest first."""
    events = list(events)
    host = [event for event in events if event.device_type.name == "CPU"]
    cuda = device.type == "cuda"
    scope_of_number: dict[int, str] = {}
    for event in host:
        if event.sequence_nr >= 0 and not event.name.startswith(_BACKWARD):
            scope = _scope(event, {})
            if scope is not None:
                scope_of_number[event.sequence_nr] = scope
    seconds: dict[str, float] = defaultdict(float)
    for event in host:
        own = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
        if own > 0:
            seconds[_scope(event, scope_of_number) or _by_name(event.name)] += own
    if cuda:
        # Kernels that no operator of the host is known to have launched.
        device_time = sum(
            event.self_device_time_total / 1e6
            for event in events
            if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)
        )
        seconds["other"] += max(0.0, device_time - sum(seconds.values()))
    return dict(sorted(((g, seconds.get(g, 0.0)) for g in GROUPS), key=lambda each: -each[1]))


def _scope(event: Any, scope_of_number: dict[int, str]) -> str | None:
    while event is not None:
        for group, pattern in _SCOPES.items():
            if pattern.search(event.name):
                return group
        if event.name.startswith(_BACKWARD) and event.sequence_nr in scope_of_number:
            return scope_of_number[event.sequence_nr]
        event = event.cpu_parent
    return None


def _by_name(name: str) -> str:
    return next((group for group, pattern in _NAMES.items() if pattern.search(name)), "other")
