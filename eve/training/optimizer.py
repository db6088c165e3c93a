"""AdamW: which parameters learn, which decay, and a step that clips by itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from eve.config import Optimizer
from eve.errors import UserError
from eve.parallel.sharding import canonical


def learning_names(names: Collection[str], trainable: Sequence[str]) -> list[str]:
    """Of those names, the ones that a pattern (fnmatch) matches. Raises UserError where one matches none."""
    for pattern in trainable:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f"stages.trainable has the pattern '{pattern}', which matches no parameter such as "
                f"{next(iter(names))}"
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in trainable)]


def freeze(module: nn.Module, learning: Collection[str]) -> None:
    """Sets `requires_grad`; `learning` are the names on one device of what learns."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad = canonical(name) in learning


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters that learn, in groups: with decay and without; spread experts apart for DeepSpeed.

    Norms, biases and gains have one dimension and do not decay, nor do tables of embeddings. What else
    shall not (stacked biases of experts, positions) the model marks: `parameter.no_weight_decay = True`.
    """
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}

    def decays(parameter: nn.Parameter) -> bool:
        marked = getattr(parameter, "no_weight_decay", False) or id(parameter) in tables
        return parameter.ndim > 1 and not marked

    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    experts = [p for p in learning if not getattr(p, "allreduce", True)]
    dense = [p for p in learning if getattr(p, "allreduce", True)]
    decay, no_decay = {"weight_decay": weight_decay}, {"weight_decay": 0.0}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in dense if decays(p)], **decay, "name": "decay"},
        {"params": [p for p in dense if not decays(p)], **no_decay, "name": "no_decay"},
    ]
    if experts:
        # DeepSpeed finds the copies of an expert by the name of its group.
        spread = {"name": experts[0].group_name, "moe": True}  # pyright: ignore
        groups += [
            {"params": [p for p in experts if decays(p)], **decay, **spread},
            {"params": [p for p in experts if not decays(p)], **no_decay, **spread},
        ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    module: nn.Module, config: Optimizer, *, norm: Callable[[list[nn.Parameter]], Tensor] | None
) -> torch.optim.AdamW:
    """`norm` of all gradients: the optimizer clips by itself, for an engine without ZeRO."""
    groups = parameter_groups(module, config.weight_decay)
    options: dict[str, Any] = {"lr": 0.0, "betas": config.betas, "eps": config.eps, "fused": True}
    if norm is not None:
        return ClippingAdamW(groups, clip=config.clip or float("inf"), norm=norm, **options)
    return torch.optim.AdamW(groups, **options)


class ClippingAdamW(torch.optim.AdamW):
    """torch's fused AdamW that also does what DeepSpeed's ZeRO wrappers do around theirs.

    A step takes the norm of the whole gradient, scales it down to at most `clip` inside the fused
    kernel (the norm is the only added pass over the gradients), and changes nothing where the norm is
    not finite. `overflow` and `_global_grad_norm` are the names under which the engine looks.
    """

    grad_scale: Tensor | None = None

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        clip: float,
        norm: Callable[[list[nn.Parameter]], Tensor],
        **options: Any,
    ) -> None:
        super().__init__(groups, **options)
        self.clip, self.norm = clip, norm
        self.overflow = False
        self._global_grad_norm: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        norm = self.norm([parameter for group in self.param_groups for parameter in group["params"]])
        self._global_grad_norm = norm
        self.overflow = not bool(torch.isfinite(norm))
        if not self.overflow:
            # The fused kernel divides the gradient by this.
            self.grad_scale = ((norm + 1e-6) / self.clip).clamp(min=1.0)
            super().step()
            self.grad_scale = None
