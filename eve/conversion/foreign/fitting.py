"""Imported weights as the start of another recipe's model: which part fills which is the recipe's `start`.

    feed-forward and its norm   a source with one for all fills the experts that `start.feed_forward` names,
                                a source with experts by modality those of the same name; the pool of a
                                learned router is filled with copies: of its modality's, or for both in turn
    attention and its norm      taken over, or new without `start.attention`
    positions                   resized (positions.py); one table of relative positions fills those of blocks
    type vectors                a second image starts as the first
    LayerScale                  1 where the source has none: the function stays
    what the source lacks       as a run of the recipe's seed starts
    its heads                   taken over where the recipe has the same, else left behind

Anything else of the encoder that the recipe's model has no place for, or of another size, is an error.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from eve.config import FeedForward, Model, Start
from eve.conversion.foreign.formats import Imported, fill
from eve.conversion.foreign.positions import resize_absolute, resize_relative, resize_text
from eve.errors import UserError
from eve.model import parameter_shapes
from eve.model.heads import ContrastHead
from eve.model.initialisation import generator_for, initial_value
from eve.moe.hard_experts import KINDS

MODALITIES = ("image", "text")
# What must be the same, and what changes the function without changing a shape.
SIZES = ("width", "depth", "heads", "hidden", "patch_size")
SILENT = ("activation", "norm_eps")
SILENT_OF_TEXT = ("text_norm", "text_norm_eps")
WORDS = "encoder.text_embedding.word.weight"
TABLE = "encoder.relative_positions.table_TRH"

_SLOT = re.compile(r"encoder\.blocks\.(\d+)\.(norm2|feed_forward)\.(.+)$")
_ATTENTION = re.compile(r"encoder\.blocks\.\d+\.(attention|norm1)\.")
_BY_MODALITY = re.compile(r"(attention\.(?:qkv|proj))\.(?:image|text)\.")


class Fitting:
    """`read(name)` is a parameter of the model `target`, in fp32.

    Attributes:
        shapes: of the parameters of `target`.
        new: those of which all or a part is what a run of the seed starts with.
        left_behind: parameters of the source without a place: heads, experts, and what has no effect there.
        notes: what computes otherwise in `target`, though the weights are the same; one sentence each.

    Raises UserError where source and target do not fit.
    """

    def __init__(self, source: Imported, target: Model, start: Start, seed: int, where: str) -> None:
        self._source, self._target, self._start, self._seed = source, target, start, seed
        self._where = where
        self._weights = source.weights
        self.shapes = parameter_shapes(target)
        self._check_sizes()
        self._filled_experts: set[str] = set()
        self.new = [name for name in self.shapes if self._is_new(name)]
        self.left_behind = self._unplaced()
        self.notes = [
            f"model.{key} is {ours}, {theirs} in the source"
            for key in (*SILENT, *(SILENT_OF_TEXT if WORDS in self._weights else ()))
            if (ours := getattr(target, key)) != (theirs := getattr(source.model, key))
        ]

    def read(self, name: str) -> Tensor:
        found = self._checked(name)
        if found is None:
            return self._initial(name)
        return fill(found, self._initial(name)) if bool(found.isnan().any()) else found

    def _is_new(self, name: str) -> bool:
        found = self._checked(name)
        return found is None or bool(found.isnan().any())

    def _checked(self, name: str) -> Tensor | None:
        found, shape = self._found(name), self.shapes[name]
        if found is not None and found.shape != shape:
            raise UserError(
                f"{self._where}: {name} would be {tuple(found.shape)}, the recipe's model has {tuple(shape)}"
            )
        return found

    def _found(self, name: str) -> Tensor | None:
        """What the source has for it, NaN where it has nothing; None: nothing at all."""
        source, target = self._source.model, self._target
        if match := _SLOT.match(name):
            return self._slot(int(match[1]), match[2], match[3])
        if _ATTENTION.match(name):
            return self._attention(name) if self._start.attention else None
        if (
            name.endswith((".gamma1", ".gamma2"))
            and name.startswith("encoder.")
            and name not in self._weights
        ):
            return torch.ones(self.shapes[name])
        if name not in self._weights:
            return None
        tensor = self._weights[name]
        if name == "encoder.image_embedding.position":
            return resize_absolute(tensor, target.image_size // target.patch_size)
        if name == "encoder.text_embedding.position":
            return resize_text(tensor, target.text_positions)
        if name == "encoder.type_embedding":
            second_image = 2 if len(tensor) == 3 else 0
            return tensor[[0, 1, second_image][: target.num_types]]
        if name == TABLE:
            side, new_side = (model.image_size // model.patch_size for model in (source, target))
            lengths = source.text_positions, target.text_positions
            tensor = resize_relative(tensor, side, new_side, *lengths)
            return tensor.expand(self.shapes[name][0], -1, -1) if len(tensor) == 1 else tensor
        return tensor

    def _attention(self, name: str) -> Tensor | None:
        """One for all fills those of both modalities."""
        tensor = self._weights.get(name, self._weights.get(_BY_MODALITY.sub(r"\1.", name)))
        if tensor is not None and tensor.ndim == 1 and len(self.shapes[name]) == 2:
            return tensor.expand(self.shapes[name])
        return tensor

    def _slot(self, block: int, part: str, rest: str) -> Tensor | None:
        """A norm before experts, or a weight of an expert, a bank or a router."""
        before, after = (m.feed_forward_of(block) for m in (self._source.model, self._target))
        prefix, name = f"encoder.blocks.{block}", f"encoder.blocks.{block}.{part}.{rest}"
        if before.router == "topk":
            return self._weights.get(name)
        if rest.startswith("router."):
            return None
        if part == "norm2":
            return self._norm(name, before, after)
        experts = f"{prefix}.feed_forward.experts"
        if after.router != "topk" or rest.startswith("fusion."):
            kind, weight = rest.removeprefix("experts.").split(".", 1)
            source = self._filling(before, kind)
            return None if source is None else self._expert(f"{experts}.{source}.{weight}")
        # A bank: its weights are called as those of one expert, with an E for the first dimension.
        weight, _, dimensions = rest.removeprefix("experts.").partition("_E")
        filling = [self._filling(before, kind, turn) for turn, kind in enumerate(_pool_kinds(after))]
        names = [f and f"{experts}.{f}.{weight}_{dimensions}" for f in filling]
        found = _stacked([self._expert(source) if source else None for source in names])
        if found is not None and found.ndim == 3 and self._start.noise:
            noise = torch.randn(found.shape, generator=generator_for(self._seed, f"start.{name}"))
            found = found + noise * (self._start.noise * float(found[~found.isnan()].std()))
        return found

    def _expert(self, name: str) -> Tensor | None:
        self._filled_experts.add(name)
        return self._weights.get(name)

    def _norm(self, name: str, before: FeedForward, after: FeedForward) -> Tensor | None:
        kinds, tensor = KINDS[before.router], self._weights.get(name)
        if tensor is None:
            return None
        rows = tensor[None] if len(kinds) == 1 else tensor
        filling = [self._filling(before, kind) for kind in _norm_kinds(after)]
        found = _stacked([None if f is None else rows[kinds.index(f)] for f in filling])
        return found[0] if found is not None and len(self.shapes[name]) == 1 else found

    def _filling(self, before: FeedForward, kind: str, turn: int = 0) -> str | None:
        """Which of the source's experts fills one of that kind; `both`: of the pool of both modalities."""
        listed, kinds = self._start.feed_forward, KINDS[before.router]
        mixed = kind in ("both", "shared")
        if kinds == ("shared",):
            return "shared" if kind in listed or (mixed and listed) else None
        if mixed:
            usable = [modality for modality in MODALITIES if modality in listed]
            return usable[turn % len(usable)] if usable else None
        return kind if kind in kinds else None

    def _initial(self, name: str) -> Tensor:
        shape, model = self.shapes[name], self._target
        value = initial_value(name, shape, self._seed, model.init_std, model.rescale_init)
        if value is not None:
            return value
        if name.startswith("contrast."):
            assert model.contrast is not None
            return ContrastHead(1, model.contrast).state_dict()[name.removeprefix("contrast.")]
        assert model.layer_scale is not None, name
        return torch.full(shape, model.layer_scale)

    def _check_sizes(self) -> None:
        source, target = self._source.model, self._target
        for key in SIZES:
            if getattr(source, key) != getattr(target, key):
                raise UserError(
                    f"{self._where}: {key} is {getattr(source, key)}, the recipe has model.{key} "
                    f"{getattr(target, key)}"
                )
        if WORDS in self._weights and source.vocab_size != target.vocab_size:
            raise UserError(
                f"{self._where} has {source.vocab_size} words, the recipe has model.vocab_size "
                f"{target.vocab_size}; leave the words out with --ignore to start with new ones"
            )
        for name in ("relative_positions", "attention"):
            ours, theirs = getattr(target, name), getattr(source, name)
            if (theirs, ours) in (("blocks", "shared"), ("modality", "shared")):
                raise UserError(f"{self._where} has model.{name} {theirs}, the recipe has {ours}")
        for block in range(target.depth):
            before, after = (m.feed_forward_of(block) for m in (source, target))
            if before.router == "topk" and (after.router, after.pools) != (before.router, before.pools):
                raise UserError(
                    f"{self._where}: block {block} has a learned router of {before.num_experts} experts, the "
                    "recipe has none such; import it without --recipe, then use --upcycle"
                )

    def _unplaced(self) -> list[str]:
        left = []
        for name in self._weights:
            if match := _SLOT.match(name):
                hard = self._source.model.feed_forward_of(int(match[1])).router != "topk"
                if hard and match[2] == "feed_forward" and name not in self._filled_experts:
                    left.append(name)
                continue
            if name in self.shapes:
                continue
            placed = [re.sub(r"(attention\.(?:qkv|proj))\.", rf"\1.{m}.", name) for m in MODALITIES]
            if _ATTENTION.match(name) and placed[0] in self.shapes:
                continue
            # A bias of the keys has no effect but with projections by modality.
            harmless = name.endswith((".k_bias", ".mask_token")) or not name.startswith("encoder.")
            if not harmless and bool(self._weights[name].count_nonzero()):
                raise UserError(f"{self._where} has {name}, for which the recipe's model has no place")
            left.append(name)
        return left


def _pool_kinds(feed_forward: FeedForward) -> list[str]:
    """Of each expert of a learned router."""
    if feed_forward.experts_by_modality is None:
        return ["both"] * feed_forward.num_experts
    pools = zip(MODALITIES, feed_forward.experts_by_modality, strict=True)
    return [kind for kind, size in pools for _ in range(size)]


def _norm_kinds(feed_forward: FeedForward) -> list[str]:
    if feed_forward.router != "topk":
        return list(KINDS[feed_forward.router])
    if feed_forward.experts_by_modality is None:
        return ["both"]
    return [*MODALITIES, *(["fusion"] if feed_forward.fusion_expert else [])]


def _stacked(rows: list[Tensor | None]) -> Tensor | None:
    """NaN for rows that there are not; None for none at all."""
    known = next((row for row in rows if row is not None), None)
    if known is None:
        return None
    return torch.stack([torch.full_like(known, torch.nan) if row is None else row for row in rows])
