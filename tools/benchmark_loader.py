"""Images per second of the data stream, side by side with a plain pipeline on the same shards.

    python tools/benchmark_loader.py                       1-megapixel JPEGs, made once and kept in a cache
    python tools/benchmark_loader.py --shards 'DIR/*.tar'  your own shards
    python tools/benchmark_loader.py --workers 1           through one worker process each, wall-clock time

The plain pipeline is what people write: webdataset, `Image.open(...).convert("RGB")`, then torchvision's
RandomResizedCrop (bicubic), RandomHorizontalFlip, ToTensor and Normalize, written out here on Pillow and
torch so that no torchvision is needed; batches by torch's DataLoader. The stream gives uint8 batches, which
the model normalises on its device; `--float` counts that too.

Repetitions alternate. Without workers the time is the CPU time of the process, so other programs on the
machine disturb little: images per second and core.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from webdataset.compat import WebDataset

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eve.config import Data, Source
from eve.data.batch import collate
from eve.data.loader import SourceStream
from eve.data.manifest import describe_shard, write_manifest
from eve.data.shards import resolve
from eve.errors import UserError

SIZE = (1152, 864)
SCALE = (0.5, 1.0)
NUM_SHARDS = 4


def make_shards(directory: Path, num_images: int) -> None:
    """JPEGs with the 1/f spectrum and the edges of photographs, about 0.25 bytes a pixel."""
    directory.mkdir(parents=True, exist_ok=True)
    width, height = SIZE
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    rng = np.random.default_rng(0)
    samples: list[list[tuple[str, bytes]]] = [[] for _ in range(NUM_SHARDS)]
    for number in range(num_images):
        noise = rng.normal(size=(4, height, width))
        fields = np.fft.irfft2(np.fft.rfft2(noise) / frequency**1.35, s=(height, width))
        fields /= fields.std(axis=(1, 2), keepdims=True)
        luma = fields[0] + 0.8 * np.sign(fields[3])
        pixels = np.stack([luma, luma, luma], axis=-1) + 0.25 * fields[:3].transpose(1, 2, 0)
        stream = io.BytesIO()
        image = Image.fromarray((128 + 45 * pixels).clip(0, 255).astype(np.uint8))
        image.save(stream, "JPEG", quality=88)
        caption = json.dumps({"captions": [f"picture {number}"]}).encode()
        samples[number % NUM_SHARDS] += [
            (f"{number:06d}.jpg", stream.getvalue()),
            (f"{number:06d}.json", caption),
        ]
    for number, members in enumerate(samples):
        with tarfile.open(directory / f"{number:03d}.tar", "w") as archive:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    write_manifest(directory, [describe_shard(path) for path in sorted(directory.glob("*.tar"))])


# --- the plain pipeline -----------------------------------------------------------------------------------


class PlainTransform:
    """torchvision's RandomResizedCrop, RandomHorizontalFlip, ToTensor, Normalize(0.5, 0.5)."""

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size

    def __call__(self, sample: tuple[bytes]) -> Tensor:
        image = Image.open(io.BytesIO(sample[0])).convert("RGB")
        left, top, width, height = self._box(*image.size)
        image = image.crop((left, top, left + width, top + height))
        image = image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return tensor.to(torch.float32).div_(255).sub_(0.5).div_(0.5)

    @staticmethod
    def _box(width: int, height: int) -> tuple[int, int, int, int]:
        for _ in range(10):
            area = width * height * random.uniform(*SCALE)
            aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return random.randint(0, width - w), random.randint(0, height - h), w, h
        side = min(width, height)
        return (width - side) // 2, (height - side) // 2, side, side


def plain_batches(paths: list[str], image_size: int, batch_size: int, workers: int) -> Iterator[Tensor]:
    dataset = (
        WebDataset(paths, shardshuffle=len(paths), resampled=False, seed=1, empty_check=False)
        .shuffle(100)
        .to_tuple("jpg;jpeg;png")
        .map(PlainTransform(image_size))
        .repeat()  # pyright: ignore[reportAttributeAccessIssue]
    )
    return iter(DataLoader(dataset, batch_size=batch_size, num_workers=workers))


def eve_batches(
    pattern: str, image_size: int, batch_size: int, workers: int, as_float: bool
) -> Iterator[Tensor]:
    source = {"kind": "image", "mix": [{"shards": pattern}], "batch_size": batch_size, "crop_scale": SCALE}
    readers = math.gcd(batch_size, 8)
    stream = SourceStream(
        Source.model_validate(source),
        Data.model_validate(
            {"tokenizer": "", "num_readers": readers, "shuffle_buffer": 100, "sources": {"images": source}}
        ),
        seed=1,
        image_size=image_size,
        max_text_length=3,
        tokenizer=None,
        maskings={},
        rank=0,
        num_ranks=1,
        num_workers=workers,
    )
    for samples, _ in stream:
        images = collate(samples).images_BCHW
        assert images is not None
        yield images.to(torch.float32).div_(127.5).sub_(1) if as_float else images


# --- measuring --------------------------------------------------------------------------------------------


def images_per_second(
    open_batches: Callable[[], Iterator[Tensor]], num_images: int, clock: Callable[[], float]
) -> float:
    """Of a fresh pipeline, from its first batch on: nothing is made ahead before, or for the next one."""
    batches = open_batches()
    next(batches)
    start, done = clock(), 0
    while done < num_images:
        done += len(next(batches))
    return done / (clock() - start)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shards", help="a pattern of local shards; default: made and kept in --cache")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "eve_benchmark_loader")
    parser.add_argument("--num-made", type=int, default=64, help="images to make")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--images", type=int, default=192, help="images of one measurement")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--float", action="store_true", dest="as_float", help="the stream gives floats too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)

    if options.shards is None:
        directory = options.cache / f"{SIZE[0]}x{SIZE[1]}_{options.num_made}"
        if not (directory / "manifest.json").exists():
            make_shards(directory, options.num_made)
        options.shards = str(directory)
    shard_set = resolve(options.shards)
    paths = [shard.address for shard in shard_set.shards]
    size = sum(Path(path).stat().st_size for path in paths)
    print(f"{shard_set.num_samples} images, {size / shard_set.num_samples / 1e3:.0f} KB each")

    clock = time.perf_counter if options.workers else time.process_time
    shape = (options.image_size, options.batch_size, options.workers)
    pipelines = {
        "eve": partial(eve_batches, options.shards, *shape, options.as_float),
        "plain": partial(plain_batches, paths, *shape),
    }
    speeds: dict[str, list[float]] = {name: [] for name in pipelines}
    unit = f"wall-clock, {options.workers} workers" if options.workers else "per core"
    for repeat in range(options.repeats):
        for name, open_batches in pipelines.items():
            speeds[name].append(images_per_second(open_batches, options.images, clock))
        print(f"  {repeat + 1}: " + "  ".join(f"{name} {speed[-1]:.1f}" for name, speed in speeds.items()))
    medians = {name: statistics.median(speed) for name, speed in speeds.items()}
    print(f"images/s {unit}, {options.image_size} px, median of {options.repeats}:")
    for name, median in medians.items():
        print(f"  {name:6} {median:8.1f}")
    print(f"  ratio  {medians['eve'] / medians['plain']:8.2f}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
