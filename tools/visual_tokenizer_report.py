"""What the training of a visual tokenizer says: lines, curves, held-out pictures and measurements."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from eve.data.batch import collate
from eve.data.loader import read_samples
from eve.errors import UserError
from eve.training.drawing import Cell, draw_sheet
from eve.training.monitor import clock
from eve.visual_tokenizer import VisualTokenizer
from eve.visual_tokenizer.measure import CodeUse, Teacher, measure

# Held-out pictures that are drawn.
SHOWN = 8


class Report:
    """Of rank 0. `options`: those of the tool; `step`: steps already made. Raises UserError where the output
    cannot be written, or the held-out shards hold no picture."""

    def __init__(
        self, options: argparse.Namespace, tokenizer: VisualTokenizer, teacher: Teacher | None, step: int
    ) -> None:
        self.options, self.tokenizer, self.teacher = options, tokenizer, teacher
        self.output: Path = options.output
        self.held_out = options.held_out or options.shards[0]
        config = tokenizer.config
        # Features have no picture.
        self.shown = next(self._batches(SHOWN)) if teacher is None else None
        try:
            (self.output / "reconstructions").mkdir(parents=True, exist_ok=True)
            self.events = SummaryWriter(str(self.output / "tensorboard"), purge_step=step + 1)
        except OSError as error:
            raise UserError(f"cannot write to {self.output}: {error.strerror}") from None
        number = sum(parameter.numel() for parameter in tokenizer.parameters())
        print(
            f"{number:,} parameters, {config.codes} codes of width {config.code_width} for {config.target}, "
            f"steps {step + 1:,} to {options.steps:,} of {options.batch_size} pictures",
            flush=True,
        )

    def log(self, step: int, error: float, use: CodeUse, seconds: float) -> None:
        """Means since the last line; `seconds` a step."""
        options, codes = self.options, self.tokenizer.config.codes
        print(
            f"step {step:>6,}/{options.steps:,} | error {error:.4f} | codes used {use.used / codes:.1%}, "
            f"perplexity {use.perplexity:.1f} | {options.batch_size / seconds:,.0f} images/s | "
            f"ETA {clock(seconds * (options.steps - step))}",
            flush=True,
        )
        scalars = {"error": error, "codes/used": use.used / codes, "codes/perplexity": use.perplexity}
        for name, value in scalars.items():
            self.events.add_scalar(name, value, step)

    @torch.no_grad()
    def draw(self, step: int) -> None:
        """Held-out pictures and what their codes stand for."""
        if self.shown is None:
            return
        target_BPF = self.tokenizer.decode(self.tokenizer.encode(self.shown))
        columns = {"original": self.shown, "from its codes": self.tokenizer.to_images(target_BPF, self.shown)}
        arrays = {title: images.permute(0, 2, 3, 1).cpu().numpy() for title, images in columns.items()}
        cells = [
            Cell([(title, array[i]) for title, array in arrays.items()], ()) for i in range(len(self.shown))
        ]
        note = ""
        if self.tokenizer.config.target == "normalised_pixels":
            note = "With the true mean and deviation of each patch: the codes do not hold them."
        sheet_HWC = draw_sheet(cells, footnote=note)
        Image.fromarray(sheet_HWC).save(self.output / "reconstructions" / f"step-{step:06d}.png")
        self.events.add_image("reconstructions", sheet_HWC, step, dataformats="HWC")

    def finish(self) -> None:
        """Measures the tokenizer on held-out pictures, says and writes what was found."""
        found = measure(self.tokenizer, self._batches(self.options.max_held_out), self.teacher)
        (self.output / "measurements.json").write_text(json.dumps(asdict(found), indent=1) + "\n")
        self.events.close()
        what = "held-out" if self.options.held_out else "training (no --held-out)"
        print(f"{self.output}: {found.pictures:,} {what} pictures, centre crops")
        saved = 1 - found.error / found.trivial if found.trivial > 0 else 0.0
        print(f"error {found.error:.4f}, best constant patch {found.trivial:.4f}: {saved:.1%} saved")
        use, codes = found.use, self.tokenizer.config.codes
        print(f"codes used {use.used} of {codes} ({use.used / codes:.1%}), perplexity {use.perplexity:.1f}")

    def _batches(self, limit: int) -> Iterator[Tensor]:
        options = self.options
        samples = list(
            read_samples(
                self.held_out,
                image_size=options.image_size,
                max_text_length=0,
                tokenizer=None,
                maskings={},
                seed=options.seed,
                limit=limit,
                kind="image",
            )
        )
        if not samples:
            raise UserError(f"the shards {self.held_out} hold no picture that can be used")
        device = self.tokenizer.quantiser.codes_KW.device
        for begin in range(0, len(samples), options.batch_size):
            images_BCHW = collate(samples[begin : begin + options.batch_size]).images_BCHW
            assert images_BCHW is not None
            yield images_BCHW.to(device)
