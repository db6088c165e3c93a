"""Which shapes are measured, and how their tokens spread over the experts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

OPERATIONS = (
    "routing",
    "dispatch",
    "combine",
    "combine_residual",
    "expert_feed_forward",
    "dispatch_feed_forward",
    "masked_text_loss",
    "masked_pixel_loss",
)
SKEWS = ("uniform", "zipf", "one expert")


@dataclass(frozen=True)
class Case:
    """One shape of one operation. What an operation does not use keeps its default.

    Attributes:
        tokens: T; masked rows of the text loss; images of the pixel loss.
        width: D. The experts' hidden width is four times it.
        choices: K.
        experts: E.
        skew: one of SKEWS. "one expert": the first choices of all tokens are expert 0, the second expert 1.
        words: V.
        image: pixels of a side; patch: of a patch's side. Three of four patches are masked.
        compiled: torch.compile of the peers is measured too; it costs seconds a shape.
    """

    operation: str
    tokens: int
    width: int = 768
    choices: int = 2
    experts: int = 32
    skew: str = "uniform"
    words: int = 64000
    image: int = 224
    patch: int = 16
    compiled: bool = False

    @property
    def rows(self) -> int:
        return self.tokens * self.choices

    @property
    def hidden(self) -> int:
        return 4 * self.width

    @property
    def pixels(self) -> int:
        return 3 * self.patch**2

    @property
    def masked(self) -> int:
        """Masked patches of an image."""
        return (self.image // self.patch) ** 2 * 3 // 4

    def describe(self) -> str:
        if self.operation == "masked_text_loss":
            return f"{self.tokens} rows, V {self.words}, D {self.width}"
        if self.operation == "masked_pixel_loss":
            return f"{self.tokens} images of {self.image} px"
        shape = f"T {self.tokens}, K {self.choices}, E {self.experts}, {self.skew}"
        return shape if self.operation == "routing" else f"{shape}, D {self.width}"


def cases(operations: Iterable[str], sizes: str, cuda: bool) -> list[Case]:
    """The grid, most important shape of each operation first.

    quick  changes one number at a time, from EVE-Base's 32,768 tokens of D 768 with K 2, E 32, uniform; on a
           CPU from 2,048 tokens with E 8
    full   every T from 1k to 128k with every D, K, E and skew: hours
    """
    found = [_of(operation, sizes, cuda) for operation in operations]
    # In turn, so that a time limit takes as much from each.
    longest = max(map(len, found), default=0)
    return [each[n] for n in range(longest) for each in found if n < len(each)]


def _of(operation: str, sizes: str, cuda: bool) -> list[Case]:
    full = sizes == "full"
    if operation == "masked_text_loss":
        return _text(operation, full, cuda)
    if operation == "masked_pixel_loss":
        if not full and not cuda:
            return [Case(operation, 4, compiled=True)]
        return [Case(operation, tokens, compiled=True) for tokens in (128, 32, 512)[: 3 if full else 2]]
    if full:
        grid = product(
            (32, 1, 2, 4, 8, 16, 64, 128), (768, 1024)[: 1 if operation == "routing" else 2], (2, 1),
            (32, 8, 64), SKEWS,
        )  # fmt: skip
        return [
            Case(operation, thousand * 1024, d, k, e, skew, compiled=True) for thousand, d, k, e, skew in grid
        ]
    if not cuda:
        base = Case(operation, 2048, experts=8, compiled=True)
        if operation.endswith("feed_forward"):
            base = replace(base, tokens=512)
        changes = [{"tokens": base.tokens // 4}, {"skew": "zipf"}, {"skew": "one expert"}, {"choices": 1}]
    else:
        base = Case(operation, 32 * 1024, compiled=True)
        changes: list[dict] = [{"tokens": n * 1024} for n in (1, 4, 16, 128)]
        changes += [{"skew": "zipf"}, {"skew": "one expert"}, {"choices": 1}, {"experts": 8}, {"experts": 64}]
        changes += [{"width": 1024}] * (operation != "routing")
    # What stands beside another operation, with one more thing done in it, at two sizes.
    changes = changes[: 1 if operation in ("combine_residual", "dispatch_feed_forward") else None]
    return [base, *(replace(base, **change, compiled=False) for change in changes)]


def _text(operation: str, full: bool, cuda: bool) -> list[Case]:
    if not full and not cuda:
        return [Case(operation, 256, words=8000, compiled=True), Case(operation, 64, words=8000)]
    rows = (2560, 512, 8192) if full else (2560, 512)
    widths = (768, 1024) if full else (768,)
    return [Case(operation, k, width, compiled=True) for width in widths for k in rows]


def logits(case: Case, device: torch.device) -> Tensor:
    """(T, E) fp32, from a fixed seed."""
    generator = torch.Generator().manual_seed(case.tokens + case.experts)
    noise_TE = torch.rand(case.tokens, case.experts, generator=generator).clamp_min_(1e-6)
    # With Gumbel noise the k largest are k draws without putting back, of the probabilities softmax(shift).
    logits_TE = -(-noise_TE.log()).log()
    if case.skew == "zipf":
        logits_TE -= torch.arange(1, case.experts + 1).log()
    if case.skew == "one expert":
        logits_TE[:, : case.choices] += torch.arange(case.choices, 0, -1) * 30.0
    return logits_TE.to(device)
