"""The recipe: its sections, and what must fit between them."""

from __future__ import annotations

import math
from typing import Literal

import yaml
from pydantic import Field, model_validator

from eve.config.data import Data, Source
from eve.config.model import Model
from eve.config.sections import Section, Share
from eve.config.stages import Stage, Stream


class Optimizer(Section):
    """AdamW. Norms, biases, embeddings and gains get no weight decay."""

    betas: tuple[Share, Share] = (0.9, 0.98)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    # Largest gradient norm; null does not clip.
    clip: float | None = Field(default=3.0, gt=0)


class Training(Section):
    """How the run goes. Only the last key changes the result."""

    # Samples of one forward pass on one device; null is the whole share of the rank.
    micro_batch_size: int | None = Field(default=None, ge=1)
    activation_checkpointing: bool = False
    compile: bool = False
    num_workers: int = Field(default=1, ge=0)
    log_every: int = Field(default=10, ge=1)
    images_every: int = Field(default=1000, ge=1)
    checkpoint_every: int = Field(default=1000, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    # A run of several stages keeps the model at the end of each as stages/NUMBER_NAME/.
    export_stages: bool = True
    # Steps in a row with a loss or gradient norm that is not finite before the run stops; each is skipped.
    max_skipped_steps: int = Field(default=10, ge=0)


class MoE(Section):
    """How the products of experts are made. Results do not depend on it but for rounding."""

    # What multiplies on a GPU: torch's grouped_mm, Triton, or MegaBlocks' grouped path, which is installed
    # apart (requirements-megablocks.txt). auto chooses by shape and device (kernels/grouped_linear.py); a CPU
    # has no other.
    experts_backend: Literal["auto", "grouped_mm", "triton", "megablocks"] = "auto"


class Start(Section):
    """Which part of another project's weights fills which part of the model (tools/convert_checkpoint.py with
    --from and --recipe; eve/conversion/foreign/fitting.py). A run itself does not read it: it starts from
    what was written, by a stage's init_from."""

    # The experts that a source with one feed-forward for all (BEiT, MAE, timm) fills, and their norms; others
    # start anew. Where a learned router has one pool for both modalities, all its experts are copies, of the
    # source's image and text experts in turn where it has both. VLMo fills the image expert.
    feed_forward: tuple[Literal["image", "text", "fusion"], ...] = ("image",)
    # Attention and the norm before it; false starts them anew.
    attention: bool = True
    # Added to copies of one feed-forward in a pool, so that they part: normal, by this share of the standard
    # deviation of each tensor.
    noise: float = Field(default=0.0, ge=0)


class Parallel(Section):
    """How a model is spread over devices. Results do not depend on it but for rounding."""

    # Devices that share each layer and the same samples (Megatron's tensor parallelism).
    tensor: int = Field(default=1, ge=1)
    # With tensor > 1: tokens between the layers are split over those devices as well.
    sequence: bool = True
    # Devices that share the experts of learned routers.
    expert: int = Field(default=1, ge=1)


class Evaluation(Section):
    """Held-out shards by name of the cell (as unseen concept, seen style), and how many samples of each."""

    shards: dict[str, str] = Field(default_factory=dict)
    max_samples: int = Field(default=2000, ge=1)
    batch_size: int = Field(default=64, ge=1)
    # Metadata field of the samples that the probes predict; null runs no probe.
    label: str | None = None
    # Of retrieval: how many candidates, the first by contrast, matching puts in order.
    rerank: int = Field(default=32, ge=1)


KINDS_OF_OBJECTIVE = {
    "masked_image": ("pair", "image"),
    "masked_codes": ("pair", "image"),
    "masked_text": ("pair", "text"),
    "masked_pair": ("pair",),
    "contrast": ("pair",),
    "matching": ("pair",),
    "contrast_matching": ("pair",),
}


class Recipe(Section):
    name: str
    seed: int = 1
    model: Model
    data: Data
    stages: tuple[Stage, ...] = Field(min_length=1)
    optimizer: Optimizer = Optimizer()
    training: Training = Training()
    moe: MoE = MoE()
    start: Start = Start()
    parallel: Parallel = Parallel()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stage names {names} are not all different")
        for stage in self.stages:
            for stream in stage.streams:
                self._check_stream(stream, f"stream {stream.name} of stage {stage.name}")
        for name, size in self.model.row_sizes.items():
            if size % 8:
                raise ValueError(f"model.{name} {size} is not a multiple of 8 (rows of 16 bytes in bf16)")
        return self

    def _check_stream(self, stream: Stream, where: str) -> None:
        source = self.data.sources.get(stream.source)
        if source is None:
            raise ValueError(
                f"{where} reads the source '{stream.source}', expected one of {sorted(self.data.sources)}"
            )
        if (source.max_text_length or 0) > self.model.text_positions:
            raise ValueError(
                f"sources.{stream.source}.max_text_length {source.max_text_length} is more than "
                f"model.text_positions {self.model.text_positions}"
            )
        kinds = KINDS_OF_OBJECTIVE[stream.objective]
        if source.kind not in kinds:
            raise ValueError(
                f"{where} has the objective {stream.objective} on the source {stream.source} of kind "
                f"{source.kind}, expected {' or '.join(kinds)}"
            )
        if stream.is_pooled:
            self._check_pooled(stream, source, where)
        if not stream.objective.startswith("masked") or stream.objective == "masked_text":
            return
        block_min, masked = stream.image_block_min, math.ceil(stream.image_ratio * self.model.num_patches)
        if block_min is not None and block_min > masked:
            raise ValueError(
                f"{where} has image_block_min {block_min}, more than the {masked} patches that it masks"
            )
        if self.model.num_patches < 2:
            raise ValueError(f"{where} masks patches, but an image of model.image_size is one patch")
        if stream.image_input == "mask_token" and not self.model.mask_token:
            raise ValueError(f"{where} has image_input mask_token, but model.mask_token is false")
        if stream.image_target == "codes":
            self._check_codes(where)
        else:
            self._check_pixels(stream, source, where)

    def _check_pixels(self, stream: Stream, source: Source, where: str) -> None:
        if self.model.decoder is None:
            raise ValueError(f"{where} predicts pixels, but model.decoder is null")
        if self.model.decoder.depth == 0 and stream.image_input == "visible":
            raise ValueError(f"{where} has image_input visible, but model.decoder.depth is 0")
        if source.rand_augment:
            raise ValueError(f"{where} predicts pixels, but sources.{stream.source}.rand_augment is set")

    def _check_codes(self, where: str) -> None:
        if self.model.visual_codes is None:
            raise ValueError(f"{where} predicts codes, but model.visual_codes is null")
        if self.data.visual_tokenizer is None:
            raise ValueError(f"{where} predicts codes, but data.visual_tokenizer is null")
        if self.model.class_token_head is not None and self.model.relative_positions == "blocks":
            raise ValueError(
                f"{where} has model.class_token_head, which needs model.relative_positions shared or none"
            )

    def _check_pooled(self, stream: Stream, source: Source, where: str) -> None:
        for head in ("contrast", "matching"):
            if head in stream.objective and getattr(self.model, head) is None:
                raise ValueError(f"{where} has the objective {stream.objective}, but model.{head} is null")
        if source.batch_size < 2:
            raise ValueError(f"{where} compares pairs, but sources.{stream.source}.batch_size is 1")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=100)
