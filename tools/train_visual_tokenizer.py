"""Trains a visual tokenizer, whose codes masked image modelling predicts (objective masked_codes).

    python -m tools.train_visual_tokenizer --shards 'data/emoji/train/*.tar' \\
        --held-out 'data/emoji/validation/seen_concept-seen_style/*.tar' --output data/emoji/visual_tokenizer

The defaults are for a laptop: images of 64 pixels, 512 codes, a few minutes. --preset beit2 has the sizes of
BEiT v2. The target is the picture itself, or with --teacher what an exported model says of its patches (an
imported one as well: tools/convert_checkpoint.py makes it).

OUTPUT becomes the tokenizer (visual_tokenizer.safetensors, visual_tokenizer.json), with measurements
(measurements.json), pictures and curves beside it (reconstructions/, tensorboard/). Recipes name it as
data.visual_tokenizer. On several devices: torchrun -m tools.train_visual_tokenizer ...; the result is the
same up to rounding. --resume goes on from OUTPUT/training-STEP.pt. Exit code 2: a mistake in the call or in
the data.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pydantic import ValidationError

from eve.config import Data, Shards, Source, Stage
from eve.data.batch import collate
from eve.data.loader import SourceStream, merge_states
from eve.data.shards import resolve
from eve.errors import UserError
from eve.parallel.topology import Topology
from eve.training.export import load_exported
from eve.training.optimizer import parameter_groups
from eve.training.schedule import learning_rate
from eve.visual_tokenizer import Ranks, Stack, VisualTokenizer, VisualTokenizerConfig
from eve.visual_tokenizer.measure import CodeUse, Teacher
from tools.visual_tokenizer_report import Report

READERS = 8
# Sizes (depth, width, heads) of the encoder and of the decoder.
PRESETS = {"laptop": ((4, 128, 4), (2, 128, 4)), "beit2": ((12, 768, 12), (1, 768, 12))}


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    topology = None
    try:
        topology = Topology.from_environment()
        Training(options, topology).run()
    except UserError as error:
        if topology is None or topology.rank == 0:
            print(f"train_visual_tokenizer: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ntrain_visual_tokenizer: interrupted; --resume goes on", file=sys.stderr)
        return 130
    return 0


class Training:
    """Everything is checked before the first step."""

    def __init__(self, options: argparse.Namespace, topology: Topology) -> None:
        self.options, self.topology = options, topology
        self.output: Path = options.output
        self.ranks = Ranks(topology.rank, topology.world_size, topology.all_reduce_sum)
        if options.batch_size % READERS:
            raise UserError(f"--batch-size {options.batch_size} is not a multiple of {READERS}")
        self.teacher, feature_width = load_teacher(options, topology.device)
        self.config = make_config(options, feature_width)
        resolve(options.held_out or options.shards[0])
        self.data = self._open_data()
        topology.on_rank_0(self._check_output)
        self.tokenizer = VisualTokenizer(self.config, options.seed).to(topology.device)
        groups = parameter_groups(self.tokenizer, options.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99))
        self.stage = Stage.model_construct(
            steps=options.steps, lr=options.lr, warmup_steps=options.warmup_steps, schedule="cosine"
        )
        self.step = 0

    def run(self) -> None:
        if self.options.resume:
            self._load()
        self._begin_report()
        stream = iter(self.data)
        try:
            self._steps(stream)
        finally:
            stream.close()  # pyright: ignore
        if self.report is not None:
            self.tokenizer.save(self.output)
            self.report.finish()
            for path in self.output.glob("training-*.pt"):
                path.unlink()

    def _begin_report(self) -> None:
        """Rank 0 reports; where it cannot, no rank goes on."""

        def begin() -> None:
            self.report = Report(self.options, self.tokenizer, self.teacher, self.step)

        self.report: Report | None = None
        self.topology.on_rank_0(begin)

    def _steps(self, stream: Iterator[Any]) -> None:
        options, codes = self.options, self.config.codes
        count_K, error, since, seen = torch.zeros(codes, dtype=torch.int64), 0.0, time.monotonic(), 0
        while self.step < options.steps:
            samples, state = next(stream)
            images_BCHW = collate(samples).images_BCHW
            assert images_BCHW is not None
            result = self._update(images_BCHW.to(self.topology.device))
            self.step += 1
            # Whole numbers and one rank's share of the error, added up over the ranks when they are told.
            count_K += torch.bincount(result[1], minlength=codes).cpu()
            error, seen = error + float(result[0]), seen + 1
            last = self.step == options.steps
            if last or self.step % options.log_every == 0:
                whole_K = self.topology.all_reduce_sum(count_K.to(self.topology.device)).cpu()
                mean = self.topology.all_reduce_sum(torch.tensor(error, device=self.topology.device))
                seconds = (time.monotonic() - since) / seen
                if self.report is not None:
                    mean_error = float(mean) / seen / self.ranks.number
                    self.report.log(self.step, mean_error, CodeUse.of(whole_K), seconds)
                count_K, error, since, seen = torch.zeros_like(count_K), 0.0, time.monotonic(), 0
            if self.report is not None and (last or self.step % options.images_every == 0):
                self.report.draw(self.step)
            if not last and self.step % options.checkpoint_every == 0:
                self._save(state)

    def _update(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """One step; (error of this rank's pictures, their codes)."""
        features = None if self.teacher is None else self.teacher(images_BCHW)
        if self.step == 0:
            self.tokenizer.begin(images_BCHW, features, self.ranks)
        result = self.tokenizer(images_BCHW, features)
        result.loss.backward()
        self._average_gradients()
        torch.nn.utils.clip_grad_norm_(self.tokenizer.parameters(), self.options.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.stage, self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.tokenizer.quantiser.update(result.vectors_NW, result.codes_N, self.ranks)
        return result.error, result.codes_N

    def _average_gradients(self) -> None:
        if self.ranks.number == 1:
            return
        gradients = [p.grad for p in self.tokenizer.parameters() if p.grad is not None]
        flat = self.topology.all_reduce_sum(torch.cat([g.flatten() for g in gradients]))
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient) / self.ranks.number)

    def _open_data(self) -> SourceStream:
        options = self.options
        source = Source(
            kind="image",
            mix=tuple(Shards(shards=shards) for shards in options.shards),
            batch_size=options.batch_size,
            crop_scale=(options.smallest_crop, 1.0),
        )
        data = Data(tokenizer="", num_readers=READERS, shuffle_buffer=2048, sources={"images": source})
        return SourceStream(
            source,
            data,
            seed=options.seed,
            image_size=options.image_size,
            max_text_length=0,
            tokenizer=None,
            maskings={},
            rank=self.topology.rank,
            num_ranks=self.topology.world_size,
            num_workers=options.num_workers,
        )

    def _check_output(self) -> None:
        if self.options.resume or not (self.output / "visual_tokenizer.safetensors").exists():
            return
        if not self.options.overwrite:
            raise UserError(f"{self.output} holds a visual tokenizer; give --overwrite or another --output")

    def _save(self, state: dict[str, Any]) -> None:
        states = self.topology.gather_objects(state)
        if self.topology.rank:
            return
        path = self.output / f"training-{self.step}.pt"
        tree = {
            "config": self.config.model_dump_json(),
            "tokenizer": self.tokenizer.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "data": json.dumps(merge_states(states)),
        }
        torch.save(tree, path.with_suffix(".writing"))
        path.with_suffix(".writing").replace(path)
        for old in self.output.glob("training-*.pt"):
            if old != path:
                old.unlink()

    def _load(self) -> None:
        found = sorted(self.output.glob("training-*.pt"), key=lambda path: int(path.stem.split("-")[1]))
        if not found:
            return
        tree = torch.load(found[-1], map_location=self.topology.device, weights_only=True)
        if tree["config"] != self.config.model_dump_json():
            raise UserError(f"{found[-1]} is of a tokenizer of other sizes; give its options or --output")
        self.tokenizer.load_state_dict(tree["tokenizer"])
        self.optimizer.load_state_dict(tree["optimizer"])
        self.data.load_state(json.loads(tree["data"]))
        self.step = int(found[-1].stem.split("-")[1])


def make_config(options: argparse.Namespace, feature_width: int | None) -> VisualTokenizerConfig:
    """Raises UserError for sizes that do not fit."""
    encoder, decoder = PRESETS[options.preset]
    target = "features" if feature_width else "normalised_pixels" if options.normalise else "pixels"
    try:
        return VisualTokenizerConfig(
            image_size=options.image_size,
            patch_size=options.patch_size,
            codes=options.codes,
            code_width=options.code_width,
            target=target,
            feature_width=feature_width,
            decay=options.decay,
            commitment=options.commitment,
            init_std=0.05 if options.preset == "laptop" else 0.02,
            encoder=_stack(*encoder),
            decoder=_stack(*decoder),
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in first["loc"])
        raise UserError(f"{where}{first['msg'].removeprefix('Value error, ')}") from None


def _stack(depth: int, width: int, heads: int) -> Stack:
    return Stack(depth=depth, width=width, heads=heads, hidden=4 * width)


def load_teacher(options: argparse.Namespace, device: torch.device) -> tuple[Teacher | None, int | None]:
    """(pictures -> hidden states of their patches after the final norm, width). Raises UserError."""
    if options.teacher is None:
        return None, None
    model, _, _ = load_exported(options.teacher)
    image_size, patch_size = model.config.image_size, model.config.patch_size
    if (image_size, patch_size) != (options.image_size, options.patch_size):
        raise UserError(
            f"the teacher {options.teacher} is for images of {image_size} pixels in patches of {patch_size}; "
            f"give --image-size {image_size} --patch-size {patch_size}"
        )
    model.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def features(images_BCHW: Tensor) -> Tensor:
        return model.encode(images_BCHW=images_BCHW).images_BID[:, 1:]

    return features, model.config.width


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.train_visual_tokenizer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shards", nargs="+", required=True, help="paths, globs or brace patterns")
    parser.add_argument(
        "--held-out", metavar="SHARDS", help="for measurements; default: the first of --shards"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="laptop", help="sizes of the two ViTs")
    parser.add_argument(
        "--teacher", type=Path, metavar="DIR", help="exported model whose features are the target"
    )
    parser.add_argument(
        "--normalise", action="store_true", help="pixels minus mean over deviation of their patch"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the tokenizer in OUTPUT")
    parser.add_argument("--resume", action="store_true", help="go on where OUTPUT was interrupted, or start")
    for name, default, about in (
        ("image-size", 64, ""),
        ("patch-size", 16, ""),
        ("codes", 512, "vectors of the code book"),
        ("code-width", 32, "of these vectors"),
        ("steps", 1500, ""),
        ("warmup-steps", 50, ""),
        ("batch-size", 64, "over all processes"),
        ("seed", 1, ""),
        ("num-workers", 1, "processes that read, a rank"),
        ("max-held-out", 2000, "pictures"),
        ("log-every", 50, "steps"),
        ("images-every", 500, "steps"),
        ("checkpoint-every", 500, "steps"),
    ):
        smallest = 0 if name in ("seed", "num-workers", "warmup-steps") else 1
        parser.add_argument(
            f"--{name}", type=_at_least(smallest), default=default, help=f"{about} ({default})"
        )
    for name, default, about in (
        ("lr", 2e-3, "largest, after the warm-up; then a cosine"),
        ("weight-decay", 1e-4, ""),
        ("clip", 1.0, "largest norm of the gradient"),
        ("decay", 0.95, "share of a code that a step keeps; BEiT v2 has 0.99"),
        ("commitment", 0.1, "weight of the distance of vectors from their codes; BEiT v2 has 1"),
        ("smallest-crop", 0.5, "share of the area"),
    ):
        parser.add_argument(f"--{name}", type=_positive, default=default, help=f"{about} ({default:g})")
    return parser


def _at_least(smallest: int):
    def number(text: str) -> int:
        value = int(text)
        if value < smallest:
            raise argparse.ArgumentTypeError(f"{value} is below {smallest}")
        return value

    return number


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
