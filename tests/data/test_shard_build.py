"""Building shards: any number of workers, interruptions, other options, broken images, resizing."""

import io
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.tools.raw_images import picture, read, run, tars, write_images
from tools.make_shards import main
from tools.verify_shards import main as verify

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def forty(tmp_path: Path) -> Path:
    write_images(tmp_path / "i", [f"{i:02d}.jpg" for i in range(40)])
    rows = [f"{i:02d}.jpg,caption {i} {j}" for i in range(40) for j in range(2)]
    (tmp_path / "t.csv").write_text("\n".join(["image,caption", *rows]))
    return tmp_path


def build(root: Path, out: str, *options: object, workers: int = 1) -> int:
    arguments = ("table", root / "t.csv", root / out, "--images", root / "i", "--shard-size", 7, *options)
    return run(*arguments, workers=workers)


def test_the_bytes_do_not_depend_on_the_workers(forty: Path) -> None:
    for name, workers in (("one", 1), ("three", 3)):
        assert build(forty, name, "--shuffle", 5, "--resize", 8, workers=workers) == 0
    assert tars(forty / "one") == tars(forty / "three")
    assert len(tars(forty / "one")) == 7
    order = [int(key) for key, *_ in read(forty / "one")]
    assert order != list(range(40))
    assert sorted(order) == list(range(40))
    oracle = list(range(40))
    random.Random(5).shuffle(oracle)
    assert order == oracle


def test_a_later_run_keeps_what_is_sound_and_remakes_what_is_not(forty: Path, capsys) -> None:
    assert build(forty, "out") == 0
    whole = tars(forty / "out")
    out = forty / "out"
    (out / "000001.tar").unlink()
    (out / "000002.tar").write_bytes(b"x" * len(whole["000002.tar"]))
    (out / "000003.tar").write_bytes(whole["000003.tar"][:-1])
    (out / "000004.tar").rename(out / "000004.tar.partial")
    (out / "manifest.json").unlink()
    journal = (out / "build.jsonl").read_bytes()
    # As if killed while the last line was written.
    (out / "build.jsonl").write_bytes(journal[:-20])
    kept = (out / "000000.tar").stat().st_ino
    assert build(forty, "out") == 0
    assert "1 shards were there already" in capsys.readouterr().out
    assert tars(out) == whole
    assert (out / "000000.tar").stat().st_ino == kept
    assert not list(out.glob("*.partial"))


def test_killed_builds_go_on_to_the_same_bytes(tmp_path: Path) -> None:
    contents = [picture(number, (1600, 1200)) for number in range(3)]
    with tarfile.open(tmp_path / "i.tar", "w") as archive:
        for number in range(120):
            content = contents[number % 3]
            member = tarfile.TarInfo(f"{number:03d}.jpg")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    arguments = ["folder", str(tmp_path / "i.tar"), "--shard-size", "3", "--resize", "200"]
    assert main([*arguments[:2], str(tmp_path / "whole"), *arguments[2:], "--workers", "1"]) == 0
    script = [sys.executable, str(ROOT / "tools" / "make_shards.py"), *arguments[:2], str(tmp_path / "out")]
    for number in (signal.SIGKILL, signal.SIGINT):
        # A shell that runs the tests in the background makes its children ignore SIGINT.
        process = subprocess.Popen(
            [*script, *arguments[2:], "--workers", "1"],
            stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        # Somewhere in the middle: after a few shards more than before.
        before = len(list((tmp_path / "out").glob("*.tar")))
        while process.poll() is None and len(list((tmp_path / "out").glob("*.tar"))) < before + 4:
            time.sleep(0.002)
        process.send_signal(number)
        process.communicate()
        assert process.returncode == (-number if number == signal.SIGKILL else 130)
        assert not (tmp_path / "out" / "manifest.json").exists()
    assert main([*arguments[:2], str(tmp_path / "out"), *arguments[2:], "--workers", "2"]) == 0
    assert tars(tmp_path / "out") == tars(tmp_path / "whole")


def test_shards_of_other_options_are_not_mixed(forty: Path, capsys) -> None:
    assert build(forty, "out") == 0
    whole = tars(forty / "out")
    for options, message in [
        (("--resize", 9), "made with resize None, now it is 9"),
        (("--shard-size", 8), "made with shard_size 7, now it is 8"),
        (("--quality", 50), "made with quality 90, now it is 50"),
        (("--shuffle", 1), "shards of other samples"),
        (("--limit", 30), "shards of other samples"),
    ]:
        assert build(forty, "out", *options) == 2
        assert message in capsys.readouterr().err
    assert tars(forty / "out") == whole
    (forty / "foreign").mkdir()
    (forty / "foreign" / "a.tar").write_bytes(b"")
    assert build(forty, "foreign") == 2
    assert "were not made here" in capsys.readouterr().err


def test_missing_and_broken_images_are_named_and_too_many_stop_it(forty: Path, capsys) -> None:
    images = forty / "i"
    (images / "03.jpg").unlink()
    (images / "05.jpg").write_bytes(b"garbage")
    (images / "06.jpg").write_bytes(picture(6)[:-100])
    (images / "07.jpg").write_bytes(b"")
    (images / "39.jpg").write_bytes(picture(39, format="PNG")[:200])
    for workers in (1, 2):
        assert build(forty, f"out{workers}", "--max-bad-share", 0.2, workers=workers) == 0
        assert "1 missing and 4 broken images" in capsys.readouterr().out
        lines = (forty / f"out{workers}" / "bad_images.tsv").read_text().splitlines()
        assert [line.split("\t")[0] for line in lines] == ["03.jpg", "05.jpg", "06.jpg", "07.jpg", "39.jpg"]
        keys = [int(key) for key, *_ in read(forty / f"out{workers}")]
        assert keys == [i for i in range(40) if i not in (3, 5, 6, 7, 39)]
        assert verify([str(forty / f"out{workers}"), "--workers", "1"]) == 0
    assert tars(forty / "out1") == tars(forty / "out2")
    capsys.readouterr()
    assert build(forty, "out3", "--max-bad-share", 0.1) == 2
    error = capsys.readouterr().err
    assert "5 of 40 samples have a missing or broken image, more than the share 0.1" in error
    assert not (forty / "out3" / "manifest.json").exists()
    # The share may be raised afterwards; nothing is done twice.
    assert build(forty, "out3", "--max-bad-share", 1) == 0
    assert tars(forty / "out3") == tars(forty / "out1")
    shutil.rmtree(images)
    images.mkdir()
    assert build(forty, "out4") == 2
    assert "40 of 40 samples" in capsys.readouterr().err


def test_a_shard_of_broken_images_only_is_left_out(forty: Path) -> None:
    for number in range(7, 14):
        (forty / "i" / f"{number:02d}.jpg").write_bytes(b"garbage")
    assert build(forty, "out", "--max-bad-share", 1) == 0
    assert not (forty / "out" / "000001.tar").exists()
    assert len(read(forty / "out")) == 33
    assert build(forty, "out", "--max-bad-share", 1) == 0
    assert len(read(forty / "out")) == 33


def test_names_that_make_one_key_stay_apart(tmp_path: Path) -> None:
    names = ["a b.jpg", "a_b.jpg", "a.b.jpg", "a_b-1.jpg", "a_b.png.jpg"]
    write_images(tmp_path / "i", names)
    assert run("folder", tmp_path / "i", tmp_path / "out") == 0
    samples = read(tmp_path / "out")
    assert len({key for key, *_ in samples}) == 5
    assert {image for _, image, *_ in samples} == {picture(i) for i in range(5)}


# --- images -----------------------------------------------------------------------------------------------


def test_resize_makes_large_images_small_and_keeps_small_ones_byte_for_byte(tmp_path: Path) -> None:
    folder = tmp_path / "i"
    folder.mkdir()
    contents = {
        "landscape.jpg": picture(0, (400, 200)),
        "portrait.png": picture(1, (100, 300), "PNG"),
        "exact.jpg": picture(2, (64, 80)),
        "small.webp": picture(3, (40, 500), "WEBP"),
        "cmyk.jpg": picture(4, (200, 200), "JPEG", "CMYK"),
        "grey.jpg": picture(5, (300, 200), "JPEG", "L"),
        "palette.gif": picture(6, (128, 256), "GIF", "P"),
    }
    turned = Image.open(io.BytesIO(contents["landscape.jpg"]))
    turned.getexif()[0x0112] = 6
    buffer = io.BytesIO()
    turned.save(buffer, "JPEG", exif=turned.getexif())
    contents["turned.jpg"] = buffer.getvalue()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    assert run("folder", folder, tmp_path / "out", "--resize", 64) == 0
    stored = {key: content for key, content, *_ in read(tmp_path / "out")}
    assert stored["exact"] == contents["exact.jpg"]
    assert stored["small"] == contents["small.webp"]
    sizes = {key: Image.open(io.BytesIO(content)).size for key, content in stored.items()}
    assert sizes == {
        **{"landscape": (128, 64), "portrait": (64, 192), "exact": (64, 80), "small": (40, 500)},
        **{"cmyk": (64, 64), "grey": (96, 64), "palette": (64, 128), "turned": (64, 128)},
    }
    for name in ("landscape.jpg", "portrait.png", "cmyk.jpg", "grey.jpg", "palette.gif"):
        key = name.split(".")[0]
        shown = Image.open(io.BytesIO(stored[key]))
        assert shown.mode == "RGB"
        oracle = (
            Image.open(io.BytesIO(contents[name])).convert("RGB").resize(shown.size, Image.Resampling.BICUBIC)
        )
        assert np.abs(np.asarray(shown, float) - np.asarray(oracle, float)).mean() < 6, name
    upright = np.asarray(Image.open(io.BytesIO(stored["turned"])), float)
    flat = np.asarray(Image.open(io.BytesIO(stored["landscape"])), float)
    assert np.abs(np.rot90(flat, -1) - upright).mean() < 6


def test_transparency_becomes_white_and_16_bits_8(tmp_path: Path) -> None:
    (tmp_path / "i").mkdir()
    Image.new("RGBA", (80, 80), (255, 0, 0, 0)).save(tmp_path / "i" / "clear.png")
    levels = np.full((80, 80), 40_000, dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "i" / "deep.png")
    frames = [Image.new("RGB", (80, 80), colour) for colour in ("blue", "red")]
    frames[0].save(tmp_path / "i" / "film.gif", save_all=True, append_images=frames[1:])
    assert run("folder", tmp_path / "i", tmp_path / "out", "--resize", 40) == 0
    colours = {
        key: np.asarray(Image.open(io.BytesIO(image))).mean((0, 1))
        for key, image, *_ in read(tmp_path / "out")
    }
    assert np.allclose(colours["clear"], 255)
    assert np.allclose(colours["deep"], 40_000 / 256, atol=2)
    assert np.allclose(colours["film"], (0, 0, 255), atol=3)


def test_formats_that_shards_do_not_hold_become_jpeg_and_giants_are_refused(tmp_path: Path, capsys) -> None:
    (tmp_path / "i").mkdir()
    Image.new("RGB", (40, 30), "green").save(tmp_path / "i" / "a.jpg", "TGA")
    Image.new("1", (20_000, 5_001)).save(tmp_path / "i" / "b.png")
    assert run("folder", tmp_path / "i", tmp_path / "out", "--max-bad-share", 0.5) == 0
    ((key, content, *_),) = read(tmp_path / "out")
    image = Image.open(io.BytesIO(content))
    assert (key, image.format, image.size) == ("a", "JPEG", (40, 30))
    assert np.allclose(np.asarray(image).mean((0, 1)), (0, 128, 0), atol=2)
    assert "pixels" in (tmp_path / "out" / "bad_images.tsv").read_text()
