"""A way to spread a recipe over devices, and the passes of a step on one of them.

Shape letters of the formulas in this package: T token (packed), D width, F hidden width of the
feed-forward, E expert, K choice of a token, V word, n ranks of a group.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

from eve.config import Model, Recipe, Stage, Stream
from eve.errors import UserError
from eve.objectives.masking import num_masked_patches
from eve.parallel.topology import check_degrees
from eve.training.ds_config import DS_CONFIGS, read_ds_config, resolve_ds_config, state_format

# What a forward pass takes from a source with pictures and from one with texts.
IMAGE_OBJECTIVES = ("masked_image", "masked_codes", "masked_pair")
TEXT_OBJECTIVES = ("masked_text", "masked_pair")


@dataclass(frozen=True)
class Layout:
    """Ranks are numbered as in eve/parallel/topology.py; hosts take `host` ranks each, in their order.

    Attributes:
        gpus: all ranks. host: of them on one host.
        tensor, sequence, expert: section `parallel` of the recipe.
        zero_stage, precision: of the DeepSpeed JSON; precision is bf16 or fp32.
        micro_batch: samples of one pass of one tensor group.
        checkpointing: the encoder's blocks are computed again in the backward.
    """

    gpus: int
    host: int = 8
    tensor: int = 1
    sequence: bool = False
    expert: int = 1
    zero_stage: int = 1
    precision: str = "bf16"
    micro_batch: int = 8
    checkpointing: bool = False

    @property
    def data(self) -> int:
        return self.gpus // self.tensor

    @property
    def ds_config(self) -> str:
        return f"zero{self.zero_stage}_{self.precision}.json"

    @property
    def reduces_to_owners(self) -> bool:
        """Whether DeepSpeed reduces each gradient to the rank that owns it, instead of to all."""
        tree = _ds_tree(self.ds_config)
        everywhere = tree["zero_optimization"].get("use_multi_rank_bucket_allreduce", True)
        return self.zero_stage in (1, 2) and state_format(tree) == "ZeRO" and not everywhere

    @property
    def item(self) -> int:
        """Bytes of a number in weights and activations."""
        return 4 if self.precision == "fp32" else 2

    @property
    def tensor_group(self) -> range:
        return range(self.tensor)

    @property
    def data_group(self) -> range:
        return range(0, self.gpus, self.tensor)

    @property
    def expert_group(self) -> range:
        return range(self.expert)

    @property
    def copies_of_an_expert(self) -> range:
        """Ranks that hold the same experts and average their gradients."""
        return range(0, self.gpus, self.expert) if self.expert > 1 else self.data_group

    def describe(self) -> str:
        text = f"data {self.data} x tensor {self.tensor}{' + sequence' if self.sequence else ''}"
        text += (
            f", expert {self.expert}, ZeRO {self.zero_stage} {self.precision}, micro-batch {self.micro_batch}"
        )
        return text + (", checkpointing" if self.checkpointing else "")


@dataclass(frozen=True)
class Pass:
    """Forward and backward of packed samples through the encoder on one tensor group, `times` a step.

    Attributes:
        samples: of the pass: the micro-batch, three times that for matching. num_visible: patches of each
            that enter the encoder; 0 is no image. text_length: tokens of each text; 0 is no text.
        num_masked_patches: of each sample, predicted by the decoder. mask_tokens: they stand in the encoder,
            and are among `num_visible`. num_masked_words, num_masked_codes: of the whole pass.
        both_paths: the blocks from the first expert for pairs on run twice (VLMo's contrast).
        joins: has one backward with the pass before, whose activations are still held.
    """

    stream: str
    times: int
    samples: int
    num_visible: int
    text_length: int
    num_masked_patches: int
    num_masked_words: int
    mask_tokens: bool = False
    num_masked_codes: int = 0
    both_paths: bool = False
    joins: bool = False

    @property
    def num_image(self) -> int:
        """Image tokens of the pass, class tokens included."""
        return self.samples * (1 + self.num_visible) if self.num_visible else 0

    @property
    def num_text(self) -> int:
        return self.samples * self.text_length

    @property
    def num_tokens(self) -> int:
        return self.num_image + self.num_text

    @property
    def num_decoder_tokens(self) -> int:
        if not self.num_masked_patches:
            return 0
        masked = 0 if self.mask_tokens else self.num_masked_patches
        return self.samples * (1 + self.num_visible + masked)

    def blocks(self, model: Model) -> list[int]:
        """Blocks that the tokens pass, in their order."""
        again = range(model.first_fusion, model.depth) if self.both_paths else ()
        return [*range(model.depth), *again]


def recipe_for(layout: Layout, recipe: Recipe, stage: Stage) -> Recipe:
    """The recipe with what the layout decides. Where the data-parallel ranks do not divide
    `data.num_readers`, it gets the next number that they do divide, if that divides the batches."""
    readers = math.lcm(recipe.data.num_readers, layout.data)
    if any(recipe.data.sources[stream.source].batch_size % readers for stream in stage.streams):
        readers = recipe.data.num_readers
    degrees = {"tensor": layout.tensor, "sequence": layout.sequence, "expert": layout.expert}
    passes = {"micro_batch_size": layout.micro_batch, "activation_checkpointing": layout.checkpointing}
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"num_readers": readers}),
            "training": recipe.training.model_copy(update=passes),
            "parallel": recipe.parallel.model_copy(update=degrees),
        }
    )


def check_layout(layout: Layout, recipe: Recipe, stage: Stage) -> None:
    """Raises the UserError of a run with this layout; and one where tensor parallelism would cross hosts."""
    recipe = recipe_for(layout, recipe, stage)
    check_degrees(recipe.parallel, recipe.model, layout.gpus)
    tree = _ds_tree(layout.ds_config)
    resolve_ds_config(tree, recipe, stage, layout.data, cuda=True, where=f"ds_configs/{layout.ds_config}")
    if layout.host % layout.tensor:
        raise UserError(
            f"parallel.tensor {layout.tensor} does not divide the {layout.host} GPUs of a host: every layer "
            "would wait for the network"
        )


@functools.cache
def _ds_tree(name: str) -> dict[str, Any]:
    return read_ds_config(DS_CONFIGS / name)


def passes_of(layout: Layout, recipe: Recipe, stage: Stage, text_length: float) -> list[Pass]:
    """Those of all streams. `text_length`: mean tokens of a text, [CLS] and [SEP] included."""
    passes = []
    for stream in stage.streams:
        source, model = recipe.data.sources[stream.source], recipe.model
        whole = Pass(
            stream=stream.name,
            times=source.batch_size // layout.data // layout.micro_batch,
            samples=layout.micro_batch,
            num_visible=model.num_patches if source.kind != "text" else 0,
            text_length=round(min(text_length, model.max_text_length)) if source.kind != "image" else 0,
            num_masked_patches=0,
            num_masked_words=0,
        )
        passes += _compared(whole, stream, model) if stream.is_pooled else [_masked(whole, stream)]
    return passes


def _masked(whole: Pass, stream: Stream) -> Pass:
    masked = words = 0
    if stream.objective in IMAGE_OBJECTIVES:
        masked = num_masked_patches(whole.num_visible, stream.image_ratio)
    if stream.objective in TEXT_OBJECTIVES:
        words = max(1, round(stream.text_ratio * max(0, whole.text_length - 2)))
    inside, codes = stream.image_input == "mask_token", stream.image_target == "codes"
    return replace(
        whole,
        num_visible=whole.num_visible - (0 if inside else masked),
        num_masked_patches=0 if codes else masked,
        num_masked_words=whole.samples * words,
        mask_tokens=inside,
        num_masked_codes=whole.samples * masked if codes else 0,
    )


def _compared(whole: Pass, stream: Stream, model: Model) -> list[Pass]:
    """Contrast encodes images and texts alone; matching three fused pairs of each."""
    passes = []
    if "contrast" in stream.objective:
        both = model.contrast is not None and "fusion" in model.contrast.paths
        passes.append(replace(whole, text_length=0, both_paths=both))
        passes.append(replace(whole, num_visible=0, both_paths=both, joins=True))
    if "matching" in stream.objective:
        passes.append(replace(whole, samples=3 * whole.samples, joins=bool(passes)))
    return passes


def num_backwards(passes: list[Pass]) -> int:
    """Of a step."""
    return sum(one.times for one in passes if not one.joins)


def routed_blocks(model: Model) -> list[int]:
    """Blocks with a learned router."""
    return [block for block in range(model.depth) if model.feed_forward_of(block).router == "topk"]
