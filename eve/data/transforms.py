"""Image bytes -> uint8 (3, H, W): decode, random crop, flip, augment.

A crop is drawn before the image is decoded, so a JPEG can be decoded at 1/2, 1/4 or 1/8 of its size
(`draft`: the decoder leaves out the high frequencies) as long as the crop keeps `image_size` pixels a side.

What becomes RGB how: transparency is laid on white; of 16 bits the upper 8 count; greyscale, palette and CMYK
are converted; of an animation the first frame is taken; EXIF orientation is applied.

Shape suffixes: C channel, H height, W width. A box is (left, top, right, bottom) in pixels, as Pillow has it.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from PIL.Image import Transform as Geometry
from PIL.Image import Transpose

Box = tuple[float, float, float, float]

# Larger images are refused by their header: a file of a few kilobytes can ask for gigabytes of memory.
MAX_PIXELS = 100_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
ASPECT = (3 / 4, 4 / 3)

Image.MAX_IMAGE_PIXELS = MAX_PIXELS

_MIRRORED = re.compile(r"\b(left|right)", re.IGNORECASE)

# EXIF orientation -> how to turn the stored image, and the stored box of a box (l, t, r, b) of the shown
# image of size (w, h).
_ORIENTATIONS = {
    2: (Transpose.FLIP_LEFT_RIGHT, lambda le, t, r, b, w, h: (w - r, t, w - le, b)),
    3: (Transpose.ROTATE_180, lambda le, t, r, b, w, h: (w - r, h - b, w - le, h - t)),
    4: (Transpose.FLIP_TOP_BOTTOM, lambda le, t, r, b, w, h: (le, h - b, r, h - t)),
    5: (Transpose.TRANSPOSE, lambda le, t, r, b, w, h: (t, le, b, r)),
    6: (Transpose.ROTATE_270, lambda le, t, r, b, w, h: (t, w - r, b, w - le)),
    7: (Transpose.TRANSVERSE, lambda le, t, r, b, w, h: (h - b, w - r, h - t, w - le)),
    8: (Transpose.ROTATE_90, lambda le, t, r, b, w, h: (h - b, le, h - t, r)),
}


class UnusableImage(ValueError):
    """The reason why no picture comes out of some bytes."""


@dataclass(frozen=True)
class Transform:
    """How a source's images are cut and changed. `crop_scale` null is the centre crop of evaluation."""

    image_size: int
    crop_scale: tuple[float, float] | None = None
    flip: bool = False
    rand_augment: tuple[int, int] | None = None

    def __call__(
        self,
        content: bytes,
        caption: str | None,
        crop: np.random.Generator,
        augment: np.random.Generator | None,
    ) -> np.ndarray:
        """uint8 (3, image_size, image_size). Raises UnusableImage.

        An image whose caption says left or right is not mirrored: the caption would become false.
        `crop` draws box and flip; `augment` the RandAugment operations, and is needed only for those.
        """
        # Pillow's decoders raise whatever the bytes lead them to (OSError, SyntaxError, struct.error, ...),
        # and warn of each odd EXIF block.
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image = self._decode(content, crop)
        except UnusableImage:
            raise
        except Image.DecompressionBombError:
            raise UnusableImage(f"image of more than {MAX_PIXELS:,} pixels") from None
        except Exception as error:
            raise UnusableImage("undecodable image") from error
        # Drawn whether or not it is used, so that a caption does not change what else is drawn.
        mirror = crop.random() < 0.5
        if self.flip and mirror and not (caption and _MIRRORED.search(caption)):
            image = image.transpose(Transpose.FLIP_LEFT_RIGHT)
        if self.rand_augment is not None:
            assert augment is not None
            image = rand_augment(image, augment, *self.rand_augment)
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))

    def _decode(self, content: bytes, crop: np.random.Generator) -> Image.Image:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        orientation = image.getexif().get(0x0112, 1)
        width, height = image.size if orientation < 5 else image.size[::-1]
        if self.crop_scale is None:
            box = centre_box(width, height)
        else:
            box = random_box(crop, width, height, self.crop_scale)
        return crop_and_resize(image, box, orientation, self.image_size)


def random_box(rng: np.random.Generator, width: int, height: int, scale: tuple[float, float]) -> Box:
    """The crop of RandomResizedCrop: share of the area uniform in `scale`, aspect log-uniform in ASPECT.

    After ten misses the largest centred box of an allowed aspect.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * ASPECT[1])))
    h = min(height, max(1, round(width / ASPECT[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def centre_box(width: int, height: int) -> Box:
    """The largest centred square."""
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def crop_and_resize(image: Image.Image, box: Box, orientation: int, size: int) -> Image.Image:
    """The `box` of the image as shown (after EXIF `orientation`) as RGB of size x size, bicubic."""
    turn = None
    if orientation in _ORIENTATIONS:
        turn, to_stored = _ORIENTATIONS[orientation]
        shown = image.size if orientation < 5 else image.size[::-1]
        box = to_stored(*box, *shown)
    if image.format in ("JPEG", "MPO"):
        box = _draft(image, box, size)
    image = to_resizable(image)
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    if image.mode != "RGB":
        image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def _draft(image: Image.Image, box: Box, size: int) -> Box:
    """Sets the JPEG decoder to the smallest scale that leaves the box `size` pixels a side; the box there."""
    shortest = min(box[2] - box[0], box[3] - box[1])
    scale = next(scale for scale in (8, 4, 2, 1) if shortest >= scale * size or scale == 1)
    if scale == 1 or not hasattr(image, "draft"):
        return box
    image.draft(None, (image.width // scale, image.height // scale))  # pyright: ignore[reportArgumentType]
    return box[0] / scale, box[1] / scale, box[2] / scale, box[3] / scale


def to_resizable(image: Image.Image) -> Image.Image:
    """A mode whose pixels may be averaged: palettes resolved, transparent parts white, 16 bits scaled to 8.

    Raises UnusableImage for floating-point pixels, whose range is unknown.
    """
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode in ("RGB", "L", "CMYK", "YCbCr"):
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        values_HW = np.asarray(image).astype(np.int64) >> 8
        return Image.fromarray(values_HW.clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        raise UnusableImage("image of floating-point numbers")
    return image.convert("RGB")


# --- RandAugment ------------------------------------------------------------------------------------------
# The ten operations, probability and magnitudes of VLMo's fine-tuning, which has them from ALBEF. Out of ten;
# signs are random; what comes in from outside is grey.

_GREY = (128, 128, 128)
_PROBABILITY = 0.5


def _affine(image: Image.Image, a: float, b: float, c: float, d: float, e: float, f: float) -> Image.Image:
    return image.transform(
        image.size, Geometry.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR, fillcolor=_GREY
    )


def _enhance(level: float) -> float:
    return 0.1 + 1.8 * level


# Image, level in 0..1, sign -> image. Translations are up to 10 pixels of 224.
_OPERATIONS = (
    lambda image, level, sign: image,
    lambda image, level, sign: ImageOps.autocontrast(image),
    lambda image, level, sign: ImageOps.equalize(image),
    lambda image, level, sign: ImageEnhance.Brightness(image).enhance(_enhance(level)),
    lambda image, level, sign: ImageEnhance.Sharpness(image).enhance(_enhance(level)),
    lambda image, level, sign: _affine(image, 1, sign * 0.3 * level, 0, 0, 1, 0),
    lambda image, level, sign: _affine(image, 1, 0, 0, sign * 0.3 * level, 1, 0),
    lambda image, level, sign: _affine(image, 1, 0, sign * level * 10 * image.width / 224, 0, 1, 0),
    lambda image, level, sign: _affine(image, 1, 0, 0, 0, 1, sign * level * 10 * image.height / 224),
    lambda image, level, sign: image.rotate(sign * 30 * level, Image.Resampling.BILINEAR, fillcolor=_GREY),
)


def rand_augment(
    image: Image.Image, rng: np.random.Generator, num_operations: int, magnitude: int
) -> Image.Image:
    """`num_operations` of the ten drawn with replacement, each done with probability 1/2."""
    for _ in range(num_operations):
        operation = _OPERATIONS[rng.integers(len(_OPERATIONS))]
        sign = 1 if rng.random() < 0.5 else -1
        if rng.random() < _PROBABILITY:
            image = operation(image, magnitude / 10, sign)
    return image
