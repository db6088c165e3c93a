"""verify_shards finds each kind of damage, done to sound shards one at a time, and nothing else."""

import dataclasses
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eve.data.manifest import describe_shard, write_manifest
from eve.data.shard_writer import Record, write_shard, write_shards
from tests.tools.raw_images import picture
from tools.verify_shards import check_shard, find_shards, main, verify

NUM_SHARDS, SHARD_SIZE = 3, 4


def pairs() -> list[Record]:
    return [Record(f"k{i:02d}", picture(i), "jpg", [f"caption {i}", "two"], {"n": i}) for i in range(12)]


def write(directory: Path, records: list[Record], *, listed: bool = True) -> None:
    """The shards anew, with a manifest that describes them, so that only the samples are at fault."""
    for path in directory.glob("*"):
        path.unlink()
    shards = write_shards(records, directory, SHARD_SIZE)
    if not listed:
        write_manifest(directory, shards[:1])


def problems(directory: Path) -> list[tuple[str, str]]:
    """(shard, problem) in order."""
    paths, listed = find_shards(str(directory))
    reports = verify(paths, listed, None, True, 1)
    return [(report.info.name, problem) for report in reports for problem, _ in report.problems]


def test_sound_shards_pass_with_any_number_of_workers_and_any_pattern(tmp_path: Path, capsys) -> None:
    write(tmp_path, pairs())
    tables = set()
    for pattern in (tmp_path, f"{tmp_path}/*.tar", f"{tmp_path}/00000{{0..2}}.tar"):
        for workers in ("1", "2"):
            assert main([str(pattern), "--workers", workers]) == 0
            tables.add(capsys.readouterr().out)
    assert len(tables) == 1
    (table,) = tables
    assert table.splitlines()[1].split()[:6] == ["3", "sound", "shards", "12", "12", "24"]
    assert main([f"{tmp_path}/000001.tar", "--workers", "1"]) == 0


def replace(number: int, **changes: Any) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        records = pairs()
        records[number] = dataclasses.replace(records[number], **changes)
        write(directory, records)

    return damage


def edit(
    number: int, change: Callable[[bytes], bytes], *, redescribe: bool = False
) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = directory / f"00000{number}.tar"
        path.write_bytes(change(path.read_bytes()))
        if redescribe:
            write_manifest(directory, [describe_shard(path) for path in sorted(directory.glob("*.tar"))])

    return damage


# A cut shard differs from the manifest in samples, images, captions, bytes and checksum.
CUT = [("000001.tar", "truncated"), *[("000001.tar", "manifest")] * 5]


def cut_in_member(content: bytes) -> bytes:
    return content[: content.rindex(b"k05.jpg") + 600]


def cut_between_members(content: bytes) -> bytes:
    return content[: content.rindex(b"k05.jpg")]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (edit(1, cut_in_member), CUT),
        (edit(1, cut_between_members), CUT),
        (edit(1, lambda content: b""), CUT),
        (edit(1, lambda content: b"garbage" * 999), CUT),
        (edit(2, lambda content: content + bytes(512)), [("000002.tar", "manifest")] * 2),
        (edit(2, lambda content: content.replace(b"two", b"TWO")), [("000002.tar", "manifest")]),
        (
            edit(0, lambda content: content.replace(b'"two"]', b'"   "]', 1), redescribe=True),
            [("000000.tar", "empty")],
        ),
        (
            edit(0, lambda content: content.replace(b'"two"]', b'"two"}', 1), redescribe=True),
            [("000000.tar", "text"), ("000000.tar", "half")],
        ),
        (
            edit(0, lambda content: content.replace(b"caption 0", b"\\ud800 x ", 1), redescribe=True),
            [("000000.tar", "text"), ("000000.tar", "half")],
        ),
        (replace(6, image_bytes=None), [("000001.tar", "half")]),
        (replace(6, captions=[]), [("000001.tar", "half")]),
        (replace(6, captions=[], metadata={}), [("000001.tar", "half")]),
        (replace(6, image_bytes=b"garbage"), [("000001.tar", "image")]),
        (replace(6, image_bytes=b""), [("000001.tar", "image")]),
        (replace(6, image_bytes=picture(6)[:-60]), [("000001.tar", "image")]),
        (replace(6, key="k01"), [("000001.tar", "duplicate-key")]),
        (replace(6, image_bytes=picture(5)), [("000001.tar", "duplicate-image")]),
        (lambda directory: (directory / "000001.tar").unlink(), [("000001.tar", "missing")]),
        (
            lambda directory: write(directory, pairs(), listed=False),
            [("000001.tar", "manifest"), ("000002.tar", "manifest")],
        ),
    ],
)
def test_each_damage_is_found_where_it_is(tmp_path: Path, capsys, damage, expected) -> None:
    write(tmp_path, pairs())
    damage(tmp_path)
    assert problems(tmp_path) == expected
    assert main([str(tmp_path), "--workers", "1"]) == 1
    found = {problem for _, problem in expected}
    table = capsys.readouterr().out
    for shard, problem in expected:
        assert any(line.startswith(problem) and shard in line for line in table.splitlines())
    allow = [word for problem in found for word in ("--allow", problem)]
    assert main([str(tmp_path), "--workers", "1", *allow]) == 0


def test_a_key_twice_in_one_shard_is_found(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", pairs()[:3])
    (tmp_path / "more").write_text("no json")
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        archive.add(tmp_path / "more", "k00.json")
    kinds = [problem for problem, _ in verify([tmp_path / "a.tar"], None, None, True, 1)[0].problems]
    assert sorted(set(kinds)) == ["duplicate-key", "half", "text"]


def test_the_kind_of_most_samples_decides_what_is_half(tmp_path: Path) -> None:
    images = [Record(f"i{i}", picture(i), metadata={"label": i}) for i in range(4)]
    texts = [Record(f"t{i}", captions=[f"text {i}"]) for i in range(4)]
    for name, records in (("images", images), ("texts", texts)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, records)
        assert problems(tmp_path / name) == []
        assert main([str(tmp_path / name), "--kind", name[:-1], "--workers", "1"]) == 0
        assert main([str(tmp_path / name), "--kind", "pair", "--workers", "1"]) == 1


def test_foreign_shards_without_a_manifest_are_checked_as_well(tmp_path: Path) -> None:
    path = tmp_path / "00000.tar"
    with tarfile.open(path, "w") as archive:
        for key in ("a", "b"):
            for extension, content in (
                ("jpg", picture(ord(key))),
                ("txt", b"text"),
                ("json", json.dumps({"caption": "text"}).encode()),
            ):
                (tmp_path / "member").write_bytes(content)
                archive.add(tmp_path / "member", f"{key}.{extension}")
    report = check_shard(path, decode=True)
    assert (report.info.samples, report.info.images, report.info.captions) == (2, 2, 2)
    assert main([str(path), "--workers", "1"]) == 0


def test_undecodable_images_pass_without_decoding(tmp_path: Path) -> None:
    write(tmp_path, pairs())
    replace(6, image_bytes=b"garbage")(tmp_path)
    assert main([str(tmp_path), "--no-decode", "--workers", "1"]) == 0


def test_keys_with_a_dot_are_no_sound_shard(tmp_path: Path, capsys) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for number in range(3):
            (tmp_path / "member").write_bytes(picture(number))
            archive.add(tmp_path / "member", f"photo{number}.v2.jpg")
    assert main([str(tmp_path / "0.tar"), "--workers", "1"]) == 1
    assert "photo0: only .v2.jpg; a key ends at its first dot" in capsys.readouterr().out


def test_a_brace_without_its_other_half_is_a_mistake_in_the_call(tmp_path: Path, capsys) -> None:
    assert main([f"{tmp_path}/{{0..1.tar", "--workers", "1"]) == 2
    assert "a brace without its other half" in capsys.readouterr().err


@pytest.mark.parametrize("pattern", ["none", "none/*.tar", "{a,b}.tar", "."])
def test_nothing_there_is_a_mistake_in_the_call(tmp_path: Path, capsys, pattern: str) -> None:
    assert main([str(tmp_path / pattern), "--workers", "1"]) == 2
    assert "no shard matches" in capsys.readouterr().err
