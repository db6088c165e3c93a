"""Draws samples: pictures side by side, captions with marked words under them. Knows no model.

Shape suffixes: H height, W width, C colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
BLACK: Colour = (0, 0, 0)
GREY: Colour = (120, 120, 120)
GREEN: Colour = (0, 130, 50)
RED: Colour = (200, 30, 30)

_GAP = 6
_FONT_SIZE = 13
_LINE = 17


@dataclass(frozen=True)
class Line:
    """`title`, then pieces of text of one colour each; a space before a piece is its own. Wrapped to the
    width of its cell."""

    title: str
    pieces: Sequence[tuple[str, Colour]]


@dataclass(frozen=True)
class Cell:
    """One sample: pictures of one size, uint8 (H, W, C), with a title each, and lines of text under them."""

    pictures: Sequence[tuple[str, np.ndarray]]
    lines: Sequence[Line]


def draw_sheet(cells: Sequence[Cell], *, footnote: str = "", columns: int = 2) -> np.ndarray:
    """All cells in a grid, `columns` side by side: uint8 (H, W, C). Small pictures are enlarged by a whole
    factor to about 128 pixels; a cell is as wide as three pictures, or 390 pixels without any."""
    font = ImageFont.load_default(_FONT_SIZE)
    width = max(_pictures_width(cell) for cell in cells)
    drawn = [_draw_cell(cell, width, font) for cell in cells]
    rows = [drawn[start : start + columns] for start in range(0, len(drawn), columns)]
    heights = [max(cell.height for cell in row) for row in rows]
    total_width = min(columns, len(drawn)) * (width + 3 * _GAP)
    note = _wrap([(" " + word, GREY) for word in footnote.split()], total_width - 2 * _GAP, font)
    total_height = sum(heights) + _GAP * (len(rows) + 1) + _LINE * len(note)
    sheet = Image.new("RGB", (total_width, total_height), "white")
    top = _GAP
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            sheet.paste(cell, (_GAP + column * (width + 3 * _GAP), top))
        top += height + _GAP
    _write(ImageDraw.Draw(sheet), note, _GAP, top, font)
    return np.asarray(sheet)


def _scale(picture_HWC: np.ndarray) -> int:
    return max(1, round(128 / picture_HWC.shape[1]))


def _pictures_width(cell: Cell) -> int:
    if not cell.pictures:
        return 390
    return sum(picture.shape[1] * _scale(picture) + _GAP for _, picture in cell.pictures)


def _draw_cell(cell: Cell, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> Image.Image:
    wrapped = [_wrap([(line.title, GREY), *line.pieces], width, font) for line in cell.lines]
    picture_height = max((p.shape[0] * _scale(p) + _LINE + _GAP for _, p in cell.pictures), default=0)
    height = picture_height + _LINE * sum(len(lines) for lines in wrapped)
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    left = 0
    for title, picture_HWC in cell.pictures:
        scale = _scale(picture_HWC)
        picture = Image.fromarray(picture_HWC)
        size = (picture.width * scale, picture.height * scale)
        canvas.paste(picture.resize(size, Image.Resampling.NEAREST), (left, _LINE))
        draw.text((left, 0), title, fill=GREY, font=font)
        left += picture.width * scale + _GAP
    top = picture_height
    for lines in wrapped:
        top = _write(draw, lines, 0, top, font)
    return canvas


def _wrap(
    pieces: Sequence[tuple[str, Colour]], width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> list[list[tuple[str, Colour]]]:
    """Pieces into lines no wider than `width` pixels; a wider piece has a line of its own."""
    lines: list[list[tuple[str, Colour]]] = []
    used = 0.0
    for text, colour in pieces:
        if not lines or used + font.getlength(text) > width:
            lines.append([])
            used, text = 0.0, text.lstrip()
        lines[-1].append((text, colour))
        used += font.getlength(text)
    return lines


def _write(
    draw: ImageDraw.ImageDraw,
    lines: Sequence[Sequence[tuple[str, Colour]]],
    left: int,
    top: int,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> int:
    """Draws the lines and returns where the next one begins."""
    for line in lines:
        offset = float(left)
        for text, colour in line:
            draw.text((offset, top), text, fill=colour, font=font)
            offset += font.getlength(text)
        top += _LINE
    return top
