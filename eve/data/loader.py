"""The stream of a rank: its share of every global batch, and the state to go on from.

R virtual readers (`data.num_readers`) give batch_size / R samples each to a step. Of 8 readers on 2 ranks
with 3 workers, rank 0 owns the readers 0-3, its workers 0, 1 and 2-3; rank 1 owns 4-7. A rank's share is in
the order of its readers, so the shares one after another are the global batch, the same list on any
number of ranks and workers.

A broken sample is skipped: its reader takes its next one, and counts it by reason. The state after a step
holds a cursor and these counts for each reader:

    {"version": 1, "fingerprint": {...}, "readers": {
        "0": {"cursor": {"draws": 40, "sets": [[0, 40]]}, "read": 40, "bad": {"undecodable image": 1},
              "first_bad": [["000.tar", "000017", "undecodable image"]]}, ...}}
"""

from __future__ import annotations

import copy
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from eve.config import Data, Source
from eve.data.batch import Masking, Sample
from eve.data.manifest import Kind, parse_text
from eve.data.mixture import MixedReader, Mixture
from eve.data.readers import Read
from eve.data.samples import SampleMaker
from eve.data.shards import BadSample, LocalShards, ShardSet, resolve, stream_shard
from eve.data.tokenizer import Tokenizer
from eve.data.transforms import Transform
from eve.data.workers import Workers
from eve.errors import UserError

VERSION = 1
# Different broken samples that a reader remembers by name.
MAX_NAMED = 20
# Samples read before the share of broken ones means anything.
MIN_READ = 32
# Broken samples one after another in a reader before a worker judges by its own readers alone.
MAX_IN_A_ROW = 1000

logger = logging.getLogger(__name__)


@dataclass
class Tally:
    """What a reader read and what of it was broken, since the first step."""

    read: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    first_bad: list[list[str]] = field(default_factory=list)

    def add(self, bad: BadSample) -> None:
        self.bad[bad.reason] += 1
        named = [bad.shard, bad.key, bad.reason]
        if len(self.first_bad) < MAX_NAMED and named not in self.first_bad:
            self.first_bad.append(named)


@dataclass(frozen=True)
class BadSamples:
    """Broken samples of some readers: how many of how many, by reason, and the first (shard, key, reason)."""

    read: int
    bad: int
    reasons: dict[str, int]
    first: list[tuple[str, str, str]]

    def refuse_more_than(self, share: float, where: str) -> None:
        """Raises UserError past the share, and past what chance may add to it (three standard deviations of
        a Poisson count), so that one broken sample in the first hundred does not end a run."""
        allowed = share * self.read
        if self.read >= MIN_READ and self.bad > allowed + 3 * math.sqrt(allowed):
            shard, key, reason = self.first[0]
            raise UserError(
                f"{self.bad} of {self.read} samples read from {where} are broken, more than "
                f"data.max_bad_share {share:g} allows; the first is {key} of shard {shard}: {reason}"
            )


def bad_samples(state: dict[str, Any]) -> BadSamples:
    """The broken samples that a state (of one rank, or merged) knows of."""
    readers = [state["readers"][number] for number in sorted(state["readers"], key=int)]
    reasons: Counter[str] = Counter()
    for reader in readers:
        reasons.update(reader["bad"])
    return BadSamples(
        read=sum(reader["read"] for reader in readers),
        bad=sum(reasons.values()),
        reasons=dict(reasons),
        first=[(shard, key, reason) for reader in readers for shard, key, reason in reader["first_bad"]],
    )


class ReaderShare:
    """The part of every step that some consecutive readers give: `per_reader` samples each."""

    def __init__(
        self,
        mixture: Mixture,
        maker: SampleMaker,
        readers: Iterable[int],
        per_reader: int,
        max_bad_share: float,
        states: dict[str, Any],
    ) -> None:
        """`states`: of each reader by its number, as in the state of a step; a reader without starts."""
        self._maker, self._per_reader, self._max_bad_share = maker, per_reader, max_bad_share
        self._num_samples = mixture.num_samples
        self._where = _where(mixture)
        self._readers: dict[str, MixedReader] = {}
        self._tallies: dict[str, Tally] = {}
        numbers = list(readers)
        for number, reader in zip(numbers, mixture.open(numbers, maker.wanted), strict=True):
            name = str(number)
            self._readers[name], self._tallies[name] = reader, Tally()
            if name in states:
                reader.cursor = states[name]["cursor"]
                self._tallies[name] = Tally(
                    states[name]["read"], Counter(states[name]["bad"]), list(states[name]["first_bad"])
                )

    def step(self) -> tuple[list[Sample], dict[str, Any]]:
        """(samples in the order of the readers, the state of each reader after them)."""
        samples = [self._next_sample(name) for name in self._readers for _ in range(self._per_reader)]
        return samples, self.states()

    def states(self) -> dict[str, Any]:
        return {
            name: {
                "cursor": reader.cursor,
                "read": self._tallies[name].read,
                "bad": dict(self._tallies[name].bad),
                "first_bad": list(self._tallies[name].first_bad),
            }
            for name, reader in self._readers.items()
        }

    def _next_sample(self, name: str) -> Sample:
        tally = self._tallies[name]
        in_a_row = 0
        while True:
            read = next(self._readers[name])
            tally.read += 1
            try:
                return self._maker.make(read)
            except BadSample as bad:
                tally.add(bad)
                in_a_row += 1
            # The share is judged once a step, by the rank. A reader that finds nothing good never gets there.
            found = bad_samples({"readers": self.states()}) if in_a_row % MAX_IN_A_ROW == 0 else None
            if found is not None:
                found.refuse_more_than(self._max_bad_share, self._where)
            if in_a_row > self._num_samples:
                shard, key, reason = tally.first_bad[0]
                raise UserError(
                    f"reader {name} met {in_a_row} broken samples of {self._where} in a row and no other; "
                    f"the first is {key} of shard {shard}: {reason}"
                )


class SourceStream:
    """This rank's share of the global batches of a source, without end.

    Iterating yields (samples, state): the samples in reader order, and the JSON-able position after them for
    this rank's readers, whatever was prefetched. States of all ranks merge by `merge_states`; `load_state`
    takes that, on any number of ranks and workers. Raises UserError for shards that are missing or without
    counts, readers that do not divide over the ranks, and too many broken samples.
    """

    def __init__(
        self,
        source: Source,
        data: Data,
        *,
        seed: int,
        image_size: int,
        max_text_length: int,
        tokenizer: Tokenizer | None,
        maskings: dict[str, Masking],
        rank: int,
        num_ranks: int,
        num_workers: int,
    ) -> None:
        if data.num_readers % num_ranks:
            raise UserError(
                f"data.num_readers {data.num_readers} is not a multiple of the number of ranks, {num_ranks}"
            )
        self._mixture = Mixture.of(source, data, seed)
        self._maker = SampleMaker(
            kind=source.kind,
            transform=Transform(image_size, source.crop_scale, source.flip, source.rand_augment),
            tokenizer=tokenizer,
            max_text_length=max_text_length,
            maskings=maskings,
            seed=seed,
        )
        per_rank = data.num_readers // num_ranks
        self._readers = range(rank * per_rank, (rank + 1) * per_rank)
        self._num_workers = min(num_workers, per_rank)
        self._per_reader = source.batch_size // data.num_readers
        self._max_bad_share = data.max_bad_share
        self._states: dict[str, Any] = {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Iterators made from now on go on from this state. Raises UserError where it is of other data."""
        if state["version"] != VERSION:
            raise UserError(
                f"the state of the data has version {state['version']}, this program reads {VERSION}"
            )
        self._mixture.refuse_other(state["fingerprint"])
        missing = [number for number in self._readers if str(number) not in state["readers"]]
        if missing:
            raise UserError(
                f"the state of the data lacks the readers {missing}; merge the states of all ranks first"
            )
        self._states = copy.deepcopy({str(number): state["readers"][str(number)] for number in self._readers})

    def __iter__(self) -> Iterator[tuple[list[Sample], dict[str, Any]]]:
        """Starts the workers at once, so that they are at work while the caller sets up the rest."""
        parts = max(1, self._num_workers)
        count = len(self._readers)
        cuts = [self._readers[count * i // parts : count * (i + 1) // parts] for i in range(parts)]
        shares = [
            partial(
                ReaderShare,
                self._mixture,
                self._maker,
                readers,
                self._per_reader,
                self._max_bad_share,
                self._states,
            )
            for readers in cuts
        ]
        return _Steps(shares, self._num_workers > 0, self._mixture, self._max_bad_share)


class _Steps:
    """The iterator of a SourceStream; `close` ends its workers."""

    def __init__(
        self,
        make_shares: list[Callable[[], ReaderShare]],
        in_workers: bool,
        mixture: Mixture,
        max_bad_share: float,
    ) -> None:
        self._where, self._max_bad_share = _where(mixture), max_bad_share
        self._fingerprint = mixture.fingerprint()
        self._workers = Workers(make_shares) if in_workers else None
        self._inline = None if in_workers else make_shares[0]()

    def __iter__(self) -> _Steps:
        return self

    def __next__(self) -> tuple[list[Sample], dict[str, Any]]:
        if self._workers is not None:
            parts = self._workers.step()
        else:
            assert self._inline is not None
            parts = [self._inline.step()]
        state = {
            "version": VERSION,
            "fingerprint": self._fingerprint,
            "readers": {name: reader for _, states in parts for name, reader in states.items()},
        }
        bad_samples(state).refuse_more_than(self._max_bad_share, self._where)
        return [sample for samples, _ in parts for sample in samples], state

    def close(self) -> None:
        if self._workers is not None:
            self._workers.close()

    def __del__(self) -> None:
        if getattr(self, "_workers", None) is not None:
            self.close()


def merge_states(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The states of all ranks after the same step -> one state for any number of ranks."""
    first = states[0]
    assert all(state["fingerprint"] == first["fingerprint"] for state in states)
    readers = {name: reader for state in states for name, reader in state["readers"].items()}
    return {**first, "readers": {name: readers[name] for name in sorted(readers, key=int)}}


def read_samples(
    shards: str,
    *,
    image_size: int,
    max_text_length: int,
    tokenizer: Tokenizer | None,
    maskings: dict[str, Masking],
    seed: int,
    limit: int | None,
    kind: Kind = "pair",
) -> Iterator[Sample]:
    """The first `limit` samples of some shards in their order, for evaluation: centre crop, nothing random
    but the masks and which caption is taken, and these depend on (seed, number of the sample) only.

    Broken samples are left out; at the end a warning tells how many and why. Raises UserError.
    """
    shard_set = resolve(shards)
    maker = SampleMaker(kind, Transform(image_size), tokenizer, max_text_length, maskings, seed)
    tally = Tally()

    def samples() -> Iterator[Sample]:
        for read in _in_order(shard_set, maker):
            tally.read += 1
            try:
                yield maker.make(read)
            except BadSample as bad:
                tally.add(bad)

    yield from islice(samples(), limit)
    if tally.bad:
        shard, key, reason = tally.first_bad[0]
        logger.warning(
            "%d of %d samples of '%s' are broken and left out; the first is %s of shard %s: %s",
            tally.bad.total(),
            tally.read,
            shards,
            key,
            shard,
            reason,
        )


def read_captions(
    shards: str, *, max_text_length: int, tokenizer: Tokenizer
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """(number of the sample, [CLS] words [SEP] of each of its captions) of all samples that have any."""
    shard_set = resolve(shards)
    maker = SampleMaker("text", Transform(1), tokenizer, max_text_length, {}, seed=0)
    for read in _in_order(shard_set, maker):
        if not isinstance(read.raw, BadSample):
            with suppress(ValueError):  # text that cannot be decoded: broken, as read_samples finds
                captions, _ = parse_text(read.raw.members.get("json"), read.raw.members.get("txt"))
                tokens = [tokenizer.encode(caption, max_text_length) for caption in captions]
                yield read.index, [tokens_N for tokens_N in tokens if len(tokens_N) > 2]


def _in_order(shard_set: ShardSet, maker: SampleMaker) -> Iterator[Read]:
    files = LocalShards(shard_set, max_indexed=0) if shard_set.local else None
    index = 0
    for number, shard in enumerate(shard_set.shards):
        streamed = None if files else stream_shard(shard, 0, maker.wanted)
        for position in range(shard.samples):
            if streamed is not None:
                yield Read(0, index, next(streamed))
            else:
                assert files is not None
                yield Read(0, index, files.read(number, position, maker.wanted))
            index += 1
    if files:
        files.close()


def _where(mixture: Mixture) -> str:
    return " + ".join(f"'{shard_set.pattern}'" for shard_set in mixture.sets)
