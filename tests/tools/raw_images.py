"""Raw images and captions to build shards from, and a plain reader of the result."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from eve.data.manifest import describe_shard, parse_text, read_manifest, read_member, read_texts, scan_tar
from tools.make_shards import main


def picture(seed: int, size: tuple[int, int] = (24, 16), format: str = "JPEG", mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize(size).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def write_images(folder: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))


def run(*arguments: object, workers: int = 1) -> int:
    return main([str(argument) for argument in arguments] + ["--workers", str(workers)])


def read(directory: Path) -> list[tuple[str, bytes | None, list[str], dict]]:
    """(key, image, captions, metadata) of all samples in order; the manifest is checked on the way."""
    samples = []
    for shard in read_manifest(directory):
        path = directory / shard.name
        assert describe_shard(path) == shard
        with open(path, "rb") as file:
            for sample in scan_tar(path).samples:
                image = read_member(file, sample, sample.image) if sample.image else None
                samples.append((sample.key, image, *parse_text(*read_texts(file, sample))))
    return samples


def tars(directory: Path) -> dict[str, bytes]:
    names = [*directory.glob("*.tar"), directory / "manifest.json"]
    return {path.name: path.read_bytes() for path in names}
