"""Broken samples are read rightly, or counted by reason and named; past the allowed share the run stops."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eve.data import shards as shards_module
from eve.data.loader import bad_samples, merge_states, read_samples
from eve.data.manifest import describe_shard, scan_tar, write_manifest
from eve.data.samples import NOTHING_READ
from eve.data.shards import CUT_SHORT
from eve.errors import UserError
from tests.data.test_loader import LettersTokenizer, make_stream

Members = dict[str, bytes]


def encode(image: Image.Image, format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def scene(mode: str = "RGB") -> Image.Image:
    y, x = np.mgrid[0:24, 0:32]
    pixels = np.stack([x * 8, y * 10, x + y], axis=-1).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def captions(*texts: str) -> bytes:
    return json.dumps({"captions": list(texts)}).encode()


GOOD: Members = {"png": encode(scene(), "PNG"), "json": captions("a scene")}

READ_RIGHTLY: dict[str, Members] = {
    "cmyk": {**GOOD, "jpg": encode(scene("CMYK"), "JPEG", quality=95)},
    "palette": {"png": encode(scene().quantize(64), "PNG"), "json": captions("a scene")},
    "sixteen_bit": {
        "png": encode(Image.fromarray(np.asarray(scene("L")).astype(np.uint16) * 257), "PNG"),
        "json": captions("grey"),
    },
    "animated": {
        "gif": encode(scene(), "GIF", save_all=True, append_images=[scene().rotate(90)]),
        "json": captions("moving"),
    },
    "sixty_megapixels": {
        "jpg": encode(scene().resize((10_000, 6_000), Image.Resampling.NEAREST), "JPEG"),
        "txt": b"large",
    },
    "img2dataset": {
        "jpg": encode(scene(), "JPEG"),
        "txt": b"one caption",
        "json": b'{"caption": "one caption", "width": 32}',
    },
    "one_of_two_captions_is_empty": {**GOOD, "json": captions("", "a scene")},
}

BROKEN: dict[str, tuple[Members, str]] = {
    "garbage": ({**GOOD, "png": b"\x89PNG\r\n\x1a\n" + bytes(200)}, "undecodable image"),
    "cut_image": ({**GOOD, "png": GOOD["png"][: len(GOOD["png"]) // 2]}, "undecodable image"),
    "empty_image": ({**GOOD, "png": b""}, "undecodable image"),
    "no_image": ({"json": GOOD["json"]}, "no image"),
    "no_caption": ({"png": GOOD["png"]}, "no caption"),
    "empty_caption": ({**GOOD, "json": captions("  ", "")}, "empty caption"),
    "empty_list": ({**GOOD, "json": captions()}, "empty caption"),
    "broken_json": ({**GOOD, "json": b'{"captions": ["a'}, "undecodable text"),
    "wrong_captions": ({**GOOD, "json": b'{"captions": [1, 2]}'}, "undecodable text"),
    "half_a_surrogate_pair": ({**GOOD, "json": b'{"caption": "\\ud800 x"}'}, "undecodable text"),
    "deep": ({**GOOD, "json": b'{"caption": "x", "a": %s%s}' % (b"[" * 500, b"]" * 500)}, "undecodable text"),
    "key.with_a_dot": (GOOD, NOTHING_READ),
    "latin_1": ({"png": GOOD["png"], "txt": b"caf\xe9"}, "undecodable text"),
}


def write_tar(path: Path, samples: dict[str, Members]) -> None:
    with tarfile.open(path, "w") as archive:
        for key, members in samples.items():
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def good(count: int) -> dict[str, Members]:
    return {f"good{i}": GOOD for i in range(count)}


def run(directory, steps: int, ranks: int = 1, workers: int = 0, **changes):
    """(keys of all samples, merged state)."""
    iterators = [iter(make_stream(directory, rank, ranks, workers, **changes)) for rank in range(ranks)]
    keys = []
    for _ in range(steps):
        parts = [next(iterator) for iterator in iterators]
        keys += [(sample.epoch, sample.key) for samples, _ in parts for sample in samples]
    for iterator in iterators:
        iterator.close()
    return keys, merge_states([state for _, state in parts])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("broken")
    write_tar(path / "000.tar", {**READ_RIGHTLY, **good(20)})
    write_tar(path / "001.tar", {key: members for key, (members, _) in BROKEN.items()})
    # Without a manifest: make_shards would refuse most of this.
    return path


TOTAL = len(READ_RIGHTLY) + 20 + len(BROKEN)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 1), (2, 0)])
def test_each_is_read_or_counted_and_named(directory, ranks, workers):
    keys, state = run(
        directory, 3 * (TOTAL - len(BROKEN)), ranks, workers, num_readers=2, batch_size=2, max_bad_share=1.0
    )
    found = bad_samples(state)
    assert found.read == found.bad + len(keys)
    seen = Counter(keys)
    assert set(seen.values()) == {1}
    expected = {*READ_RIGHTLY, *good(20)}
    for epoch in range(3):
        assert {key for e, key in seen if e == epoch} == expected
    assert {key: reason for _, key, reason in found.first} == {
        # What follows the first dot of a name is the extension.
        key.partition(".")[0]: reason
        for key, (_, reason) in BROKEN.items()
    }
    assert {shard for shard, _, _ in found.first} == {"001.tar"}
    assert sum(found.reasons.values()) == found.bad
    assert json.loads(json.dumps(state)) == state


def test_counts_by_reason_are_exact(directory):
    samples = []
    steps = TOTAL - len(BROKEN) - 1
    samples, state = run(directory, steps, num_readers=1, batch_size=1, max_bad_share=1.0)
    found = bad_samples(state)
    one_epoch = Counter(reason for _, reason in BROKEN.values())
    # All of the epoch is read but perhaps what is broken at its very end.
    assert len(samples) == steps
    assert all(found.reasons.get(reason, 0) <= count for reason, count in one_epoch.items())
    assert found.bad >= one_epoch.total() - 3


def test_the_order_of_the_rest_does_not_depend_on_ranks(directory):
    options = {"num_readers": 4, "batch_size": 4, "max_bad_share": 1.0}
    one, state = run(directory, 6, 1, 0, **options)
    two, other = run(directory, 6, 2, 1, **options)
    assert one == two
    assert state == other


def cut_shard(tmp_path) -> Path:
    write_tar(tmp_path / "000.tar", good(40))
    write_tar(tmp_path / "001.tar", {f"cut{i}": GOOD for i in range(10)})
    write_manifest(tmp_path, [describe_shard(tmp_path / name) for name in ("000.tar", "001.tar")])
    shard = tmp_path / "001.tar"
    # In the middle of the image of the fifth sample.
    offset, size = scan_tar(shard).samples[4].members["png"]
    shard.write_bytes(shard.read_bytes()[: offset + size // 2])
    return tmp_path


@pytest.mark.parametrize("streamed", [False, True])
def test_a_cut_shard_is_counted_by_the_sample(tmp_path, monkeypatch, streamed):
    monkeypatch.setattr(shards_module, "PAUSE", 0.0)
    directory = cut_shard(tmp_path)
    pattern = f"pipe:cat {directory}/{{000..001}}.tar" if streamed else directory
    keys, state = run(pattern, 50, num_readers=1, batch_size=1, max_bad_share=1.0)
    first_epoch = {key for epoch, key in keys if epoch == 0}
    cut = {key for key in first_epoch if key.startswith("cut")}
    assert first_epoch - cut == set(good(40))
    assert cut == {f"cut{i}" for i in range(4)}
    found = bad_samples(state)
    assert set(found.reasons) == {CUT_SHORT}
    assert sorted(found.first) == [("001.tar", f"#{i}", CUT_SHORT) for i in range(4, 10)]


def test_a_cut_shard_without_manifest_counts_as_one_more(tmp_path):
    directory = cut_shard(tmp_path)
    (directory / "manifest.json").unlink()
    _, state = run(directory, 60, num_readers=1, batch_size=1, max_bad_share=1.0)
    assert bad_samples(state).reasons[CUT_SHORT] >= 1


def test_past_the_share_the_run_stops(directory):
    with pytest.raises(UserError, match=r"of \d+ samples read from '.*' are broken") as stopped:
        run(directory, 200, max_bad_share=0.05)
    message = str(stopped.value)
    assert "data.max_bad_share 0.05" in message
    assert "001.tar" in message
    assert any(
        f"{key.partition('.')[0]} of shard 001.tar: {reason}" in message
        for key, (_, reason) in BROKEN.items()
    )


def test_one_broken_of_the_first_three_does_not_stop(tmp_path):
    write_tar(tmp_path / "0.tar", {"broken": {"json": captions("x")}, **good(199)})
    keys, state = run(tmp_path, 600, num_readers=1, batch_size=1, shuffle_buffer=1, max_bad_share=0.01)
    assert keys[:2] == [(0, "good0"), (0, "good1")]
    assert bad_samples(state).bad == 4


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("share", [0.01, 1.0])
def test_nothing_but_broken_samples_ends(tmp_path, workers, share):
    write_tar(tmp_path / "0.tar", {f"k{i}": {"json": captions("x")} for i in range(50)})
    with pytest.raises(UserError, match=r"broken.* k\d+ of shard 0.tar: no image"):
        run(tmp_path, 1, workers=workers, num_readers=1, batch_size=1, max_bad_share=share)


def test_a_reader_of_broken_samples_speaks_for_itself_alone(tmp_path):
    broken = {f"k{i}": {"json": captions("x")} for i in range(50)}
    write_tar(tmp_path / "0.tar", {**good(50), **broken})
    with pytest.raises(UserError, match=r"reader 1 met 101 broken .* no other; the first is k\d+ of shard"):
        run(tmp_path, 1, num_readers=2, batch_size=2, shuffle_buffer=1, max_bad_share=1.0)


def test_counts_go_on_with_the_state(directory):
    options = {"num_readers": 2, "batch_size": 2, "max_bad_share": 1.0}
    _, whole = run(directory, 30, **options)
    _, half = run(directory, 15, **options)
    stream = make_stream(directory, **options)
    stream.load_state(half)
    iterator = iter(stream)
    for _ in range(15):
        _, state = next(iterator)
    assert state == whole


def test_evaluation_leaves_them_out_and_says_so(directory, caplog):
    with caplog.at_level(logging.WARNING):
        samples = list(
            read_samples(
                str(directory),
                image_size=16,
                max_text_length=12,
                tokenizer=LettersTokenizer(),
                maskings={},
                seed=1,
                limit=None,
            )
        )
    assert [sample.key for sample in samples] == [*READ_RIGHTLY, *good(20)]
    (message,) = caplog.messages
    assert message.startswith(f"{len(BROKEN)} of {TOTAL} samples")
    assert "garbage of shard 001.tar: undecodable image" in message
