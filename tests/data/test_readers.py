"""The order of the readers: once an epoch, balanced, bounded, resumable from (epoch, position)."""

from __future__ import annotations

import http.server
import io
import tarfile
import threading
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from eve.config import Data, Source
from eve.data import shards as shards_module
from eve.data.manifest import ShardInfo, write_manifest
from eve.data.mixture import Mixture
from eve.data.readers import Order, Reader
from eve.data.shards import BadSample, LocalShards, RawSample, resolve
from eve.errors import UserError

COUNTS = [(1,), (7,), (3, 4, 3), (5, 0, 2, 9), (1, 1, 1), (0, 6), (40, 2, 11)]


def global_indices(order: Order, reader: int, epoch: int) -> list[int]:
    """By walking a list of lists, not by the arithmetic of the code."""
    share = order.epoch(reader, epoch)
    names = [[(s, i) for i in range(count)] for s, count in enumerate(order.counts)]
    row = [item for s in share.shards_S for item in names[s]]
    numbered = [item for shard in names for item in shard]
    return [numbered.index(row[place]) for place in share.rows_N]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("num_readers", [1, 2, 3, 8, 13])
def test_each_sample_once_an_epoch_and_readers_in_step(counts, num_readers):
    order = Order(5, counts, num_readers, shuffle_buffer=4)
    read = np.zeros(num_readers, dtype=int)
    for epoch in range(12):
        parts = [global_indices(order, reader, epoch) for reader in range(num_readers)]
        assert sorted(index for part in parts for index in part) == list(range(sum(counts)))
        assert [len(part) for part in parts] == [order.quota(reader, epoch) for reader in range(num_readers)]
        read += [len(part) for part in parts]
        assert read.max() - read.min() <= 1


@pytest.mark.parametrize("counts", COUNTS)
def test_locate_agrees_with_walking_the_row(counts):
    order = Order(5, counts, 3, shuffle_buffer=4)
    for epoch in range(4):
        for reader in range(3):
            share = order.epoch(reader, epoch)
            found = [order.starts_S[s] + i for s, i in map(share.locate, share.rows_N)]
            assert found == global_indices(order, reader, epoch)


@pytest.mark.parametrize("buffer", [1, 2, 5, 64, 1000])
def test_a_shuffle_buffer_of_that_size_can_do_it(buffer):
    """Feed the range in order through a buffer that can hold `buffer` samples: never more wait in it."""
    rows = Order(3, (300,), 1, buffer).epoch(0, 0).rows_N
    waiting: set[int] = set()
    fed = 0
    for row in rows:
        while row >= fed:
            waiting.add(fed)
            fed += 1
        assert len(waiting) <= buffer
        waiting.remove(row)
    assert (rows.tolist() == list(range(300))) == (buffer == 1)


def test_shuffle_mixes_and_depends_on_key_epoch_and_reader():
    def order(key: int) -> Order:
        return Order(key, (64, 64), 2, 32)

    epochs = [
        global_indices(order(key), reader, epoch) for key in (1, 2) for epoch in (0, 1) for reader in (0, 1)
    ]
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    assert np.abs(np.diff(epochs[0])).mean() > 5


# --- reading ----------------------------------------------------------------------------------------------


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for key, members in samples.items():
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def make_set(directory: Path, counts: list[int], manifest: bool = True) -> list[str]:
    """Text shards; returns the keys by number."""
    keys = []
    for number, count in enumerate(counts):
        names = [f"{number}-{i}" for i in range(count)]
        write_tar(
            directory / f"{number:03d}.tar",
            {name: {"txt": name.encode(), "bin": b"x" * 700} for name in names},
        )
        keys += names
    if manifest:
        infos = [ShardInfo(f"{i:03d}.tar", count, 0, count, 0, "") for i, count in enumerate(counts)]
        write_manifest(directory, infos)
    return keys


def wanted(extension: str) -> bool:
    return extension == "txt"


def make_reader(
    pattern: str, reader: int, num_readers: int, buffer: int = 4, max_indexed: int = 100
) -> Reader:
    shard_set = resolve(pattern)
    order = Order(9, shard_set.counts, num_readers, buffer)
    return Reader(
        shard_set, order, reader, wanted, LocalShards(shard_set, max_indexed) if shard_set.local else None
    )


def describe(read) -> tuple:
    raw = read.raw
    return (
        read.epoch,
        read.index,
        raw.shard,
        raw.key,
        raw.members if isinstance(raw, RawSample) else raw.reason,
    )


@pytest.mark.parametrize("num_readers", [1, 3, 8])
@pytest.mark.parametrize("how", ["glob", "directory", "brace", "pipe"])
def test_reads_every_key_once_an_epoch(tmp_path, num_readers, how):
    keys = make_set(tmp_path, [5, 1, 0, 7])
    patterns = {
        "glob": f"{tmp_path}/*.tar",
        "directory": str(tmp_path),
        "brace": f"{tmp_path}/{{000..003}}.tar",
        "pipe": f"pipe:cat {tmp_path}/{{000..003}}.tar",
    }
    seen = Counter()
    for reader in range(num_readers):
        virtual = make_reader(patterns[how], reader, num_readers)
        total = sum(virtual._order.quota(reader, epoch) for epoch in range(3))
        for read in islice(virtual, total):
            assert isinstance(read.raw, RawSample)
            assert read.raw.members == {"txt": keys[read.index].encode()}
            seen[read.epoch, read.raw.key] += 1
    assert seen == Counter((epoch, key) for epoch in range(3) for key in keys)


def test_more_readers_than_samples(tmp_path):
    make_set(tmp_path, [2])
    epochs = [[read.epoch for read in islice(make_reader(str(tmp_path), r, 5), 3)] for r in range(5)]
    assert sorted(epoch for reader in epochs for epoch in reader if epoch < 5) == sorted([*range(5)] * 2)


@pytest.mark.parametrize("streamed", [False, True])
def test_goes_on_from_any_cursor(tmp_path, streamed):
    make_set(tmp_path, [6, 5, 9])
    pattern = f"pipe:cat {tmp_path}/{{000..002}}.tar" if streamed else str(tmp_path)
    unbroken = make_reader(pattern, 1, 2)
    cursors, reads = [], []
    for _ in range(25):
        cursors.append(unbroken.cursor)
        reads.append(describe(next(unbroken)))
    for cut in (0, 1, 7, 9, 10, 11, 19, 24):
        resumed = make_reader(pattern, 1, 2)
        resumed.cursor = cursors[cut]
        assert [describe(read) for read in islice(resumed, 25 - cut)] == reads[cut:]


def test_the_index_that_a_mixture_allows_is_enough(tmp_path, monkeypatch):
    """Two readers in turns over shards of 5 with a buffer of 4: each shard is scanned once or twice an epoch
    (it may be shared), never for each sample; and one remembered shard is enough to be right."""
    make_set(tmp_path, [5] * 12)
    scans = []
    scan = shards_module.scan_tar
    monkeypatch.setattr(shards_module, "scan_tar", lambda path: scans.append(path) or scan(path))
    source = {"kind": "text", "mix": [{"shards": str(tmp_path)}], "batch_size": 2}
    data = {"tokenizer": "-", "num_readers": 2, "shuffle_buffer": 4, "sources": {}}
    mixture = Mixture.of(Source.model_validate(source), Data.model_validate(data), seed=1)
    readers = mixture.open([0, 1], wanted)
    keys = [next(reader).raw.key for _ in range(30) for reader in readers]
    assert len(set(keys)) == 60
    assert len(scans) <= 24
    few = make_reader(str(tmp_path), 0, 1, buffer=30, max_indexed=0)
    assert len({read.raw.key for read in islice(few, 60)}) == 60


def test_streamed_and_local_give_the_same(tmp_path):
    make_set(tmp_path, [6, 5, 9])
    local = make_reader(str(tmp_path), 0, 3)
    streamed = make_reader(f"pipe:cat {tmp_path}/{{000..002}}.tar", 0, 3)
    assert [describe(r) for r in islice(local, 20)] == [describe(r) for r in islice(streamed, 20)]


def test_over_http(tmp_path):
    keys = make_set(tmp_path, [4, 3])
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        reader = make_reader(f"http://127.0.0.1:{server.server_port}/{{000..001}}.tar", 0, 1)
        assert {read.raw.key for read in islice(reader, 7)} == set(keys)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("streamed", [False, True])
def test_a_cut_shard_counts_each_missing_sample(tmp_path, streamed, monkeypatch):
    monkeypatch.setattr(shards_module, "PAUSE", 0.0)
    keys = make_set(tmp_path, [6, 5])
    shard = tmp_path / "001.tar"
    # Two whole samples of 2048 + 512 bytes, then a header.
    shard.write_bytes(shard.read_bytes()[: 2 * 2560 + 512])
    pattern = f"pipe:cat {tmp_path}/{{000..001}}.tar" if streamed else str(tmp_path)
    reads = list(islice(make_reader(pattern, 0, 1), 11))
    bad = [read for read in reads if isinstance(read.raw, BadSample)]
    assert sorted(read.index for read in bad) == [8, 9, 10]
    assert {read.raw.shard for read in bad} == {"001.tar"}
    assert {read.raw.reason for read in bad} == {"missing from a shard that is cut short"}
    assert sorted(read.raw.key for read in reads if read not in bad) == keys[:8]


def test_without_manifest_local_shards_are_scanned_and_remote_ones_refused(tmp_path):
    make_set(tmp_path, [4, 3], manifest=False)
    assert resolve(str(tmp_path)).counts == (4, 3)
    with pytest.raises(UserError, match=r"make_shards.py index"):
        resolve(f"pipe:cat {tmp_path}/{{000..001}}.tar")


def test_mistakes_are_named(tmp_path):
    make_set(tmp_path, [4, 3])
    with pytest.raises(UserError, match=r"{0\.\.1\.tar' have a brace without its other half"):
        resolve(f"{tmp_path}/{{0..1.tar")
    with pytest.raises(UserError, match=r"no file matches"):
        resolve(f"{tmp_path}/nothing*.tar")
    with pytest.raises(UserError, match=r"there is no shard .*002.tar"):
        resolve(f"{tmp_path}/{{000..002}}.tar")
    with pytest.raises(UserError, match=r"000.tar twice"):
        resolve(f"{tmp_path}/000.tar::{tmp_path}/*.tar")
    (tmp_path / "009.tar").write_bytes((tmp_path / "000.tar").read_bytes())
    with pytest.raises(UserError, match=r"does not list the shard 009.tar"):
        resolve(str(tmp_path))
    (tmp_path / "009.tar").unlink()
    (tmp_path / "001.tar").unlink()
    with pytest.raises(UserError, match=r"001.tar is missing"):
        resolve(str(tmp_path))


def test_names_do_not_depend_on_the_place(tmp_path):
    for place in ("here", "there/deep"):
        for part in ("a", "b"):
            (tmp_path / place / part).mkdir(parents=True)
            make_set(tmp_path / place / part, [2, 1])
    sets = [resolve(f"{tmp_path}/{place}/{{a,b}}/*.tar") for place in ("here", "there/deep")]
    assert [shard.name for shard in sets[0].shards] == ["a/000.tar", "a/001.tar", "b/000.tar", "b/001.tar"]
    assert [shard.name for shard in sets[1].shards] == [shard.name for shard in sets[0].shards]
