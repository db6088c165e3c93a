"""Checks an image's bytes by decoding them, and makes it smaller on request."""

from __future__ import annotations

import io
import warnings

from PIL import Image, ImageOps

from eve.data.transforms import MAX_PIXELS, to_resizable

_EXTENSIONS = {
    **{"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"},
    **{"GIF": "gif", "BMP": "bmp", "TIFF": "tif", "PPM": "ppm"},
}


class BadImage(Exception):
    """Bytes that are no image which the stream could read; the message is the reason."""


def prepare_image(image_bytes: bytes, resize: int | None, quality: int) -> tuple[bytes, str]:
    """(bytes, extension) to store. Raises BadImage where the image cannot be decoded in full.

    `resize` is the short side in pixels: a larger image becomes an RGB JPEG of it (see `to_rgb`), a smaller
    one stays byte for byte, as all do with None. A format that shards do not hold (AVIF) becomes JPEG too.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures; from twice that size on it refuses them.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(image_bytes))
            shrink = resize is not None and min(image.size) > resize
            extension = _EXTENSIONS.get(image.format or "")
            if not shrink and image.width * image.height > MAX_PIXELS:
                raise BadImage(f"{image.width} x {image.height} is more than {MAX_PIXELS:,} pixels")
            if not shrink and extension is not None:
                # All bits of a JPEG are read at an eighth as well, so a cut file is found, but cheaply.
                image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
                image.load()
                return image_bytes, extension
            if resize is not None and shrink:
                width, height = _fit(image.size, resize)
                # At least twice the size wanted, so that the resampling has something to work on.
                image.draft(None, (2 * width, 2 * height))
                image = to_rgb(image)
                image = image.resize(_fit(image.size, resize), Image.Resampling.BICUBIC, reducing_gap=3.0)
            else:
                image = to_rgb(image)
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=quality, optimize=True)
            return buffer.getvalue(), "jpg"
    except BadImage:
        raise
    # Broken bytes raise whatever the decoder trips over: OSError, ValueError, SyntaxError, struct.error, ...
    except Exception as error:
        raise BadImage(f"{type(error).__name__}: {error}") from None


def _fit(size: tuple[int, int], short: int) -> tuple[int, int]:
    """(width, height) of the same shape with the short side `short`."""
    width, height = size
    return round(width * short / min(size)), round(height * short / min(size))


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of the first frame, upright."""
    ImageOps.exif_transpose(image, in_place=True)
    image = to_resizable(image)
    return image if image.mode == "RGB" else image.convert("RGB")
