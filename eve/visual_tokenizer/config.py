"""Sizes and targets of a visual tokenizer: all that its weights depend on."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationError, model_validator

from eve.config import FeedForward, Model, Section


class Stack(Section):
    """Transformer blocks over the patches of a picture."""

    depth: int = Field(ge=1)
    width: int = Field(ge=1)
    heads: int = Field(ge=1)
    hidden: int = Field(ge=1)


class VisualTokenizerConfig(Section):
    """The defaults are those of BEiT v2's VQ-KD (Peng et al. 2022) but for the target."""

    image_size: int = Field(default=224, ge=1)
    patch_size: int = Field(default=16, ge=1)
    # Vectors of the code book, and their width.
    codes: int = Field(default=8192, ge=2)
    code_width: int = Field(default=32, ge=1)
    encoder: Stack = Stack(depth=12, width=768, heads=12, hidden=3072)
    decoder: Stack = Stack(depth=1, width=768, heads=12, hidden=3072)
    # pixels: those of the patch in [-1, 1]. normalised_pixels: minus their mean, over their deviation (MAE).
    # features: what a teacher says of the patch, of the width `feature_width`.
    target: Literal["pixels", "normalised_pixels", "features"] = "pixels"
    feature_width: int | None = Field(default=None, ge=1)
    # Share of a code vector, and of its use, that a step keeps.
    decay: float = Field(default=0.99, ge=0, lt=1)
    # A code used less than this share of the even use is given to vectors far from their code; 0: none is.
    revive_below: float = Field(default=0.05, ge=0, lt=1)
    # Of the distance of a vector from its code, in the loss.
    commitment: float = Field(default=1.0, ge=0)
    init_std: float = Field(default=0.02, gt=0)

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def target_width(self) -> int:
        """Numbers that stand for a patch in the target."""
        return self.feature_width or 3 * self.patch_size**2

    def stack_model(self, stack: Stack) -> Model:
        """The blocks of a stack in the terms of the model: those of a plain ViT."""
        return Model(
            image_size=self.image_size,
            patch_size=self.patch_size,
            width=stack.width,
            depth=stack.depth,
            heads=stack.heads,
            hidden=stack.hidden,
            activation="gelu",
            layer_scale=None,
            drop_path=0.0,
            decoder=None,
            feed_forward=(FeedForward(blocks=tuple(range(stack.depth)), router="shared"),),
        )

    @model_validator(mode="after")
    def _check(self) -> VisualTokenizerConfig:
        if (self.target == "features") != (self.feature_width is not None):
            raise ValueError(
                f"target is {self.target} and feature_width {self.feature_width}: features need their width"
            )
        for name in ("encoder", "decoder"):
            try:
                self.stack_model(getattr(self, name))
            except ValidationError as error:
                raise ValueError(
                    f"{name}: {error.errors()[0]['msg'].removeprefix('Value error, ')}"
                ) from None
        return self
