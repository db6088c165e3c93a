"""The `data` section: sources and what they are mixed from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from eve.config.sections import Section


class Shards(Section):
    """One set of shards of a source. `shards`: a path, glob, brace pattern, URL or `pipe:` command."""

    shards: str
    weight: float = Field(default=1.0, gt=0)


class Source(Section):
    """A stream of samples mixed from sets of shards, read at `batch_size` samples a step."""

    kind: Literal["pair", "image", "text"] = "pair"
    mix: tuple[Shards, ...] = Field(min_length=1)
    # Global: samples of a step over all ranks and all micro-batches.
    batch_size: int = Field(ge=1)
    # Longest text in tokens, where it is not model.max_text_length.
    max_text_length: int | None = Field(default=None, ge=3)
    # Share of the area kept by the random crop; the flip has probability 1/2.
    crop_scale: tuple[float, float] = (0.5, 1.0)
    flip: bool = True
    # RandAugment (number of operations, magnitude of 10); null is off. Not where pixels are the target.
    rand_augment: tuple[int, int] | None = None

    @model_validator(mode="after")
    def _check(self) -> Source:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale is [{low}, {high}], expected 0 < lowest <= highest <= 1")
        if self.rand_augment and not (self.rand_augment[0] >= 1 and 0 <= self.rand_augment[1] <= 10):
            raise ValueError(
                f"rand_augment is {list(self.rand_augment)}, expected at least 1 operation and a "
                "magnitude of 0 to 10"
            )
        return self


class Data(Section):
    tokenizer: str
    # Directory of the visual tokenizer, for streams that predict its codes (tools/train_visual_tokenizer.py).
    visual_tokenizer: str | None = None
    # Virtual readers: the order of the data depends on this number and on the seed, not on the machine.
    num_readers: int = Field(default=8, ge=1)
    shuffle_buffer: int = Field(default=4096, ge=1)
    # Share of broken samples past which the run stops.
    max_bad_share: float = Field(default=0.01, ge=0, le=1)
    sources: dict[str, Source]

    @model_validator(mode="after")
    def _check(self) -> Data:
        for name, source in self.sources.items():
            if source.batch_size % self.num_readers:
                raise ValueError(
                    f"sources.{name}.batch_size {source.batch_size} is not a multiple of "
                    f"num_readers {self.num_readers}"
                )
        return self
