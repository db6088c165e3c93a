"""AdamW: which parameters learn, which decay, and a step that clips by itself."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from eve.config import Optimizer
from eve.errors import UserError


def freeze(module: nn.Module, trainable: Sequence[str]) -> list[str]:
    """Sets `requires_grad` by name patterns (fnmatch); returns the names that learn.

    Raises UserError where a pattern matches no parameter.
    """
    names = [name for name, _ in module.named_parameters()]
    for pattern in trainable:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f"stages.trainable has the pattern '{pattern}', which matches no parameter such as {names[0]}"
            )
    learning = []
    for name, parameter in module.named_parameters():
        parameter.requires_grad = any(fnmatchcase(name, pattern) for pattern in trainable)
        if parameter.requires_grad:
            learning.append(name)
    return learning


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters that learn, in two groups: with decay and without.

    Norms, biases and gains have one dimension and do not decay, nor do tables of embeddings. What else
    shall not (stacked biases of experts, positions) the model marks: `parameter.no_weight_decay = True`.
    """
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}

    def decays(parameter: nn.Parameter) -> bool:
        marked = getattr(parameter, "no_weight_decay", False) or id(parameter) in tables
        return parameter.ndim > 1 and not marked

    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in learning if decays(p)], "weight_decay": weight_decay, "name": "decay"},
        {"params": [p for p in learning if not decays(p)], "weight_decay": 0.0, "name": "no_decay"},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(module: nn.Module, config: Optimizer, *, clips: bool) -> torch.optim.AdamW:
    """`clips`: the optimizer takes care of the gradient's norm itself, for an engine without ZeRO."""
    groups = parameter_groups(module, config.weight_decay)
    options: dict[str, Any] = {"lr": 0.0, "betas": config.betas, "eps": config.eps, "fused": True}
    if clips:
        return ClippingAdamW(groups, clip=config.clip or float("inf"), **options)
    return torch.optim.AdamW(groups, **options)


class ClippingAdamW(torch.optim.AdamW):
    """torch's fused AdamW that also does what DeepSpeed's ZeRO wrappers do around theirs.

    A step takes the norm of the whole gradient, scales it down to at most `clip` inside the fused
    kernel (the norm is the only added pass over the gradients), and changes nothing where the norm is
    not finite. `overflow` and `_global_grad_norm` are the names under which the engine looks.
    """

    grad_scale: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]], *, clip: float, **options: Any) -> None:
        super().__init__(groups, **options)
        self.clip = clip
        self.overflow = False
        self._global_grad_norm: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self._global_grad_norm = norm
        self.overflow = not bool(torch.isfinite(norm))
        if not self.overflow:
            # The fused kernel divides the gradient by this.
            self.grad_scale = ((norm + 1e-6) / self.clip).clamp(min=1.0)
            super().step()
            self.grad_scale = None
