"""Tables of positions for another resolution, or for texts of another length.

Absolute positions of patches are resized as a picture, bicubically. Relative positions of patches are taken
to lie closer together near zero: the offsets of the source are spread over those of the target in a geometric
progression, and a cubic spline through them is read at the target's (BEiT, VLMo). Rows of a text are kept
by position or distance; those that the source lacks are NaN, to be filled from a seed.

Shape suffixes: N place, D width, T table, R row of a table, H head, S offset of the source, Q of the target.
"""

from __future__ import annotations

from math import isqrt

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Rows for the class token (to patch, from patch, to itself), and for text to image and image to text.
BETWEEN = 3 + 2
# Rows of a text for its class token: the same three.
TEXT_CLASS = 3
# Between which the ratio of the geometric progression is sought, and how closely.
LEAST_RATIO, LARGEST_RATIO, PRECISION = 1.01, 1.5, 1e-6


def resize_absolute(position_ND: Tensor, side: int) -> Tensor:
    """(1 + P, D) of a square picture -> (1 + side * side, D); the class token's row is kept."""
    before = isqrt(len(position_ND) - 1)
    if before == side:
        return position_ND
    grid = position_ND[1:].T.view(1, -1, before, before)
    grid = F.interpolate(grid.float(), size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([position_ND[:1], grid.flatten(2)[0].T.to(position_ND.dtype)])


def resize_text(position_ND: Tensor, length: int) -> Tensor:
    """(N, D) -> (length, D): the first rows, NaN after the last."""
    missing = length - len(position_ND)
    return F.pad(position_ND, (0, 0, 0, missing), value=torch.nan) if missing > 0 else position_ND[:length]


def resize_relative(
    table_TRH: Tensor, side: int, new_side: int, text_positions: int, new_text_positions: int
) -> Tensor:
    """A table of eve/model/relative_positions.py for pictures of new_side^2 patches and texts of up to
    new_text_positions tokens."""
    num_text = 2 * text_positions
    offsets, between, text = table_TRH.split([(2 * side - 1) ** 2, BETWEEN, num_text], dim=1)
    if new_side != side:
        offsets = resize_offsets(offsets, 2 * new_side - 1)
    if new_text_positions != text_positions:
        text = _resize_distances(text, text_positions, new_text_positions)
    return torch.cat([offsets, between, text], dim=1)


def resize_offsets(table_TRH: Tensor, size: int) -> Tensor:
    """Rows for s x s offsets (rows, columns) of two patches -> for size x size."""
    before = isqrt(table_TRH.shape[1])
    matrix_QS = torch.from_numpy(spline_matrix(spread_offsets(before, size), centred(size)))
    grid = table_TRH.double().unflatten(1, (before, before))
    return torch.einsum("qs,tsuh,vu->tqvh", matrix_QS, grid, matrix_QS).flatten(1, 2).to(table_TRH.dtype)


def centred(size: int) -> np.ndarray:
    """-n, ..., 0, ..., n: `size` whole numbers."""
    return np.arange(size, dtype=np.float64) - size // 2


def spread_offsets(size: int, over: int) -> np.ndarray:
    """`size` places, symmetric about 0, whose distances from there are sums 1 + q + q^2 + ... ; q, found by
    bisection, is such that the last one reaches over // 2."""
    low, high, ratio = LEAST_RATIO, LARGEST_RATIO, LEAST_RATIO
    steps = np.arange(size // 2)
    while high - low > PRECISION:
        ratio = (low + high) / 2
        if (ratio**steps).sum() > over // 2:
            high = ratio
        else:
            low = ratio
    distances = np.cumsum(ratio**steps)
    return np.concatenate([-distances[::-1], [0.0], distances])


def spline_matrix(places_S: np.ndarray, at_Q: np.ndarray) -> np.ndarray:
    """(Q, S): what the values at `places_S` are multiplied by to give those of the cubic spline through them
    at `at_Q`; beyond the ends the value at the end.

    The spline is a polynomial over the first two and the last two intervals (de Boor 2001, ch. IV: not a
    knot). With fewer than four places its degree is one less than their number.
    """
    degree = min(3, len(places_S) - 1)
    inner = places_S[2:-2] if degree == 3 else places_S[:0]
    ends = degree + 1
    knots = np.concatenate([np.repeat(places_S[0], ends), inner, np.repeat(places_S[-1], ends)])
    at_Q = at_Q.clip(places_S[0], places_S[-1])
    return _bases(knots, degree, at_Q) @ np.linalg.inv(_bases(knots, degree, places_S))


def _bases(knots: np.ndarray, degree: int, x_N: np.ndarray) -> np.ndarray:
    """B-splines of those knots at x_N, (N, number of B-splines), by the recurrence of Cox and de Boor."""
    # The interval of each x; that of the last knot is the last one that is not empty.
    last = len(knots) - degree - 2
    interval_N = np.searchsorted(knots, x_N, side="right").clip(degree + 1, last + 1) - 1
    bases = (np.arange(len(knots) - 1)[None] == interval_N[:, None]).astype(np.float64)
    for order in range(1, degree + 1):
        number = len(knots) - 1 - order
        left, right = knots[:number], knots[1 : number + 1]
        rise, fall = knots[order : order + number] - left, knots[order + 1 :] - right
        up = np.divide(x_N[:, None] - left, rise, where=rise > 0, out=np.zeros((len(x_N), number)))
        down = np.divide(
            knots[order + 1 :] - x_N[:, None], fall, where=fall > 0, out=np.zeros((len(x_N), number))
        )
        bases = up * bases[:, :-1] + down * bases[:, 1:]
    return bases


def _resize_distances(text_TRH: Tensor, before: int, after: int) -> Tensor:
    """Rows of a text: distances from 2 - before on, then its class token's."""
    distances, class_rows = text_TRH.split([text_TRH.shape[1] - TEXT_CLASS, TEXT_CLASS], dim=1)
    # Negative padding cuts.
    grown = after - before
    distances = F.pad(distances, (0, 0, grown, grown), value=torch.nan)
    return torch.cat([distances, class_rows], dim=1)
