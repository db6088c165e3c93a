"""Initial weights as a function of (seed, parameter name).

Every parameter has a generator of its own, so a weight does not depend on the order of
construction, and a rank that holds a slice of it can draw the whole and cut.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

_ZERO = re.compile(r"(^|\.)(bias|[qkv]_bias|b1_E?F|b2_E?D|table_TRH)$")
_ONE = re.compile(r"(^|\.|_)norm\d?\.weight$")
_KEPT = re.compile(r"\.(gamma[12]|temperature_\w+)$")
_RESCALED = re.compile(r"blocks\.(\d+)\.(attention\.proj\.(?:\w+\.)?weight|feed_forward\.\S+\.w2_E?FD)$")


def generator_for(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def initial_value(name: str, shape: torch.Size, seed: int, std: float, rescale: bool) -> Tensor | None:
    """fp32 value of a parameter, or None where the constructor's value stands (LayerScale,
    temperatures)."""
    if _KEPT.search(name):
        return None
    if _ZERO.search(name):
        return torch.zeros(shape)
    if _ONE.search(name):
        return torch.ones(shape)
    value = torch.empty(shape)
    # Cut at one standard deviation, as BEiT, VLMo and EVE have it.
    nn.init.trunc_normal_(value, std=std, a=-std, b=std, generator=generator_for(seed, name))
    match = _RESCALED.search(name)
    if match and rescale:
        value /= (2 * (int(match[1]) + 1)) ** 0.5
    return value


@torch.no_grad()
def initialise(
    parameters: dict[str, nn.Parameter],
    shapes: dict[str, torch.Size],
    cut: Callable[[str, Tensor], Tensor],
    *,
    seed: int,
    std: float,
    rescale: bool,
) -> None:
    """Fills parameters by name. `shapes` are of the whole ones; `cut(name, whole)` is the part held."""
    for name, parameter in parameters.items():
        value = initial_value(name, shapes[name], seed, std, rescale)
        if value is not None:
            parameter.copy_(cut(name, value))
