"""The typed recipe: everything that changes the result of a run, and nothing about the machine.

A recipe is one YAML file in eve/recipes/ (or any path) plus `section.key=value` overrides from the
command line. All models are frozen and refuse unknown keys, naming the nearest known one. What
belongs to the machine (precision, ZeRO stage, micro-batch) is in the DeepSpeed JSON of ds_configs/.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from eve.errors import UserError

RECIPES = Path(__file__).parent / "recipes"


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


def _parse_blocks(value: Any) -> Any:
    """`0-9,11` or `3` or a list of numbers -> tuple of block indices."""
    if isinstance(value, int):
        return (value,)
    if not isinstance(value, str):
        return value
    blocks: list[int] = []
    for part in value.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+))?\s*", part)
        if not match:
            raise ValueError(f"'{value}' is not a list of blocks such as 0-9,11")
        first, last = int(match[1]), int(match[2] or match[1])
        blocks.extend(range(first, last + 1))
    return tuple(blocks)


Blocks = Annotated[tuple[int, ...], BeforeValidator(_parse_blocks)]


# From 0 to below 1.
Share = Annotated[float, Field(ge=0, lt=1)]


# One number, or one for image and one for text tokens.
Weight = Annotated[float, Field(ge=0)]
LossWeight = Weight | tuple[Weight, Weight]
LOSS_WEIGHTS = ("load_balance_weight", "z_loss_weight", "importance_weight", "load_weight")


class FeedForward(Section):
    """The feed-forward of some blocks: a router and its bank of experts."""

    blocks: Blocks
    # shared: one expert for all. modality: one for image and one for text tokens. fusion: as modality, and a
    # third for all tokens of a pair (VLMo's VL-FFN). topk: experts chosen by a learned gate.
    router: Literal["shared", "modality", "fusion", "topk"]
    # The keys below are for `topk` only.
    num_experts: int = Field(default=2, ge=1)
    # One pool of experts for each modality (image, text), with a gate and losses of its own, instead of one
    # pool of num_experts for both (V-MoE and T-MoE of VL-MoE). A pool of 1 is dense: no gate and no losses.
    experts_by_modality: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    # With experts_by_modality: a dense expert that takes all tokens of a pair instead (VL-MoE's top layers).
    fusion_expert: bool = False
    k: int = Field(default=2, ge=1)
    # none: the gate sees x. gate: the gate sees x + b_modality (the paper's formula).
    # dispatch: the experts see x + b_modality as well (what the official EVE code does).
    modality_vector: Literal["none", "gate", "dispatch"] = "gate"
    # Weights of a token's kept choices are divided by their sum (GShard, EVE); false leaves them (V-MoE).
    renormalise: bool = True
    # Added to the logits in training. gaussian: of standard deviation noise_std / E for a pool of E experts;
    # it moves choices and weights (V-MoE). gumbel: it moves the choices after the first (GShard, EVE's code).
    noise: Literal["none", "gaussian", "gumbel"] = "none"
    noise_std: float = Field(default=1.0, gt=0)
    # Slots of an expert for the T tokens of a group, about capacity_factor * k * T / E; 0 is dropless.
    capacity_factor: float = Field(default=0.0, ge=0)
    capacity_factor_eval: float = Field(default=0.0, ge=0)
    # gshard: that, rounded up, and min_capacity at least. vmoe: rounded up to a multiple of 4.
    # tutel: k * int(capacity_factor * ceil(T / E)).
    capacity_rule: Literal["gshard", "vmoe", "tutel"] = "gshard"
    min_capacity: int = Field(default=4, ge=1)
    # Who finds an expert full: first choices go before second ones, and of each the tokens in the order of
    # the batch (GShard), those of the largest weight first (batch priority, V-MoE), or in random order (in
    # evaluation that of the batch).
    drop_order: Literal["sequence", "priority", "random"] = "sequence"
    # Samples whose tokens are balanced and fill capacity together (the groups of GShard). Micro-batches are
    # multiples of it, so that a step does not depend on how its batch was cut over devices and passes.
    group_size: int = Field(default=8, ge=1)
    # Weights of the auxiliary losses; a pair is for the pools (image, text). V-MoE's are importance 0.005 and
    # load 0.005; the load is defined by gaussian noise, and evaluation has none.
    load_balance_weight: LossWeight = 0.001
    z_loss_weight: LossWeight = 0.0
    importance_weight: LossWeight = 0.0
    load_weight: LossWeight = 0.0

    @property
    def pools(self) -> tuple[int, ...]:
        """Experts of each pool of a learned router: one pool, or one for image and one for text tokens."""
        return self.experts_by_modality or (self.num_experts,)

    @model_validator(mode="before")
    @classmethod
    def _count_experts(cls, values: Any) -> Any:
        pools = values.get("experts_by_modality") if isinstance(values, dict) else None
        if isinstance(pools, (list, tuple)) and all(isinstance(size, int) for size in pools):
            return {"num_experts": sum(pools), **values}
        return values

    @model_validator(mode="after")
    def _check(self) -> FeedForward:
        if self.router != "topk":
            return self
        if self.experts_by_modality is None and self.k > self.num_experts:
            raise ValueError(f"k is {self.k}, more than num_experts, {self.num_experts}")
        if self.fusion_expert and self.experts_by_modality is None:
            raise ValueError("fusion_expert is set, but experts_by_modality is null")
        weights = {name: getattr(self, name) for name in LOSS_WEIGHTS}
        if self.experts_by_modality is not None:
            self._check_pools(self.experts_by_modality)
        elif pairs := [name for name, weight in weights.items() if isinstance(weight, tuple)]:
            raise ValueError(f"{pairs[0]} is a pair of weights, but one pool serves both modalities")
        if self.noise != "gaussian" and weights["load_weight"] not in (0.0, (0.0, 0.0)):
            raise ValueError(f"load_weight is set, but noise is {self.noise}, and the load needs gaussian")
        if self.noise == "gumbel" and self.k == 1:
            raise ValueError("noise is gumbel, which moves the choices after the first, but k is 1")
        if self.drop_order != "sequence" and not (self.capacity_factor or self.capacity_factor_eval):
            raise ValueError(
                f"drop_order is {self.drop_order}, but without capacity_factor nothing is dropped"
            )
        return self

    def _check_pools(self, pools: tuple[int, int]) -> None:
        if pools == (1, 1):
            raise ValueError("experts_by_modality is [1, 1]: that is router: modality")
        if self.num_experts != sum(pools):
            raise ValueError(f"num_experts is {self.num_experts}, but experts_by_modality is {list(pools)}")
        if self.k > min(pools):
            raise ValueError(f"k is {self.k}, but a pool of experts_by_modality has {min(pools)}")
        if self.modality_vector != "none":
            raise ValueError("modality_vector is not none, but experts_by_modality has gates of their own")


def _fuses(feed_forward: FeedForward) -> bool:
    return feed_forward.router == "fusion" or feed_forward.fusion_expert


class Decoder(Section):
    """The light decoder of masked image modelling (MAE, He et al. 2022)."""

    # 0 is two linear layers with a norm between them: for mask tokens inside the encoder.
    depth: int = Field(default=8, ge=0)
    width: int = Field(default=512, ge=1)
    heads: int = Field(default=16, ge=1)
    # Of the feed-forwards; null is 4 * width.
    hidden: int | None = Field(default=None, ge=1)
    # sine_cosine: the fixed 2-D table of MAE. learned: a table of weights.
    positions: Literal["sine_cosine", "learned"] = "sine_cosine"

    @property
    def hidden_width(self) -> int:
        return self.hidden or 4 * self.width


class Contrast(Section):
    """Projections of the class tokens of image and text into one space, compared by their cosine."""

    # Of the projections.
    width: int = Field(ge=1)
    # Which experts of `fusion` routers the vectors pass: those of their modality, those of pairs (VLMo both).
    paths: tuple[Literal["modality", "fusion"], ...] = ("modality",)
    # Logits are cosines times exp(scale) (CLIP, VLMo) or divided by a temperature (ALBEF, EVE); both learn.
    temperature: Literal["scale", "divisor"] = "scale"
    initial_temperature: float = Field(default=0.07, gt=0)
    # Least and largest temperature; null does not clamp.
    clamp: tuple[float, float] | None = None


class Matching(Section):
    """Whether image and text of a pair belong together, from the text's class token."""

    # A linear layer and tanh before the classifier (BERT's pooler).
    pooler: bool = True


class ClassTokenHead(Section):
    """BEiT v2: some more blocks read the last class token and the patches of an early block, and predict the
    same codes, so that the class token has to carry what the early patches lack."""

    # The patches are those after so many blocks.
    early: int = Field(ge=1)
    depth: int = Field(default=2, ge=1)
    # Norm and code head are those of the encoder.
    shared: bool = True


class Model(Section):
    image_size: int = Field(default=224, ge=1)
    patch_size: int = Field(default=16, ge=1)
    width: int = Field(default=768, ge=1)
    depth: int = Field(default=12, ge=1)
    heads: int = Field(default=12, ge=1)
    hidden: int = Field(default=3072, ge=1)
    vocab_size: int = Field(default=64000, ge=8)
    # Longest text in tokens, [CLS] and [SEP] included; longer ones are cut.
    max_text_length: int = Field(default=40, ge=3)
    # Rows of the table of text positions.
    text_positions: int = Field(default=196, ge=3)
    activation: Literal["gelu", "quick_gelu"] = "quick_gelu"
    layer_scale: float | None = 0.1
    drop_path: float = Field(default=0.1, ge=0, lt=1)
    text_dropout: float = Field(default=0.1, ge=0, lt=1)
    # A LayerNorm over the embeddings before the first block.
    embedding_norm: bool = True
    norm_eps: float = Field(default=1e-6, gt=0)
    # Learned vectors by position, added to the embeddings.
    absolute_positions: bool = True
    # Learned bias of the attention logits by distance (BEiT, VLMo): a table for each block, or one for all.
    relative_positions: Literal["none", "blocks", "shared"] = "none"
    # The text's LayerNorm stands before positions are added (EVE), after (BERT, VLMo), or nowhere (BEiT-3).
    text_norm: Literal["before_positions", "after_positions", "none"] = "before_positions"
    # Of the text embedding and of the word head; null is norm_eps. BERT has 1e-12.
    text_norm_eps: float | None = Field(default=None, gt=0)
    # Rows of type vectors: image, text, and a second image (NLVR2).
    num_types: int = Field(default=2, ge=2, le=3)
    # modality: projections of attention, and the norm before it, by modality (BEiT-3; VLMo's ablation).
    attention: Literal["shared", "modality"] = "shared"
    key_bias: bool = False
    # A LayerNorm before the second matrix of each branch (Magneto, BEiT-3).
    sub_norm: bool = False
    final_norm: Literal["shared", "modality", "none"] = "shared"
    # A learned vector that stands for masked patches inside the encoder.
    mask_token: bool = False
    # Truncated normal, cut at one standard deviation.
    init_std: float = Field(default=0.02, gt=0)
    # Divide what a block's two branches write by sqrt(2 * block), blocks counted from 1.
    rescale_init: bool = False
    feed_forward: tuple[FeedForward, ...]
    # Heads; null builds none. The decoder predicts the pixels of masked patches.
    decoder: Decoder | None = Decoder()
    contrast: Contrast | None = None
    matching: Matching | None = None
    # Codes of the visual tokenizer, predicted of masked patches.
    visual_codes: int | None = Field(default=None, ge=2)
    class_token_head: ClassTokenHead | None = None

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def first_fusion(self) -> int:
        """The first block in which pairs have an expert of their own; the depth where there is none."""
        fused = (b for b in range(self.depth) if _fuses(self.feed_forward_of(b)))
        return next(fused, self.depth)

    @property
    def row_sizes(self) -> dict[str, int]:
        """Numbers in a row of the hidden states, by key."""
        sizes = {"width": self.width, "hidden": self.hidden}
        if self.decoder:
            sizes |= {"decoder.width": self.decoder.width, "decoder.hidden": self.decoder.hidden_width}
        return sizes

    def feed_forward_of(self, block: int) -> FeedForward:
        return next(ff for ff in self.feed_forward if block in ff.blocks)

    @model_validator(mode="after")
    def _check(self) -> Model:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.decoder and self.decoder.width % self.decoder.heads:
            raise ValueError(
                f"decoder.width {self.decoder.width} is not a multiple of decoder.heads {self.decoder.heads}"
            )
        if self.class_token_head and (self.visual_codes is None or self.class_token_head.early >= self.depth):
            raise ValueError(
                f"class_token_head needs visual_codes and early < depth, found {self.visual_codes} codes and "
                f"early {self.class_token_head.early} of depth {self.depth}"
            )
        if self.max_text_length > self.text_positions:
            raise ValueError(
                f"max_text_length {self.max_text_length} is more than text_positions {self.text_positions}"
            )
        listed = sorted(block for ff in self.feed_forward for block in ff.blocks)
        if listed != list(range(self.depth)):
            raise ValueError(
                f"feed_forward.blocks name the blocks {listed}, expected each of 0..{self.depth - 1} once"
            )
        return self


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

    shards: dict[str, str] = {}
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


def load_recipe(name_or_path: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """The recipe of that name or path with `section.key=value` overrides (values are YAML).

    Lists take an index (`stages.0.steps=100`). Raises UserError.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{name_or_path}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in RECIPES.glob("*.yaml"))
        near = difflib.get_close_matches(name_or_path, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"no recipe '{name_or_path}' (known: {', '.join(known)}){hint}")
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds {type(tree).__name__}, expected a mapping of sections")
    for override in overrides:
        _apply_override(tree, override)
    return parse_recipe(tree, where=f"recipe {path} with overrides" if overrides else str(path))


def parse_recipe(tree: dict[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {_sentence(error)}") from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"'{override}' is not an override such as model.depth=6")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(
            f"the value of the override '{override}' is not YAML; quote it for the shell"
        ) from None
    node: Any = tree
    *parents, last = key.split(".")
    for depth, part in enumerate(parents):
        node = node[_index(node, part, key)] if isinstance(node, list) else node.setdefault(part, {})
        if not isinstance(node, dict | list):
            found = ".".join(parents[: depth + 1])
            raise UserError(f"override '{override}': {found} is the value {node!r}, not a section")
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    else:
        node[last] = value


def _index(node: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise UserError(f"override '{key}': '{part}' is not an index of a list of {len(node)}")
    return int(part)


def _sentence(error: ValidationError) -> str:
    """The first mistake of a validation as one sentence, with the nearest known key for an unknown one."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _keys_at(first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {where}; {hint}"
    if first["type"] == "missing":
        return f"the key {where} is missing"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where} is {first['input']!r}: {message[0].lower()}{message[1:]}"


def _keys_at(location: tuple[Any, ...]) -> list[str]:
    """Field names of the section at a place of the tree, by walking the annotations."""
    section: Any = Recipe
    for part in location:
        if isinstance(part, int) or not hasattr(section, "model_fields") or part not in section.model_fields:
            continue
        section = _section_in(section.model_fields[part].annotation) or section
    return sorted(section.model_fields)


def _section_in(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if (found := _section_in(inner)) is not None:
            return found
    return None
