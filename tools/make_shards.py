"""Builds tar shards from raw images and captions.

    python tools/make_shards.py FORMAT SOURCE OUT [options]

    flickr         captions.txt of Flickr8k or Flickr30k (image,caption or image#0<tab>caption)
    coco           COCO captions JSON
    karpathy       dataset_coco.json, dataset_flickr30k.json (--split)
    visual-genome  region_descriptions.json
    table          CSV, TSV or JSON lines of image paths and captions
    folder         a folder or archive of images, without captions; folders by class become `label`
    text           one text a line
    index          shards of img2dataset or webdataset: writes their manifest.json and copies nothing

    python tools/make_shards.py flickr captions.txt shards/train --images images.tar --list train.txt
    python tools/make_shards.py karpathy dataset_coco.json shards/coco --images coco/ --split train,restval \\
        --resize 256

Images are read from a folder, a tar (compressed or not) or a zip, in place. All captions of an image stay
with it. An interrupted run goes on when it is started again. Exit code 2: a mistake in the call or the data.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eve.data import captions
from eve.data.captions import Annotation, Columns
from eve.data.image_store import ImageStore
from eve.data.manifest import ShardInfo, describe_shard, write_manifest
from eve.data.shard_build import BAD_IMAGES, BuildOptions, build_shards, make_directory, plan_samples
from eve.errors import UserError
from tools.progress import Progress


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        if options.format == "index":
            _index(options.source, options.workers)
        else:
            _build(options)
    except UserError as error:
        print(f"make_shards: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nmake_shards: interrupted; start it again to go on", file=sys.stderr)
        return 130
    return 0


def _build(options: argparse.Namespace) -> None:
    start = time.monotonic()
    make_directory(options.out)
    store = _store(options)
    try:
        annotations, remarks = _annotations(options, store)
        samples, missing = plan_samples(annotations, store)
        report = build_shards(
            samples,
            store.reader if store else None,
            options.out,
            BuildOptions(options.shard_size, options.resize, options.quality),
            workers=options.workers,
            missing=missing,
            max_bad_share=options.max_bad_share,
            progress=Progress("samples"),
        )
    finally:
        if store:
            store.close()
    seconds = time.monotonic() - start
    print(_summary(report.shards, options.out) + f", {seconds:.1f} s")
    if report.kept:
        print(f"{report.kept} shards were there already, checked and kept")
    for remark in remarks:
        print(remark)
    if report.bad:
        broken = len(report.bad) - len(missing)
        print(f"left out: {len(missing)} missing and {broken} broken images, in {options.out / BAD_IMAGES}")


def _store(options: argparse.Namespace) -> ImageStore | None:
    if options.format == "text" or (options.format == "table" and options.text_only):
        return None
    images = options.source if options.format == "folder" else options.images or options.source.parent
    return ImageStore(images, scratch=options.out)


def _annotations(options: argparse.Namespace, store: ImageStore | None) -> tuple[list[Annotation], list[str]]:
    """What is to be written, in order, and remarks for the summary."""
    annotations = _read(options, store)
    remarks = []
    names = captions.read_names(options.list) if options.list else None
    chosen = captions.select(annotations, names, options.under, options.exclude)
    if not chosen:
        raise UserError(f"no sample of {options.source} is left of {len(annotations)} after the selection")
    if names is not None and len(chosen) < len(names):
        remarks.append(
            f"{options.list} names {len(names)} images, {len(chosen)} of them are in {options.source}"
        )
    captioned = [annotation for annotation in chosen if annotation.captions]
    if captioned and len(captioned) < len(chosen):
        remarks.append(f"left out: {len(chosen) - len(captioned)} images without a caption")
        chosen = captioned
    if options.shuffle is not None:
        random.Random(options.shuffle).shuffle(chosen)
    return chosen[: options.limit], remarks


def _read(options: argparse.Namespace, store: ImageStore | None) -> list[Annotation]:
    source = options.source
    match options.format:
        case "flickr":
            return captions.read_flickr(source)
        case "coco":
            return captions.read_coco(source)
        case "karpathy":
            return captions.read_karpathy(source, [split for split in options.split.split(",") if split])
        case "visual-genome":
            return captions.read_visual_genome(source)
        case "table":
            columns = Columns(
                options.image_column, options.caption_column, options.delimiter, options.text_only
            )
            return captions.read_table(source, columns)
        case "text":
            return captions.read_text(source)
    assert store is not None
    return captions.image_labels(store.locations)


def _index(directory: Path, workers: int) -> None:
    paths = sorted(directory.glob("*.tar"))
    if not paths:
        raise UserError(f"{directory} holds no *.tar")
    progress, shards = Progress("shards"), []
    with ProcessPoolExecutor(min(workers, len(paths)), get_context("spawn")) as pool:
        for info in pool.map(describe_shard, paths):
            shards.append(info)
            progress(len(shards), len(paths))
    write_manifest(directory, shards)
    print(_summary(shards, directory))


def _summary(shards: list[ShardInfo], directory: Path) -> str:
    samples, images, texts, size = (
        sum(getattr(shard, name) for shard in shards) for name in ("samples", "images", "captions", "bytes")
    )
    return (
        f"{directory}: {len(shards)} shards, {samples:,} samples, {images:,} images, "
        f"{texts:,} captions, {size / 1e6:,.1f} MB"
    )


def _parser() -> argparse.ArgumentParser:
    description, _, epilog = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="make_shards",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")

    workers = argparse.ArgumentParser(add_help=False)
    workers.add_argument(
        "--workers", type=_positive, default=os.cpu_count() or 1, help="processes (all cores)"
    )

    build = argparse.ArgumentParser(add_help=False)
    build.add_argument("source", type=Path)
    build.add_argument("out", type=Path)
    build.add_argument("--shard-size", type=_positive, default=1000, help="samples of a shard (1000)")
    build.add_argument("--shuffle", type=int, metavar="SEED", help="shuffle the samples before they are cut")
    build.add_argument("--limit", type=_positive, metavar="N", help="the first N samples only")
    build.add_argument(
        "--list", type=Path, metavar="FILE", help="a file of image names, one a line, that selects a split"
    )
    build.add_argument(
        "--under", default="", metavar="FOLDER", help="only images whose path begins with the folder"
    )
    build.add_argument(
        "--exclude", action="append", default=[], metavar="FIELD=VALUE", help="leave out samples; repeatable"
    )
    build.add_argument("--resize", type=_positive, metavar="PIXELS", help="short side of larger images")
    build.add_argument("--quality", type=_quality, default=90, help="of the JPEGs that --resize makes (90)")
    build.add_argument(
        "--max-bad-share",
        type=_share,
        default=0.01,
        help="of missing and broken images before it stops (0.01)",
    )
    images = argparse.ArgumentParser(add_help=False)
    images.add_argument("--images", type=Path, help="folder, tar or zip (default: the folder of SOURCE)")

    for name in ("flickr", "coco", "visual-genome", "folder", "text"):
        parents = [build, workers] if name in ("folder", "text") else [build, images, workers]
        formats.add_parser(name, parents=parents)
    karpathy = formats.add_parser("karpathy", parents=[build, images, workers])
    karpathy.add_argument(
        "--split", default="", help="train, restval, val or test; several with commas (all)"
    )
    table = formats.add_parser("table", parents=[build, images, workers])
    table.add_argument("--image-column", help="found by its usual names otherwise")
    table.add_argument("--caption-column", help="found by its usual names otherwise")
    table.add_argument("--delimiter", help="of a CSV (default: the most frequent of tab , | ; in the header)")
    table.add_argument("--text-only", action="store_true", help="rows are texts without an image")
    index = formats.add_parser("index", parents=[workers])
    index.add_argument("source", type=Path, metavar="DIRECTORY")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _quality(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 100:
        raise ValueError
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError
    return value


if __name__ == "__main__":
    sys.exit(main())
