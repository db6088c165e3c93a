"""What a peer is: something that computes the operation, or that says in one sentence why it cannot."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.benchmark.cost import Cost


class Unavailable(Exception):
    """Not installed, or not made for this device or shape; the message is shown in the table."""


@dataclass(frozen=True)
class Call:
    """
    Attributes:
        forward: the timed operation; its floating-point results with a gradient are what backward starts at.
        leaves: name -> tensor whose gradient backward makes.
        comparable: results -> name -> tensor, in an order that all peers agree on. Not timed. Empty: a
            ceiling, which computes something else and is not compared.
        comparable_gradients: the same of the gradients of the leaves.
        backward: instead of autograd, for a ceiling.
    """

    forward: Callable[[], Any]
    leaves: dict[str, Tensor]
    comparable: Callable[[Any], dict[str, Tensor]] = lambda results: {}
    comparable_gradients: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda gradients: gradients
    backward: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Peer:
    """`make(inputs)` gives the Call; the inputs are those of the operation's file, the same for all peers."""

    name: str
    make: Callable[[Any], Call]
    compiles: bool = False


def module(package: str, name: str | None = None) -> Any:
    """The module `name` of an optional package.

    Raises:
        Unavailable: not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise Unavailable("not installed")
    return importlib.import_module(name or package)


def on_gpu(tensor: Tensor) -> None:
    if not tensor.is_cuda:
        raise Unavailable("runs on a GPU only")


def clone_of(forward: Cost, backward: Cost, device: torch.device) -> Call:
    """torch.clone that moves as many bytes: half are read, half are written."""
    buffers = [torch.empty(cost.bytes // 2, dtype=torch.uint8, device=device) for cost in (forward, backward)]
    return Call(buffers[0].clone, {}, backward=buffers[1].clone)


def differentiable(results: Any) -> list[Tensor]:
    """The tensors of a result, however nested, that have a gradient."""
    if isinstance(results, Tensor):
        return [results] if results.requires_grad else []
    if isinstance(results, (tuple, list)):
        return [tensor for each in results for tensor in differentiable(each)]
    fields = getattr(results, "__dataclass_fields__", {})
    return [tensor for name in fields for tensor in differentiable(getattr(results, name))]
