"""The `model` section: the encoder, its routers and the heads of the objectives."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from eve.config.sections import Blocks, LossWeight, Section

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
        if pools is None:
            return values
        whole = isinstance(pools, list | tuple) and all(type(size) is int and size >= 1 for size in pools)
        if not whole or len(pools) != 2:
            raise ValueError(
                f"experts_by_modality is {pools!r}, expected two numbers of experts, image and text, such as "
                "[32, 32], each at least 1"
            )
        return {"num_experts": sum(pools), **values}

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
