"""The `stages` section: what each learns from, and how."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from eve.config.sections import Section


class Stream(Section):
    """(source, objective, weight): one forward and backward of a step."""

    name: str
    source: str
    # contrast_matching is both of one comparison (VLMo): contrast draws the hard negatives of matching.
    # Alone, matching draws any.
    objective: Literal[
        "masked_image",
        "masked_codes",
        "masked_text",
        "masked_pair",
        "contrast",
        "matching",
        "contrast_matching",
    ]
    weight: float = Field(default=1.0, gt=0)
    # masked_image, masked_codes and masked_pair
    # What of a masked patch is predicted: its pixels, or its code of data.visual_tokenizer. masked_image has
    # pixels and masked_codes codes; masked_pair may have either.
    image_target: Literal["pixels", "codes"] = "pixels"
    # visible: the encoder sees the visible patches, and the decoder all (MAE, EVE). mask_token: the encoder
    # sees all, the masked ones as model.mask_token (BEiT, VL-MoE); codes are always predicted so.
    image_input: Literal["visible", "mask_token"] = "visible"
    # By default 75 % at random (MAE, EVE), of a target of codes 40 % in blocks (BEiT, VL-MoE).
    image_ratio: float = Field(default=0.75, gt=0, lt=1)
    image_masking: Literal["random", "block"] = "random"
    # Least area from which a block is drawn, in patches. null: 4 (EVE); of a target of codes BEiT's 16 of
    # 14 x 14 patches, on another grid the same share, but 4 at least.
    image_block_min: int | None = Field(default=None, ge=1)
    # Targets: pixels of a patch minus their mean over their standard deviation, or raw in [-1, 1].
    normalise_pixels: bool = True
    # masked_text and masked_pair
    text_ratio: float = Field(default=0.5, gt=0, lt=1)
    text_masking: Literal["token", "word"] = "token"
    # Of the chosen tokens: share that becomes [MASK], share that becomes a random word; the rest stays.
    mask_share: float = Field(default=0.8, ge=0, le=1)
    random_share: float = Field(default=0.1, ge=0, le=1)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    # Of the squared logsumexp of the words' logits (ST-MoE, eq. 5): keeps them from drifting.
    z_loss_weight: float = Field(default=0.0, ge=0)
    # contrast, matching and contrast_matching
    # Pairs are positives of one another where images or captions are the same: images of equal value of this
    # metadata field, or of equal key where it is null or lacking; captions of equal tokens.
    identity: str | None = None
    # What an image or text has to find. masked: its partner, and other positives are no candidates (VLMo's
    # formula, which knows of none). soft: all positives alike (EVE's fine-tuning). diagonal: its partner, and
    # other positives are negatives (VLMo's code).
    targets: Literal["masked", "soft", "diagonal"] = "masked"
    # Whom a pair is compared with: the batch of the step, or what all ranks hold in one pass, so that results
    # depend on the micro-batch and the number of ranks (VLMo's code).
    pool: Literal["step", "micro_batch"] = "step"
    # Where negatives of matching come from: all of the pool, or what the pair's own rank holds (VLMo's
    # ablation: results depend on the number of ranks).
    negatives: Literal["global", "local"] = "global"
    # Of contrast_matching: what contrast's logits are multiplied by before negatives are drawn from their
    # softmax: 1 is VLMo, 0 draws all alike. Where contrast knows all that the model knows, those of 1 leave
    # matching nothing to tell them by, and small models learn it only below.
    negative_hardness: float = Field(default=1.0, ge=0, le=1)
    # Of matching, where contrast has 1.
    matching_weight: float = Field(default=1.0, ge=0)

    @property
    def is_pooled(self) -> bool:
        """Compares samples with one another."""
        return self.objective in ("contrast", "matching", "contrast_matching")

    @model_validator(mode="before")
    @classmethod
    def _of_codes(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if values.get("objective") == "masked_codes":
            values = {"image_target": "codes", **values}
        if values.get("image_target") == "codes":
            of_codes = {"image_input": "mask_token", "image_ratio": 0.4, "image_masking": "block"}
            values = {**of_codes, **values}
        return values

    @model_validator(mode="after")
    def _check(self) -> Stream:
        target = {"masked_image": "pixels", "masked_codes": "codes"}.get(self.objective, self.image_target)
        if self.image_target != target:
            raise ValueError(f"image_target is {self.image_target}, but {self.objective} has {target}")
        if self.image_target == "codes" and self.image_input != "mask_token":
            raise ValueError(f"image_input is {self.image_input}, but codes are predicted from mask_token")
        if self.image_block_min is not None and self.image_masking != "block":
            raise ValueError(f"image_block_min is set, but image_masking is {self.image_masking}")
        if self.mask_share + self.random_share > 1:
            raise ValueError(
                f"mask_share + random_share is {self.mask_share + self.random_share}, more than 1"
            )
        return self


class Stage(Section):
    name: str
    steps: int = Field(ge=1)
    streams: tuple[Stream, ...] = Field(min_length=1)
    lr: float = Field(gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    # accumulate: a step adds the gradients of all sources (MoMo's cross-modality gradient accumulation).
    # rotate: steps take the sources in turn, in the order of the streams (FLAVA's round-robin).
    gradients: Literal["accumulate", "rotate"] = "accumulate"
    # Name patterns (fnmatch) of the parameters that learn.
    trainable: tuple[str, ...] = ("*",)
    # Directory of exported weights to start from; null goes on from the stage before, or from the seed.
    init_from: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Stage:
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} is more than steps {self.steps}")
        names = [stream.name for stream in self.streams]
        if len(set(names)) != len(names):
            raise ValueError(f"stream names {names} are not all different")
        return self

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources of the streams, in their order."""
        return tuple(dict.fromkeys(stream.source for stream in self.streams))

    def sources_of(self, step: int) -> tuple[str, ...]:
        """Those that step number `step` of the stage reads."""
        sources = self.sources
        return sources if self.gradients == "accumulate" else (sources[step % len(sources)],)
