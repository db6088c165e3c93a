"""The shard format against independent readers: tarfile, hashlib, webdataset and byte arithmetic."""

import gzip
import hashlib
import io
import json
import random
import tarfile
from pathlib import Path

import pytest
import webdataset

from eve.data.manifest import (
    TarSample,
    describe_shard,
    parse_text,
    read_manifest,
    scan_tar,
    split_name,
    write_manifest,
)
from eve.data.shard_writer import Record, clean_key, write_shard, write_shards
from eve.errors import UserError


def make_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def records(number: int) -> list[Record]:
    return [
        Record(f"d/{i:04d}", bytes([i]) * (i * 37), "png", [f"caption {i} é", "☃"][: i % 3], {"label": i})
        for i in range(number)
    ]


def test_offsets_lead_to_the_bytes_that_went_in(tmp_path: Path) -> None:
    long_key = "/".join(["folder" * 12] * 3) + "/x"
    members = [
        ("a.JPG", b"image a"),
        ("a.json", b"{}"),
        ("dir.with.dots/b.png", b"b" * 1000),
        ("dir.with.dots/b.txt", b""),
        (f"{long_key}.webp", b"long"),
        ("c.seg.png", b"two dots"),
    ]
    for number, format in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        path = make_tar(tmp_path / f"{number}.tar", members, format)
        index = scan_tar(path)
        content = path.read_bytes()
        found = {
            (sample.key, extension): content[offset : offset + size]
            for sample in index.samples
            for extension, (offset, size) in sample.members.items()
        }
        assert found == {split_name(name): data for name, data in members}
        assert [sample.key for sample in index.samples] == ["a", "dir.with.dots/b", long_key, "c"]
        assert not index.truncated


def test_what_is_no_sample_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        folder = tarfile.TarInfo("a.dir")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name in ("._a.jpg", ".DS_Store", "README", "a.jpg"):
            archive.addfile(tarfile.TarInfo(name))
    assert [(sample.key, list(sample.members)) for sample in scan_tar(path).samples] == [("a", ["jpg"])]


def test_interleaved_keys_make_whole_samples_and_repeated_ones_samples_of_their_own(tmp_path: Path) -> None:
    names = ["a.jpg", "b.jpg", "a.json", "b.json", "a.jpg", "a.json", "c.jpg"]
    index = scan_tar(make_tar(tmp_path / "x.tar", [(name, name.encode()) for name in names]))
    assert [(sample.key, sorted(sample.members)) for sample in index.samples] == [
        ("a", ["jpg", "json"]),
        ("b", ["jpg", "json"]),
        ("a", ["jpg", "json"]),
        ("c", ["jpg"]),
    ]


def test_an_archive_of_nothing(tmp_path: Path) -> None:
    index = scan_tar(make_tar(tmp_path / "e.tar", []))
    assert (index.samples, index.truncated) == ([], False)


def test_a_cut_anywhere_is_seen_and_costs_only_what_lies_behind_it(tmp_path: Path) -> None:
    path = make_tar(
        tmp_path / "whole.tar", [(f"{i}.{e}", b"x" * (i * 301)) for i in range(5) for e in ("jpg", "txt")]
    )
    content = path.read_bytes()
    with tarfile.open(path) as archive:
        ends = [(member.name, member.offset_data + member.size) for member in archive]
    data_end = max(end for _, end in ends)
    block_end = (data_end + 511) // 512 * 512
    cut = tmp_path / "cut.tar"
    for length in sorted({*range(0, block_end + 512, 256), *(end for _, end in ends), data_end - 1}):
        cut.write_bytes(content[:length])
        index = scan_tar(cut)
        whole = {f"{sample.key}.{extension}" for sample in index.samples for extension in sample.members}
        assert whole == {name for name, end in ends if end <= length}, length
        assert index.truncated, length
    cut.write_bytes(content[: block_end + 512])
    assert not scan_tar(cut).truncated


def test_a_broken_header_in_the_middle_counts_as_truncated(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar", [(f"{i}.jpg", b"x" * 100) for i in range(4)])
    content = bytearray(path.read_bytes())
    content[2048:2560] = b"\xff" * 512
    path.write_bytes(content)
    index = scan_tar(path)
    assert [sample.key for sample in index.samples] == ["0", "1"]
    assert index.truncated


def test_what_is_no_tar_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(b"garbage " * 1000)
    with pytest.raises(UserError, match="not an uncompressed tar"):
        scan_tar(path)
    path.write_bytes(
        gzip.compress(make_tar(path, [("a.jpg", random.Random(0).randbytes(5000))]).read_bytes())
    )
    with pytest.raises(UserError, match="not an uncompressed tar"):
        scan_tar(path)
    with pytest.raises(UserError, match="there is no shard"):
        scan_tar(tmp_path / "none.tar")
    with pytest.raises(UserError, match="cannot be read"):
        scan_tar(tmp_path)


@pytest.mark.parametrize(
    ("json_text", "txt", "captions", "metadata"),
    [
        ('{"captions": [" a ", "", "b"], "label": 3}', None, ["a", "b"], {"label": 3}),
        ('{"caption": "a", "url": "u"}', "ignored", ["a"], {"url": "u"}),
        ('{"caption": null, "url": "u"}', " from the txt\n", ["from the txt"], {"url": "u"}),
        ('{"captions": ["a"], "caption": "b"}', None, ["a"], {}),
        ("{}", "t", ["t"], {}),
        ('{"captions": []}', "t", ["t"], {}),
        ('{"captions": [], "caption": "a"}', "t", ["a"], {}),
        ('{"captions": [], "caption": ""}', None, [], {}),
        ('{"captions": ["\\ud83d\\ude00 \\\\ud800"]}', None, ["\U0001f600 \\ud800"], {}),
        ('\ufeff{"caption": "a"}', None, ["a"], {}),
        (None, "  ", [], {}),
        (None, None, [], {}),
    ],
)
def test_captions_of_all_forms(json_text, txt, captions, metadata) -> None:
    encoded = [None if text is None else text.encode() for text in (json_text, txt)]
    assert parse_text(*encoded) == (captions, metadata)


@pytest.mark.parametrize(
    "content",
    [
        *(b"[1]", b"{", b'{"captions": [1]}', b'{"captions": 3}', b"\xff{}"),
        *(b'{"caption": "\\ud800 x"}', b'{"caption": "x", "\\uDfFf": 1}', b'{"caption": "\xed\xa0\x80"}'),
        *(b'{"caption": "a", "deep": %s%s}' % (b"[" * n, b"]" * n) for n in (64, 500, 100_000)),
    ],
)
def test_broken_texts_are_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_text(content, None)
    with pytest.raises(ValueError, match=r"utf-8"):
        parse_text(None, b"\xff")


def test_webdataset_reads_what_was_written(tmp_path: Path) -> None:
    written = [
        *records(11),
        Record("t/1", None, captions=["only text"]),
        Record("t/2", None, captions=["a", "b"]),
    ]
    shards = write_shards(written, tmp_path / "shards", shard_size=4)
    assert [shard.samples for shard in shards] == [4, 4, 4, 1]
    urls = [str(tmp_path / "shards" / shard.name) for shard in shards]
    read = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in read] == [record.key for record in written]
    for sample, record in zip(read, written, strict=True):
        assert sample.get("png") == record.image_bytes
        if record.key == "t/1":
            assert sample["txt"].decode() == "only text"
            assert "json" not in sample
        else:
            tree = json.loads(sample["json"])
            assert tree.pop("captions", []) == record.captions
            assert tree == record.metadata


def test_the_manifest_agrees_with_a_second_count(tmp_path: Path) -> None:
    shards = write_shards(records(7), tmp_path, shard_size=3)
    assert read_manifest(tmp_path) == shards
    for shard in shards:
        content = (tmp_path / shard.name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (shard.bytes, shard.sha256)
        assert describe_shard(tmp_path / shard.name) == shard
    assert sum(shard.captions for shard in shards) == sum(i % 3 for i in range(7))
    assert sum(shard.images for shard in shards) == 7


def test_shards_depend_on_their_samples_alone_and_leave_no_partial_file(tmp_path: Path) -> None:
    first, second = write_shard(tmp_path / "a.tar", records(3)), write_shard(tmp_path / "b.tar", records(3))
    assert first.sha256 == second.sha256

    def broken():
        yield from records(2)
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        write_shard(tmp_path / "c.tar", broken())
    with pytest.raises(UserError, match=r"two samples .* have the key 'd/0000'"):
        write_shard(tmp_path / "c.tar", records(1) * 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "b.tar"]
    with pytest.raises(UserError, match="holds shards already"):
        write_shards(records(1), tmp_path)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "a.tar.partial").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"a\.tar\.partial cannot be written: No space left"):
        write_shard(tmp_path / "a.tar", records(2))


def test_manifest_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        read_manifest(tmp_path)
    for text, message in [
        ("{", "not readable"),
        ("[]", "not a manifest of version 1"),
        ('{"version": 2, "shards": []}', "not a manifest of version 1"),
        ('{"version": 1, "shards": [{"name": "a"}]}', "exactly the keys name, samples"),
    ]:
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=message):
            read_manifest(tmp_path)
    write_manifest(tmp_path, [])
    assert read_manifest(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_keys_hold_no_dots_and_no_parents() -> None:
    assert clean_key("../a/./b c.d") == "a/b_c_d"
    assert clean_key("...") == "___"
    assert clean_key("/") == "_"
    assert clean_key("été/x-1_2") == "été/x-1_2"
    assert TarSample("k", {"txt": (0, 1)}).image is None
