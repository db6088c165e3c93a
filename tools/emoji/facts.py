"""What can be seen in a drawing, measured from its pixels: colours, where they are, shape, size, parts.

A fact is stated only with a margin, so that someone who looks at the 64-pixel picture would agree;
what lies between two answers is None. Shape suffixes: S side of the picture, N visible pixel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

COLOURS = (
    *("black", "white", "grey", "red", "orange", "yellow", "green"),
    *("turquoise", "blue", "purple", "pink", "brown", "beige"),
)
# Colours for which people also say "light" and "dark" without meaning another colour.
_SHADED = ("green", "blue", "purple", "grey", "brown", "turquoise")
_LIGHTNESS = np.array([0.299, 0.587, 0.114], dtype=np.float32)


@dataclass(frozen=True)
class Facts:
    """`colours`: (name, share of the visible area), largest first, shares of 4 % and more.

    `tone`: "dark" or "pale", by the mean lightness.
    `top` ... `right`: the colour that rules there and not on the other side; `centre` and `around` likewise.
    `outlined`: a black edge around something that is not black.
    `shape`: "round", "square", "wide" or "tall". `slant`: "up" or "down", read from left to right.
    `size`: "small" or "large", by the box around it. `parts`: separate pieces, None where unsure.
    `thin`: drawn with lines. `symmetric`: the left half mirrors the right half.
    """

    colours: tuple[tuple[str, float], ...]
    tone: str | None
    top: str | None
    bottom: str | None
    left: str | None
    right: str | None
    centre: str | None
    around: str | None
    outlined: bool
    shape: str | None
    slant: str | None
    size: str | None
    parts: int | None
    thin: bool
    symmetric: bool | None


def measure(picture: Image.Image) -> Facts | None:
    """The facts of an RGBA picture; None where next to nothing would be seen on white."""
    rgba_SS4 = np.asarray(picture, dtype=np.float32) / 255
    mask_SS = rgba_SS4[..., 3] > 0.5
    on_white_SS3 = rgba_SS4[..., :3] * rgba_SS4[..., 3:] + 1 - rgba_SS4[..., 3:]
    if (on_white_SS3.min(axis=-1) < 0.85).mean() < 0.01 or not mask_SS.any():
        return None
    names_SS = _colour_names(on_white_SS3)
    # Edge pixels are mixed with white: thin black lines would count as grey.
    opaque_SS = rgba_SS4[..., 3] > 0.95
    opaque_SS = opaque_SS if opaque_SS.sum() > 0.3 * mask_SS.sum() else mask_SS
    rows, columns = np.nonzero(mask_SS)
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    height, width = int(bottom - top), int(right - left)
    box_mask = mask_SS[top:bottom, left:right]
    box_names = names_SS[top:bottom, left:right]
    up, down = _rivals(box_names, box_mask, axis=0)
    west, east = _rivals(box_names, box_mask, axis=1)
    centre, around = _centre(box_names, box_mask)
    lightness = float((on_white_SS3[opaque_SS] @ _LIGHTNESS).mean())
    box_share = height * width / mask_SS.size
    ink_share = float(box_mask.mean())
    return Facts(
        colours=_colour_shares(on_white_SS3[opaque_SS], names_SS[opaque_SS]),
        tone="dark" if lightness < 0.3 else "pale" if lightness > 0.8 else None,
        top=up,
        bottom=down,
        left=west,
        right=east,
        centre=centre,
        around=around,
        outlined=_outlined(names_SS, mask_SS, opaque_SS),
        shape=_shape(box_mask),
        slant=_slant(rows, columns),
        size="small" if box_share < 0.35 else "large" if box_share > 0.88 else None,
        parts=_parts(mask_SS),
        thin=ink_share < 0.3,
        symmetric=_symmetric(on_white_SS3[top:bottom, left:right]),
    )


def _colour_names(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) in [0, 1] -> (...) index into COLOURS, by hue, saturation and value."""
    value = rgb.max(axis=-1)
    chroma = value - rgb.min(axis=-1)
    saturation = chroma / np.maximum(value, 1e-6)
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    safe = np.maximum(chroma, 1e-6)
    hue = np.select(
        [value == red, value == green],
        [((green - blue) / safe) % 6, (blue - red) / safe + 2],
        (red - green) / safe + 4,
    )
    hue = hue * 60
    dim, pale = value < 0.62, saturation < 0.5
    grey = (chroma < 0.12) & (saturation < 0.32)
    rules = [
        (value < 0.2, "black"),
        (grey & (value < 0.3), "black"),
        (grey & (value > 0.93) & (chroma < 0.07), "white"),
        (grey, "grey"),
        ((hue < 14) & (value > 0.85) & pale & (hue >= 8), "beige"),
        (((hue < 8) | (hue >= 345)) & (value > 0.7) & (saturation < 0.55), "pink"),
        ((hue < 14) & (value < 0.75) & (saturation < 0.65), "brown"),
        ((hue >= 8) & (hue < 14) & (value < 0.85) & (saturation < 0.7), "brown"),
        ((hue < 14) | (hue >= 345), "red"),
        ((hue < 50) & (saturation < 0.48) & (value > 0.75), "beige"),
        ((hue < 36.8) & ((value < 0.78) | pale), "brown"),
        (hue < 36.8, "orange"),
        ((hue < 55) & dim, "brown"),
        ((hue < 65) & (saturation < 0.3), "beige"),
        (hue < 65, "yellow"),
        (hue < 163, "green"),
        (hue < 191, "turquoise"),
        (hue < 254, "blue"),
        (hue < 292, "purple"),
        ((hue < 322) & (value < 0.75), "purple"),
    ]
    return np.select(
        [condition for condition, _ in rules],
        [COLOURS.index(name) for _, name in rules],
        COLOURS.index("pink"),
    )


def _colour_shares(rgb_N3: np.ndarray, names_N: np.ndarray) -> tuple[tuple[str, float], ...]:
    counts = np.bincount(names_N, minlength=len(COLOURS))
    found = []
    for index in np.argsort(-counts, kind="stable"):
        share = float(counts[index] / len(names_N))
        if share < 0.04:
            break
        name = COLOURS[index]
        if name in _SHADED:
            lightness = float(np.median(rgb_N3[names_N == index] @ _LIGHTNESS))
            shade = "dark " if lightness < 0.34 else "light " if lightness > 0.7 else ""
            name = shade + name
        found.append((name, round(share, 2)))
    return tuple(found)


def _rivals(names: np.ndarray, mask: np.ndarray, axis: int) -> tuple[str | None, str | None]:
    """The ruling colours of the first and last two fifths along an axis, where they differ."""
    length = names.shape[axis]
    near = [slice(None), slice(None)]
    far = [slice(None), slice(None)]
    near[axis] = slice(0, max(1, 2 * length // 5))
    far[axis] = slice(length - max(1, 2 * length // 5), None)
    first = _ruling(names[tuple(near)], mask[tuple(near)])
    last = _ruling(names[tuple(far)], mask[tuple(far)])
    return (first, last) if first != last else (None, None)


def _centre(names: np.ndarray, mask: np.ndarray) -> tuple[str | None, str | None]:
    height, width = names.shape
    inner = np.zeros_like(mask)
    inner[height // 3 : height - height // 3, width // 3 : width - width // 3] = True
    inside, around = _ruling(names[inner], mask[inner]), _ruling(names[~inner], mask[~inner])
    return (inside, around) if inside != around else (None, None)


def _outlined(names_SS: np.ndarray, mask_SS: np.ndarray, opaque_SS: np.ndarray) -> bool:
    """Whether the ring of the second and third pixels from the edge is black and the whole is not."""
    once = _eroded(mask_SS)
    ring = once & ~_eroded(_eroded(once))
    black = names_SS == COLOURS.index("black")
    if not ring.any() or black[opaque_SS].mean() > 0.6:
        return False
    return bool(black[ring].mean() > 0.6)


def _eroded(mask_SS: np.ndarray) -> np.ndarray:
    padded = np.pad(mask_SS, 1)
    inner = padded[1:-1, 1:-1] & padded[:-2, 1:-1] & padded[2:, 1:-1]
    return inner & padded[1:-1, :-2] & padded[1:-1, 2:]


def _ruling(names: np.ndarray, mask: np.ndarray) -> str | None:
    """The colour of 55 % and more of the visible pixels, where the region is not nearly empty."""
    if mask.sum() < 0.15 * mask.size:
        return None
    counts = np.bincount(names[mask], minlength=len(COLOURS))
    index = int(counts.argmax())
    return COLOURS[index] if counts[index] >= 0.55 * counts.sum() else None


def _shape(box_mask: np.ndarray) -> str | None:
    height, width = box_mask.shape
    ratio = width / height
    if ratio > 1.4:
        return "wide"
    if ratio < 1 / 1.4:
        return "tall"
    if not 0.9 < ratio < 1.11:
        return None
    # The filled outline: a hole or a face inside a circle leaves the circle round.
    across = (
        np.maximum.accumulate(box_mask, axis=1) & np.maximum.accumulate(box_mask[:, ::-1], axis=1)[:, ::-1]
    )
    solid = across & np.maximum.accumulate(box_mask, axis=0)
    solid &= np.maximum.accumulate(box_mask[::-1], axis=0)[::-1]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    disc = x**2 + y**2 <= 1
    if (solid & disc).sum() > 0.94 * (solid | disc).sum():
        return "round"
    return "square" if solid.mean() > 0.94 else None


def _slant(rows: np.ndarray, columns: np.ndarray) -> str | None:
    """Whether the long axis of a long thing points up or down to the right, between 25 and 65 degrees."""
    (yy, xy), (_, xx) = np.cov(rows, columns)
    spread = np.hypot(xx - yy, 2 * xy)
    if spread < 0.65 * (xx + yy):
        return None
    angle = np.degrees(0.5 * np.arctan2(2 * xy, xx - yy))
    if 25 < abs(angle) < 65:
        return "down" if angle > 0 else "up"
    return None


def _parts(mask: np.ndarray) -> int | None:
    """Pieces that stay apart on a grid of 4-pixel cells, each at least 3 % of the drawing; None past four."""
    side = mask.shape[0] // 4 * 4
    cells = mask[:side, :side].reshape(side // 4, 4, side // 4, 4).any(axis=(1, 3))
    todo = {(int(row), int(column)) for row, column in np.argwhere(cells)}
    total, large = len(todo), 0
    while todo:
        border, size = [todo.pop()], 1
        while border:
            row, column = border.pop()
            for near in ((r, c) for r in (row - 1, row, row + 1) for c in (column - 1, column, column + 1)):
                if near in todo:
                    todo.remove(near)
                    border.append(near)
                    size += 1
        if size < 0.03 * total:
            return None
        large += 1
    return large if large <= 4 else None


def _symmetric(box_rgb: np.ndarray) -> bool | None:
    difference = float(np.abs(box_rgb - box_rgb[:, ::-1]).mean())
    return True if difference < 0.02 else False if difference > 0.1 else None
