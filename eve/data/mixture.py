"""A source: sets of shards mixed by weight, read by virtual readers.

The set of a reader's n-th sample is drawn by weight from a hash of (seed, reader, n), so the mixture needs
no state but n. Each set goes through its own epochs. `index` of a sample counts through the sets: it
is the sample's number in its set plus the number of samples of the sets before.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from eve.config import Data, Source
from eve.data.readers import Order, Read, Reader
from eve.data.seeds import key_of
from eve.data.shards import LocalShards, ShardSet, resolve
from eve.errors import UserError


class MixedReader:
    """One virtual reader of a source: an endless iterator of `Read`.

    `cursor` is {"draws": samples read so far, "sets": [[epoch, position] of each set]}.
    """

    def __init__(
        self, readers: list[Reader], weights: tuple[float, ...], offsets: tuple[int, ...], key: int
    ) -> None:
        self._readers, self._offsets, self._key = readers, offsets, key
        self._cumulative = list(accumulate(weights))
        self._draws = 0

    @property
    def cursor(self) -> dict[str, Any]:
        return {"draws": self._draws, "sets": [list(reader.cursor) for reader in self._readers]}

    @cursor.setter
    def cursor(self, cursor: dict[str, Any]) -> None:
        self._draws = cursor["draws"]
        for reader, (epoch, position) in zip(self._readers, cursor["sets"], strict=True):
            reader.cursor = (epoch, position)

    def __iter__(self) -> MixedReader:
        return self

    def __next__(self) -> Read:
        number = 0
        if len(self._readers) > 1:
            uniform = (key_of(self._key, self._draws) >> 64) / 2**64
            number = bisect_right(self._cumulative, uniform * self._cumulative[-1])
            # Rounding may lift the product to the sum itself.
            number = min(number, len(self._readers) - 1)
        self._draws += 1
        read = next(self._readers[number])
        return replace(read, index=self._offsets[number] + read.index)


@dataclass(frozen=True)
class Mixture:
    """What the order of a source depends on; picklable."""

    sets: tuple[ShardSet, ...]
    weights: tuple[float, ...]
    seed: int
    num_readers: int
    shuffle_buffer: int

    @classmethod
    def of(cls, source: Source, data: Data, seed: int) -> Mixture:
        """Finds the shards and their counts. Raises UserError."""
        return cls(
            sets=tuple(resolve(shards.shards) for shards in source.mix),
            weights=tuple(shards.weight for shards in source.mix),
            seed=seed,
            num_readers=data.num_readers,
            shuffle_buffer=data.shuffle_buffer,
        )

    @property
    def num_samples(self) -> int:
        return sum(shard_set.num_samples for shard_set in self.sets)

    def open(self, readers: Iterable[int], wanted: Callable[[str], bool]) -> list[MixedReader]:
        """These virtual readers at their start. `wanted` tells which extensions to read."""
        readers = list(readers)
        # A reader goes back and forth over less than two shuffle buffers, and a shard more at either end.
        files = [
            LocalShards(shard_set, len(readers) * 2 * (self.shuffle_buffer + max(shard_set.counts)))
            if shard_set.local
            else None
            for shard_set in self.sets
        ]
        orders = [
            Order(key_of(self.seed, "order", number), shard_set.counts, self.num_readers, self.shuffle_buffer)
            for number, shard_set in enumerate(self.sets)
        ]
        offsets = tuple(accumulate((shard_set.num_samples for shard_set in self.sets), initial=0))
        return [
            MixedReader(
                [
                    Reader(shard_set, order, reader, wanted, shared)
                    for shard_set, order, shared in zip(self.sets, orders, files, strict=True)
                ],
                self.weights,
                offsets,
                key_of(self.seed, "mixture", reader),
            )
            for reader in readers
        ]

    def fingerprint(self) -> dict[str, Any]:
        """Small and JSON-able: cursors mean the same only where this is equal."""
        return {
            "seed": self.seed,
            "num_readers": self.num_readers,
            "shuffle_buffer": self.shuffle_buffer,
            "sets": [
                {
                    "shards": len(shard_set.shards),
                    "samples": shard_set.num_samples,
                    "hash": hashlib.sha256(
                        json.dumps([(shard.name, shard.samples) for shard in shard_set.shards]).encode()
                    ).hexdigest()[:16],
                }
                for shard_set in self.sets
            ],
        }

    def refuse_other(self, fingerprint: dict[str, Any]) -> None:
        """Raises UserError, naming what differs, where cursors of that fingerprint mean something else."""
        own = self.fingerprint()
        for name in ("seed", "num_readers", "shuffle_buffer"):
            if own[name] != fingerprint[name]:
                raise UserError(
                    f"the state of the data was saved with {name} {fingerprint[name]}, "
                    f"this run has {own[name]}"
                )
        if len(own["sets"]) != len(fingerprint["sets"]):
            raise UserError(
                f"the state of the data was saved with {len(fingerprint['sets'])} sets of shards in the mix, "
                f"this run has {len(own['sets'])}"
            )
        for shard_set, ours, theirs in zip(self.sets, own["sets"], fingerprint["sets"], strict=True):
            if ours != theirs:
                raise UserError(
                    f"the state of the data was saved with other shards than '{shard_set.pattern}': it had "
                    f"{theirs['shards']} shards with {theirs['samples']} samples (hash of names and counts "
                    f"{theirs['hash']}), now there are {ours['shards']} with {ours['samples']} "
                    f"({ours['hash']})"
                )
