"""The bytes of a sample -> `Sample`: choose a caption, decode and crop, tokenise, mask.

Everything random is drawn from generators keyed by (seed, epoch, index, purpose); see eve/data/seeds.py.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from eve.data.batch import Masking, Sample
from eve.data.manifest import IMAGE_EXTENSIONS, Kind, parse_text
from eve.data.readers import Read
from eve.data.seeds import generator, key_of
from eve.data.shards import BadSample, RawSample
from eve.data.tokenizer import Tokenizer, cut
from eve.data.transforms import Transform, UnusableImage

NOTHING_READ = "no member of an extension that is read (a key ends at its first dot)"


@dataclass(frozen=True)
class SampleMaker:
    """Makes the samples of a source; picklable. A text needs `tokenizer`."""

    kind: Kind
    transform: Transform
    tokenizer: Tokenizer | None
    max_text_length: int
    maskings: dict[str, Masking]
    seed: int

    def wanted(self, extension: str) -> bool:
        """Members worth reading for this kind."""
        if extension in IMAGE_EXTENSIONS:
            return self.kind != "text"
        return extension == "json" or (extension == "txt" and self.kind != "image")

    def make(self, read: Read) -> Sample:
        """Raises BadSample with the reason why it cannot be used."""
        if isinstance(read.raw, BadSample):
            raise read.raw
        raw = read.raw
        if not raw.members:
            raise BadSample(raw.shard, raw.key, NOTHING_READ)
        text, metadata = self._text(raw, read.epoch, read.index)
        image_CHW = None
        if self.kind != "text":
            content = next((raw.members[e] for e in raw.members if e in IMAGE_EXTENSIONS), None)
            if content is None:
                raise BadSample(raw.shard, raw.key, "no image")
            where = (self.seed, read.epoch, read.index)
            try:
                image_CHW = self.transform(
                    content,
                    text,
                    generator(*where, "crop"),
                    generator(*where, "augment") if self.transform.rand_augment else None,
                )
            except UnusableImage as error:
                raise BadSample(raw.shard, raw.key, str(error)) from error
        tokens_N, is_cut = None, False
        if text is not None:
            assert self.tokenizer is not None
            whole_N = self.tokenizer.encode(text, sys.maxsize)
            tokens_N = cut(whole_N, self.max_text_length)
            is_cut = len(whole_N) > len(tokens_N)
            if len(tokens_N) < 3:
                raise BadSample(raw.shard, raw.key, "caption without a token")
        sample = Sample(
            key=raw.key,
            epoch=read.epoch,
            index=read.index,
            seed=key_of(self.seed, read.epoch, read.index, "sample") >> 65,
            image_CHW=image_CHW,
            tokens_N=tokens_N,
            text=text,
            is_cut=is_cut,
            metadata=metadata,
        )
        return with_masks(sample, self.maskings, self.seed)

    def _text(self, raw: RawSample, epoch: int, index: int) -> tuple[str | None, dict]:
        """(the caption of this epoch, metadata).

        Over n epochs the n captions of a sample come once each, in a random order that is new every n epochs.
        """
        try:
            captions, metadata = parse_text(raw.members.get("json"), raw.members.get("txt"))
        except ValueError as error:
            raise BadSample(raw.shard, raw.key, "undecodable text") from error
        if self.kind == "image":
            return None, metadata
        if not captions:
            has_text = "json" in raw.members or "txt" in raw.members
            raise BadSample(raw.shard, raw.key, "empty caption" if has_text else "no caption")
        turn, place = divmod(epoch, len(captions))
        order = generator(self.seed, index, "caption", turn).permutation(len(captions))
        return captions[order[place]], metadata


def with_masks(sample: Sample, maskings: dict[str, Masking], seed: int) -> Sample:
    """With masks for these streams alone."""
    where = (seed, sample.epoch, sample.index, "mask")
    masks = {stream: masking(sample, generator(*where, stream)) for stream, masking in maskings.items()}
    return replace(sample, masks=masks)
