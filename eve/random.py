"""Random numbers that belong to a sample, not to a machine.

Dropout, drop path and router noise are hashes of (the sample's seed, where the number is used), so
a model is a deterministic function of parameters and batch: the same on any number of ranks and
micro-batches, in a recomputation, and after a resume, with no generator state to keep.

The hash is the finaliser of SplitMix64 (Steele, Lea, Flood 2014) on wrapping int64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical, not arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(seed: Tensor, counter: Tensor | int) -> Tensor:
    """A new int64 seed for each (seed, counter); the two broadcast."""
    # The product wraps in a tensor; of a Python number it is wrapped here.
    step = (counter + 1) * _GOLDEN
    x = seed + (step if isinstance(step, Tensor) else _signed(step % (1 << 64)))
    x = (x ^ _shift_right(x, 30)) * _MULTIPLIER_1
    x = (x ^ _shift_right(x, 27)) * _MULTIPLIER_2
    return x ^ _shift_right(x, 31)


def uniform(seed: Tensor, counter: Tensor | int) -> Tensor:
    """fp32 numbers in [0, 1) with 24 random bits, one for each (seed, counter)."""
    return _shift_right(mix(seed, counter), 40).to(torch.float32) * 2.0**-24


def keep_scale(seed: Tensor, counter: Tensor | int, drop: float) -> Tensor:
    """1 / (1 - drop) with probability 1 - drop, else 0: what dropout multiplies by."""
    return (uniform(seed, counter) >= drop).to(torch.float32) / (1.0 - drop)


def normal(seed: Tensor, counter: Tensor | int) -> Tensor:
    """fp32 standard normal numbers, one for each (seed, counter); none is beyond 5.5."""
    # The middles of 2^24 intervals of (-1, 1), which fp32 holds exactly; at the ends erfinv is infinite.
    symmetric = uniform(seed, counter) * 2.0 - (1.0 - 2.0**-24)
    return torch.erfinv(symmetric) * 2.0**0.5


def gumbel(seed: Tensor, counter: Tensor | int) -> Tensor:
    """fp32 standard Gumbel numbers, -log(-log(u)), one for each (seed, counter); from -2.9 to 16.7."""
    return -torch.log(-torch.log(uniform(seed, counter).clamp_min(2.0**-25)))
