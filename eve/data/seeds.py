"""Random numbers that depend on what they are for, never on the machine or on what was drawn before.

Everything random in the data is drawn from a generator keyed by a hash of (run seed, epoch, sample, purpose),
so any worker of any rank draws the same crop for the same sample.
"""

from __future__ import annotations

import hashlib

import numpy as np


def key_of(*parts: int | str) -> int:
    """128 bits, a hash of the parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=16).digest(), "little")


def generator(*parts: int | str) -> np.random.Generator:
    """A counter-based generator of its own for these parts (20 µs)."""
    return np.random.Generator(np.random.Philox(key=key_of(*parts)))
