"""Weighted mixing: shares by weight, each set once an epoch of its own, resumable anywhere."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from itertools import islice

import pytest

from eve.config import Data, Source
from eve.data.mixture import Mixture
from eve.errors import UserError


def make_set(directory, count: int) -> str:
    directory.mkdir()
    with tarfile.open(directory / "0.tar", "w") as archive:
        for i in range(count):
            content = f"{directory.name} {i}".encode()
            info = tarfile.TarInfo(f"{directory.name}{i}.txt")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return str(directory)


def make_mixture(tmp_path, weights: dict[str, float], seed: int = 1, sizes=(40, 7, 90)) -> Mixture:
    mix = []
    for size, (name, weight) in zip(sizes, weights.items(), strict=False):
        directory = tmp_path / name
        shards = str(directory) if directory.exists() else make_set(directory, size)
        mix.append({"shards": shards, "weight": weight})
    source = Source.model_validate({"kind": "text", "mix": mix, "batch_size": 4})
    data = Data.model_validate({"tokenizer": "-", "num_readers": 4, "shuffle_buffer": 8, "sources": {}})
    return Mixture.of(source, data, seed)


def anything(extension: str) -> bool:
    return True


def test_shares_follow_the_weights(tmp_path):
    mixture = make_mixture(tmp_path, {"a": 5, "b": 1, "c": 2})
    draws = Counter(
        read.raw.key[0] for reader in mixture.open(range(4), anything) for read in islice(reader, 2000)
    )
    # Standard deviation of a share of 8,000 draws: at most 0.0054.
    assert draws["a"] / 8000 == pytest.approx(5 / 8, abs=0.025)
    assert draws["b"] / 8000 == pytest.approx(1 / 8, abs=0.02)
    assert draws["c"] / 8000 == pytest.approx(2 / 8, abs=0.025)


def test_each_set_is_read_once_an_epoch_of_its_own(tmp_path):
    mixture = make_mixture(tmp_path, {"a": 5, "b": 1, "c": 2})
    seen: Counter = Counter()
    for reader in mixture.open(range(4), anything):
        for read in islice(reader, 600):
            seen[read.epoch, read.raw.key, read.index] += 1
    assert set(seen.values()) == {1}
    firsts = [(key, index) for epoch, key, index in seen if epoch == 0]
    keys = [f"{name}{i}" for name, size in (("a", 40), ("b", 7), ("c", 90)) for i in range(size)]
    assert sorted(firsts, key=lambda pair: pair[1]) == [(key, i) for i, key in enumerate(keys)]


def test_goes_on_from_any_cursor(tmp_path):
    mixture = make_mixture(tmp_path, {"a": 1, "b": 1})
    (unbroken,) = mixture.open([2], anything)
    cursors, keys = [], []
    for _ in range(60):
        cursors.append(unbroken.cursor)
        keys.append(next(unbroken).raw.key)
    for cut in (0, 1, 17, 59):
        (resumed,) = mixture.open([2], anything)
        resumed.cursor = cursors[cut]
        assert [read.raw.key for read in islice(resumed, 60 - cut)] == keys[cut:]


def test_readers_and_seeds_draw_differently(tmp_path):
    def sets(seed: int, reader: int) -> str:
        (mixed,) = make_mixture(tmp_path, {"a": 1, "b": 1}, seed).open([reader], anything)
        return "".join(read.raw.key[0] for read in islice(mixed, 50))

    assert len({sets(1, 0), sets(1, 1), sets(2, 0)}) == 3
    assert sets(1, 0) == sets(1, 0)


def test_a_state_of_another_mix_is_refused(tmp_path):
    two = make_mixture(tmp_path, {"a": 1, "b": 1})
    three = make_mixture(tmp_path, {"a": 1, "b": 1, "c": 1})
    with pytest.raises(UserError, match=r"saved with 2 sets of shards in the mix, this run has 3"):
        three.refuse_other(two.fingerprint())
    two.refuse_other(make_mixture(tmp_path, {"a": 1, "b": 9}).fingerprint())
