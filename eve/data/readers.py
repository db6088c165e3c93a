"""Virtual readers: who reads which sample of a set of shards when, and the reading.

The samples of a set are numbered by shard name and position in the shard. For each epoch the shards are
laid in a row in a random order, the row is cut into `num_readers` ranges, and each reader shuffles its
range. With N = 10 samples in shards a (0-3), b (4-6), c (7-9) and 3 readers, an epoch may be

    row        c: 7 8 9   a: 0 1 2 3   b: 4 5 6
    ranges     7 8 9 | 0 1 2 | 3 4 5 6
    shuffled   8 7 9 | 1 0 2 | 4 3 6 5

Reader r has floor(((e + 1) N + r) / R) - floor((e N + r) / R) samples of epoch e. By Hermite's identity
these sum to N, and their sums over epochs to floor(e N / R) or one more: each sample is read once an
epoch, and no reader runs ahead of another by more than a sample, though R need not divide N and a shard
may be shared.

A range is shuffled by displacement: the sample at place i goes to the place that i + U(0, shuffle_buffer)
has among all of these. That is what a shuffle buffer of `shuffle_buffer` samples can do on a stream: when
place i is handed out, all places up to i - shuffle_buffer have been.

So the order is a pure function of (key, counts, num_readers, shuffle_buffer), and all that a reader has to
remember is (epoch, position).

Shape suffixes: S shard, N sample of a reader's range.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from eve.data.seeds import generator
from eve.data.shards import BadSample, LocalShards, RawSample, Shard, ShardSet, stream_shard


@dataclass(frozen=True)
class Order:
    """The order of a set. `key`: whatever the shuffles shall depend on; `counts`: samples of each shard."""

    key: int
    counts: tuple[int, ...]
    num_readers: int
    shuffle_buffer: int

    @cached_property
    def starts_S(self) -> np.ndarray:
        """Number of the first sample of each shard."""
        return np.cumsum([0, *self.counts[:-1]])

    def quota(self, reader: int, epoch: int) -> int:
        """Samples of the epoch that are the reader's."""
        total, readers = sum(self.counts), self.num_readers
        return ((epoch + 1) * total + reader) // readers - (epoch * total + reader) // readers

    def epoch(self, reader: int, epoch: int) -> Epoch:
        first = sum(self.quota(before, epoch) for before in range(reader))
        shards_S = generator(self.key, "shards", epoch).permutation(len(self.counts))
        places_N = np.arange(self.quota(reader, epoch))
        displaced_N = places_N + self.shuffle_buffer * generator(self.key, "shuffle", reader, epoch).random(
            len(places_N)
        )
        rows_N = first + np.argsort(displaced_N, kind="stable")
        row_starts_S = np.cumsum([0, *np.asarray(self.counts)[shards_S][:-1]])
        return Epoch(rows_N, shards_S, row_starts_S)


@dataclass(frozen=True)
class Epoch:
    """A reader's share of an epoch: `rows_N` places in the row of all samples, in reading order.

    `shards_S` is the row's order of the shards, `row_starts_S` the place of the first sample of each.
    """

    rows_N: np.ndarray
    shards_S: np.ndarray
    row_starts_S: np.ndarray

    def slot(self, row: int) -> int:
        """Which shard of the row holds that place."""
        # An empty shard starts where the next one does; "right" steps over it.
        return int(np.searchsorted(self.row_starts_S, row, side="right")) - 1

    def locate(self, row: int) -> tuple[int, int]:
        """(shard number, position in the shard) of a place in the row."""
        slot = self.slot(row)
        return int(self.shards_S[slot]), int(row - self.row_starts_S[slot])


@dataclass(frozen=True)
class Read:
    """What a reader read: `raw` is the sample, or a BadSample where there was none to read."""

    epoch: int
    index: int
    raw: RawSample | BadSample


class Reader:
    """One virtual reader of one set: an endless iterator over its samples, epoch after epoch.

    `cursor` is (epoch, position): what the next sample will be. It can be set.
    """

    def __init__(
        self,
        shard_set: ShardSet,
        order: Order,
        reader: int,
        wanted: Callable[[str], bool],
        files: LocalShards | None,
    ) -> None:
        """`wanted` tells which extensions to read; `files`, for a local set, is shared in a process."""
        self._shard_set, self._order, self._reader = shard_set, order, reader
        self._wanted, self._files = wanted, files
        self.cursor = (0, 0)

    @property
    def cursor(self) -> tuple[int, int]:
        return (self._epoch_number, self._position)

    @cursor.setter
    def cursor(self, cursor: tuple[int, int]) -> None:
        self._epoch_number, self._position = cursor
        # Computed when a sample is asked for: a cursor is cheap, the order of an epoch is not.
        self._epoch: Epoch | None = None
        self._stream: Iterator[RawSample | BadSample] | None = None
        self._next_row = 0
        self._held: dict[int, RawSample | BadSample] = {}
        self._done: frozenset[int] = frozenset()

    def __iter__(self) -> Reader:
        return self

    def __next__(self) -> Read:
        epoch = self._epoch or self._open()
        while self._position == len(epoch.rows_N):
            self.cursor = (self._epoch_number + 1, 0)
            epoch = self._open()
        row = int(epoch.rows_N[self._position])
        shard, position = epoch.locate(row)
        if self._files is not None:
            raw = self._files.read(shard, position, self._wanted)
        else:
            raw = self._read_streamed(epoch, row)
        self._position += 1
        return Read(self._epoch_number, int(self._order.starts_S[shard]) + position, raw)

    def _open(self) -> Epoch:
        self._epoch = self._order.epoch(self._reader, self._epoch_number)
        return self._epoch

    def _read_streamed(self, epoch: Epoch, row: int) -> RawSample | BadSample:
        """Streams up to the place `row`, holding what comes before it and is still to be handed out."""
        if self._stream is None:
            wanted_N = epoch.rows_N[self._position :]
            self._next_row = int(wanted_N.min())
            self._stream = self._stream_from(epoch, self._next_row, int(wanted_N.max()))
            self._done = frozenset(epoch.rows_N[: self._position].tolist())
        while row not in self._held:
            raw = next(self._stream)
            if self._next_row not in self._done:
                self._held[self._next_row] = raw
            self._next_row += 1
        return self._held.pop(row)

    def _stream_from(self, epoch: Epoch, first: int, last: int) -> Iterator[RawSample | BadSample]:
        """The samples of the row from place `first` to `last`; a BadSample for each that its shard lacks."""
        row = first
        while row <= last:
            slot = epoch.slot(row)
            shard: Shard = self._shard_set.shards[epoch.shards_S[slot]]
            start = int(epoch.row_starts_S[slot])
            for raw in stream_shard(shard, row - start, self._wanted):
                yield raw
                row += 1
