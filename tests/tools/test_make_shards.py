"""make_shards on every raw format and archive, and on mistakes."""

import gzip
import io
import json
import re
import tarfile
import zipfile
from pathlib import Path

import pytest

from eve.data.manifest import read_manifest
from tests.tools.raw_images import picture, read, run, write_images

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


# --- formats ----------------------------------------------------------------------------------------------


def test_flickr_in_both_forms_and_a_split(tmp_path: Path) -> None:
    write_images(tmp_path / "images", ["1.jpg", "2.jpg", "3.jpg"])
    (tmp_path / "token.txt").write_text(
        "2.jpg#0\tA dog .\n2.jpg#1\t Two, dogs . \n1.jpg#0\tA cat .\n3.jpg#0\tB\n"
    )
    (tmp_path / "c.csv").write_text(
        'image,caption\n2.jpg,A dog .\n2.jpg,"Two, dogs ."\n1.jpg,A cat .\n3.jpg,B\n'
    )
    (tmp_path / "pipes.csv").write_text(
        "image_name| comment_number| comment\n2.jpg| 0| A dog .\n2.jpg| 1| Two, dogs .\n1.jpg| 0| A cat .\n"
    )
    (tmp_path / "split.txt").write_text("1.jpg\n2.jpg\n")
    expected = [
        ("2", picture(1), ["A dog .", "Two, dogs ."], {}),
        ("1", picture(0), ["A cat ."], {}),
    ]
    for number, name in enumerate(("token.txt", "c.csv")):
        out = tmp_path / f"out{number}"
        assert run("flickr", tmp_path / name, out, "--list", tmp_path / "split.txt") == 0
        assert read(out) == expected
    assert run("flickr", tmp_path / "pipes.csv", tmp_path / "out2") == 0
    metadata = [sample[3] for sample in read(tmp_path / "out2")]
    assert metadata == [{"comment_number": ["0", "1"]}, {"comment_number": "0"}]


def test_coco_keeps_all_captions_with_their_image_and_leaves_out_images_without(
    tmp_path: Path, capsys
) -> None:
    write_images(tmp_path / "val", ["a_1.jpg", "a_2.jpg", "a_3.jpg"])
    tree = {
        "images": [{"id": i, "file_name": f"a_{i}.jpg"} for i in (1, 2, 3)],
        "annotations": [
            {"image_id": 2, "id": 5, "caption": "two\n first"},
            {"image_id": 1, "id": 6, "caption": "one"},
            {"image_id": 2, "id": 7, "caption": " two second"},
        ],
    }
    (tmp_path / "c.json").write_text(json.dumps(tree))
    assert run("coco", tmp_path / "c.json", tmp_path / "out", "--images", tmp_path / "val") == 0
    assert read(tmp_path / "out") == [
        ("a_1", picture(0), ["one"], {"image_id": 1}),
        ("a_2", picture(1), ["two first", "two second"], {"image_id": 2}),
    ]
    assert "1 images without a caption" in capsys.readouterr().out


def test_karpathy_splits(tmp_path: Path, capsys) -> None:
    write_images(tmp_path / "coco", [f"val2014/{i}.jpg" for i in range(4)])
    tree = {
        "images": [
            {
                "filepath": "val2014",
                "filename": f"{i}.jpg",
                "imgid": i,
                "cocoid": 100 + i,
                "split": split,
                "sentences": [{"raw": f"{i} {j}", "tokens": []} for j in range(2)],
            }
            for i, split in enumerate(["train", "val", "restval", "train"])
        ]
    }
    (tmp_path / "k.json").write_text(json.dumps(tree))
    source = ("karpathy", tmp_path / "k.json")
    assert run(*source, tmp_path / "o", "--images", tmp_path / "coco", "--split", "train,restval") == 0
    assert [(key, captions) for key, _, captions, _ in read(tmp_path / "o")] == [
        (f"val2014/{i}", [f"{i} 0", f"{i} 1"]) for i in (0, 2, 3)
    ]
    assert read(tmp_path / "o")[1][3] == {"split": "restval", "imgid": 2, "cocoid": 102}
    assert run(*source, tmp_path / "p", "--images", tmp_path / "coco", "--split", "test") == 2
    assert "has no split 'test'; it has train, val, restval" in capsys.readouterr().err


def test_visual_genome_over_two_folders(tmp_path: Path) -> None:
    write_images(tmp_path, ["VG_100K/7.jpg", "VG_100K_2/9.jpg"])
    region = {"x": 1, "y": 2, "width": 3, "height": 4}
    tree = [
        {"id": 9, "regions": [{**region, "phrase": "red hat "}, {**region, "phrase": " "}]},
        {"id": 7, "regions": [{**region, "phrase": "a"}, {**region, "phrase": "b"}]},
    ]
    (tmp_path / "regions.json").write_text(json.dumps(tree))
    assert run("visual-genome", tmp_path / "regions.json", tmp_path / "out") == 0
    box = [1, 2, 3, 4]
    assert read(tmp_path / "out") == [
        ("9", picture(1), ["red hat"], {"image_id": 9, "boxes": [box]}),
        ("7", picture(0), ["a", "b"], {"image_id": 7, "boxes": [box, box]}),
    ]


def test_a_table_without_a_caption_column_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path, ["a.jpg"])
    (tmp_path / "t.csv").write_text("image,beschreibung\na.jpg,rot\n")
    assert run("table", tmp_path / "t.csv", tmp_path / "out") == 0
    sentence = "t.csv has no caption column among image, beschreibung; the samples are images only"
    assert sentence in caplog.text
    caplog.clear()
    found = ("--caption-column", "beschreibung")
    assert run("table", tmp_path / "t.csv", tmp_path / "out2", *found) == 0
    assert read(tmp_path / "out2") == [("a", picture(0), ["rot"], {})]
    assert not caplog.text


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_tables_with_further_columns(tmp_path: Path, suffix: str) -> None:
    write_images(tmp_path / "pics", ["a.jpg", "b.jpg"])
    rows = [
        {"file_name": "pics/a.jpg", "label": "x", "TEXT": "one"},
        {"file_name": "pics/b.jpg", "label": "y", "TEXT": "two"},
        {"file_name": "pics/a.jpg", "label": "x", "TEXT": "three"},
    ]
    path = tmp_path / f"t.{suffix}"
    if suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        lines = [rows[0].keys(), *(row.values() for row in rows)]
        path.write_text("\n".join({"csv": ",", "tsv": "\t"}[suffix].join(line) for line in lines))
    assert run("table", path, tmp_path / "out") == 0
    assert read(tmp_path / "out") == [
        ("pics/a", picture(0), ["one", "three"], {"label": "x"}),
        ("pics/b", picture(1), ["two"], {"label": "y"}),
    ]
    assert run("table", path, tmp_path / "out2", "--caption-column", "label", "--exclude", "TEXT=two") == 0
    assert [sample[2:] for sample in read(tmp_path / "out2")] == [(["x", "x"], {"TEXT": ["one", "three"]})]
    assert run("table", path, tmp_path / "out3", "--text-only") == 0
    assert [(image, captions) for _, image, captions, _ in read(tmp_path / "out3")] == [
        (None, ["one"]),
        (None, ["two"]),
        (None, ["three"]),
    ]


def test_text_lines_become_text_shards(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("one\n\n  two  \nthree\u2028still three\n")
    assert run("text", tmp_path / "t.txt", tmp_path / "out", "--shard-size", 2) == 0
    assert [sample[2] for sample in read(tmp_path / "out")] == [["one"], ["two"], ["three\u2028still three"]]
    assert [shard.samples for shard in read_manifest(tmp_path / "out")] == [2, 1]


def pack(folder: Path, kind: str, archive: Path) -> Path:
    if kind == "folder":
        return folder
    if kind == "zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            for path in sorted(folder.rglob("*")):
                file.write(path, path.relative_to(folder))
    else:
        with tarfile.open(archive, f"w:{kind}") as file:
            file.add(folder, ".")
    return archive


@pytest.mark.parametrize("kind", ["folder", "zip", "", "gz", "bz2", "xz"])
def test_folders_by_class_from_every_archive(tmp_path: Path, kind: str) -> None:
    names = ["train/cat/1.jpg", "train/cat/2.jpg", "train/dog/1.jpg", "test/dog/1.jpg"]
    write_images(tmp_path / "images", names)
    (tmp_path / "images" / "train" / "notes.txt").write_text("no image")
    source = pack(tmp_path / "images", kind, tmp_path / "images.archive")
    assert run("folder", source, tmp_path / "out", "--under", "train") == 0
    assert sorted(read(tmp_path / "out")) == [
        ("train/cat/1", picture(0), [], {"label": "cat"}),
        ("train/cat/2", picture(1), [], {"label": "cat"}),
        ("train/dog/1", picture(2), [], {"label": "dog"}),
    ]
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["000000.tar", "build.jsonl", "manifest.json"]


def test_names_are_found_by_path_then_end_then_stem_and_never_guessed(tmp_path: Path, capsys) -> None:
    write_images(tmp_path / "i", ["x/1.jpg", "y/1.jpg", "y/2.jpg", "3.jpg"])
    table = tmp_path / "t.csv"
    table.write_text("image,caption\n/old/place/y/1.jpg,a\n2,b\n./3.jpg,c\n")
    assert run("table", table, tmp_path / "out", "--images", tmp_path / "i") == 0
    assert [(image, captions) for _, image, captions, _ in read(tmp_path / "out")] == [
        (picture(1), ["a"]),
        (picture(2), ["b"]),
        (picture(3), ["c"]),
    ]
    table.write_text("image,caption\n1.jpg,a\n")
    assert run("table", table, tmp_path / "out2", "--images", tmp_path / "i") == 2
    assert "'1.jpg' could be x/1.jpg or y/1.jpg" in capsys.readouterr().err


def test_index_reads_foreign_shards_and_leaves_them_alone(tmp_path: Path, capsys) -> None:
    for number in range(2):
        with tarfile.open(tmp_path / f"0000{number}.tar", "w") as archive:
            for key in range(3):
                members = {
                    "jpg": picture(key),
                    "txt": b"text",
                    "json": json.dumps({"caption": "text", "url": "u", "status": "success"}).encode(),
                }
                for extension, content in members.items():
                    member = tarfile.TarInfo(f"{number}{key}.{extension}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert run("index", tmp_path) == 0
    assert [(shard.samples, shard.images, shard.captions) for shard in read_manifest(tmp_path)] == [
        (3, 3, 3)
    ] * 2
    assert read(tmp_path)[0] == ("00", picture(0), ["text"], {"url": "u", "status": "success"})
    (tmp_path / "manifest.json").unlink()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "00001.tar").write_bytes(before["00001.tar"][:2000])
    assert run("index", tmp_path) == 2
    assert "00001.tar is truncated" in capsys.readouterr().err


# --- mistakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "files", "message"),
    [
        (["table", "none.csv"], {}, "there is no file"),
        (["table", "t.csv"], {"t.csv": "a,b\n1,2\n"}, "has no image column among a, b; name it with"),
        (
            ["table", "t.csv", "--image-column", "c"],
            {"t.csv": "a,b\n1,2\n"},
            "has no column 'c' for the image",
        ),
        (["table", "t.csv"], {"t.csv": "image,caption\n"}, "holds no rows"),
        (["table", "t.csv"], {"t.csv": "image,caption\n,x\n"}, "row 1 of"),
        (["table", "t.csv"], {"t.csv": "image,n\na.jpg,1,2\n"}, "line 2 of .* has 3 values, the header 2"),
        (["table", "t.jsonl"], {"t.jsonl": '{"image": "a"}\n[1]\n'}, "line 2 of .* is not a JSON object"),
        (
            ["table", "t.jsonl"],
            {"t.jsonl": '{"image": "a"}\n{"image": "b", "caption": "\\ud800 x"}\n'},
            "line 2 of .* is not readable JSON: .* half a surrogate pair",
        ),
        (["coco", "c.json"], {"c.json": "[" * 100_000}, "is not JSON: .* nested more than 64 deep"),
        (["table", "t.jsonl"], {"t.jsonl": '{"image": "a", "caption": 3}'}, "caption of 'a' is int"),
        (["table", "t.csv"], {"t.csv": b"image,caption\n\xff\xfe,x\n"}, "is not UTF-8 text"),
        (["coco", "c.json"], {"c.json": "{"}, "is not JSON"),
        (["coco", "c.json"], {"c.json": "[]"}, "is not a COCO captions JSON"),
        (["coco", "c.json"], {"c.json": '{"images": []}'}, "it lacks 'annotations'"),
        (["karpathy", "c.json"], {"c.json": '{"images": [{"filename": "a"}]}'}, "it lacks 'split'"),
        (["visual-genome", "c.json"], {"c.json": '{"images": []}'}, "is not a Visual Genome"),
        (
            ["flickr", "c.txt"],
            {"c.txt": "a.jpg#0\tx\nb.jpg y\n"},
            "line 2 of .* is not `image#number<tab>caption`",
        ),
        (["folder", "none"], {}, "there is no image folder or archive"),
        (["folder", "a.txt"], {"a.txt": "x"}, "neither a folder of images nor a tar or zip"),
        (["folder", "a"], {"a/x.txt": "x"}, "no sample of .* is left of 0"),
        (
            ["folder", "a.tgz"],
            {"a.tgz": gzip.compress(bytes(2000))[:-9]},
            "neither a folder|cannot be unpacked",
        ),
        (["text", "a.txt"], {"a.txt": "\n\n"}, "no sample of .* is left"),
        (["text", "a.txt", "--exclude", "label"], {"a.txt": "x"}, "is not FIELD=VALUE"),
        (["text", "a.txt", "--exclude", "label=1"], {"a.txt": "x"}, "no sample has the field 'label'"),
        (["text", "a.txt", "--list", "b.txt"], {"a.txt": "x", "b.txt": ""}, "the list .* is empty"),
        (["index", "a"], {"a/x.txt": "x"}, r"holds no \*\.tar"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(tmp_path: Path, capsys, arguments, files, message) -> None:
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    format, source, *options = arguments
    options = [str(tmp_path / option) if option == "b.txt" else option for option in options]
    out = [] if format == "index" else [tmp_path / "out"]
    assert run(format, tmp_path / source, *out, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("make_shards: ")
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_arguments_out_of_range_end_with_2(tmp_path: Path) -> None:
    for option in (["--quality", "0"], ["--shard-size", "0"], ["--max-bad-share", "2"], ["--resize", "x"]):
        with pytest.raises(SystemExit) as end:
            run("text", tmp_path / "t", tmp_path / "o", *option)
        assert end.value.code == 2
    (tmp_path / "t.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    assert run("text", tmp_path / "t.txt", tmp_path / "file" / "out") == 2


# --- real data --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (SHARED / "flickr8k").is_dir(), reason="needs Flickr8k in ../shared/data")
def test_flickr8k_dev_straight_from_its_tar(tmp_path: Path) -> None:
    raw = SHARED / "flickr8k"
    names = (raw / "dev.txt").read_text().split()
    arguments = ("flickr", raw / "captions.txt", tmp_path / "out", "--images", raw / "images.tar")
    assert run(*arguments, "--list", raw / "dev.txt", "--shard-size", 400) == 0
    samples = read(tmp_path / "out")
    assert {f"{key}.jpg" for key, *_ in samples} == set(names)
    assert all(len(captions) == 5 for _, _, captions, _ in samples)
    with tarfile.open(raw / "images.tar") as archive:
        for key, image, *_ in samples[::100]:
            member = archive.extractfile(f"images/{key}.jpg")
            assert member is not None
            assert member.read() == image
