"""Every form of image becomes the right RGB; crops, flips and augmentations are what they say."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from PIL import Image, ImageOps

from eve.data.seeds import generator
from eve.data.transforms import (
    ASPECT,
    MAX_PIXELS,
    Transform,
    UnusableImage,
    centre_box,
    crop_and_resize,
    rand_augment,
    random_box,
)

CENTRE = Transform(image_size=16)


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def centre(content: bytes) -> np.ndarray:
    return CENTRE(content, None, generator(1), None)


def scene(width: int = 64, height: int = 48) -> Image.Image:
    """Smooth, different in every corner and channel."""
    y, x = np.mgrid[0:height, 0:width]
    red, green, blue = 255 * x / width, 255 * y / height, 127 + 120 * np.sin(x / 9 + y / 5)
    return Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8))


# --- forms of image ---------------------------------------------------------------------------------------


def one_colour(mode: str, colour, size=(20, 20)) -> Image.Image:
    return Image.new(mode, size, colour)


def palette_with_transparency() -> bytes:
    image = Image.new("P", (20, 20), 1)
    image.putpalette([10, 20, 30, 200, 0, 0])
    return encode(image, transparency=1)


def sixteen_bit(value: int) -> bytes:
    return encode(Image.fromarray(np.full((20, 20), value, dtype=np.uint16)))


def animated(format: str) -> bytes:
    frames = [one_colour("RGB", colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    return encode(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (encode(one_colour("RGB", (9, 99, 199))), (9, 99, 199)),
        (encode(one_colour("L", 77)), (77, 77, 77)),
        (encode(one_colour("1", 1)), (255, 255, 255)),
        (encode(one_colour("RGBA", (200, 0, 100, 0))), (255, 255, 255)),
        (encode(one_colour("RGBA", (200, 0, 100, 255))), (200, 0, 100)),
        (encode(one_colour("RGBA", (0, 0, 0, 51))), (204, 204, 204)),
        (encode(one_colour("LA", (0, 51))), (204, 204, 204)),
        (encode(one_colour("RGB", (9, 99, 199)).quantize(4)), (9, 99, 199)),
        (palette_with_transparency(), (255, 255, 255)),
        (encode(one_colour("RGB", (1, 2, 3)), transparency=(1, 2, 3)), (255, 255, 255)),
        (sixteen_bit(0x8040), (128, 128, 128)),
        (sixteen_bit(0xFFFF), (255, 255, 255)),
        (encode(Image.fromarray(np.full((20, 20), 0x8040, dtype=np.uint16)), "TIFF"), (128, 128, 128)),
        (encode(one_colour("CMYK", (0, 255, 255, 0)), "JPEG", quality=95), (255, 0, 0)),
        (encode(one_colour("CMYK", (0, 0, 0, 255)), "TIFF"), (0, 0, 0)),
        (encode(one_colour("RGB", (9, 99, 199)), "BMP"), (9, 99, 199)),
        (encode(one_colour("RGB", (9, 99, 199)), "WEBP", lossless=True), (9, 99, 199)),
        (animated("GIF"), (255, 0, 0)),
        (animated("WEBP"), (255, 0, 0)),
        (animated("PNG"), (255, 0, 0)),
    ],
)
def test_every_mode_is_the_right_colour(content, expected):
    pixels_CHW = centre(content)
    assert pixels_CHW.dtype == np.uint8
    assert pixels_CHW.shape == (3, 16, 16)
    assert pixels_CHW.flags.c_contiguous
    assert np.abs(pixels_CHW.reshape(3, -1).T.astype(int) - expected).max() <= 2


def test_sixteen_bit_keeps_its_gradient():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(256, 0)
    pixels_CHW = Transform(256)(encode(Image.fromarray(ramp)), None, generator(1), None)
    assert np.array_equal(pixels_CHW[0, 0], ramp[0] >> 8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("box", [(0, 0, 48, 48), (5, 7, 33, 40), (10, 2, 40, 20)])
def test_exif_orientation_of_a_crop(orientation, box):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(scene(64, 60), exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).resize(
        (16, 16), Image.Resampling.BICUBIC, box=box
    )
    found = crop_and_resize(Image.open(io.BytesIO(content)), box, orientation, 16)
    # Resampling runs along the rows first; turned, the rounding in between differs.
    assert np.abs(np.asarray(found).astype(int) - np.asarray(expected)).max() <= 1


def test_exif_orientation_of_a_jpeg_is_read():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode(scene().transpose(Image.Transpose.ROTATE_90), "JPEG", quality=98, exif=exif)
    straight = encode(scene(), "JPEG", quality=98)
    assert np.abs(centre(turned).astype(int) - centre(straight)).max() <= 8


# --- JPEG at a smaller scale ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1152, 864), (1001, 667), (640, 480), (97, 201), (33, 31), (2048, 16)])
@pytest.mark.parametrize("target", [16, 64, 224])
def test_draft_leaves_the_crop_enough_pixels(size, target, monkeypatch):
    seen = []
    resize = Image.Image.resize

    def spy(self, size, resample, box, reducing_gap):
        self.load()
        seen.append((self.size, box))
        return resize(self, size, resample, box, reducing_gap)

    monkeypatch.setattr(Image.Image, "resize", spy)
    content = encode(scene(*size), "JPEG")
    rng = np.random.default_rng(0)
    for _ in range(5):
        box = random_box(rng, *size, (0.1, 1.0))
        crop_and_resize(Image.open(io.BytesIO(content)), box, 1, target)
        (width, height), drafted = seen[-1]
        scale = (box[2] - box[0]) / (drafted[2] - drafted[0])
        assert scale in (1, 2, 4, 8)
        assert drafted[2] <= width
        assert drafted[3] <= height
        shortest = min(drafted[2] - drafted[0], drafted[3] - drafted[1])
        # Enough is left, and half of it would not have been enough.
        assert scale == 1 or shortest >= target
        assert scale == 8 or shortest < 2 * target


def test_draft_shows_the_same_picture():
    content = encode(scene().resize((1152, 864), Image.Resampling.BICUBIC), "JPEG", quality=95)
    for seed in range(4):
        box = random_box(generator(seed), 1152, 864, (0.5, 1.0))
        full = Image.open(io.BytesIO(content)).convert("RGB")
        expected = full.resize((64, 64), Image.Resampling.BICUBIC, box=box)
        found = crop_and_resize(Image.open(io.BytesIO(content)), box, 1, 64)
        difference = np.abs(np.asarray(found).astype(int) - np.asarray(expected))
        assert difference.mean() < 1
        assert difference.max() <= 8


def test_sixty_megapixels_are_read():
    small = scene(100, 60)
    content = encode(small.resize((10_000, 6_000), Image.Resampling.NEAREST), "JPEG")
    expected = small.resize((16, 16), Image.Resampling.BICUBIC, box=centre_box(100, 60))
    assert np.abs(centre(content).transpose(1, 2, 0).astype(int) - np.asarray(expected)).mean() < 4


@pytest.mark.parametrize("side", [10_001, 15_001])
def test_more_than_the_limit_is_refused_by_the_header(side):
    assert side * side > MAX_PIXELS
    content = bytearray(encode(one_colour("RGB", (1, 2, 3), (4, 4)), "BMP"))
    content[18:26] = side.to_bytes(4, "little") * 2
    with pytest.raises(UnusableImage, match=r"image of more than 100,000,000 pixels"):
        centre(bytes(content))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not an image at all",
        encode(scene(), "JPEG")[:400],
        encode(scene())[:-700],
        b"\xff\xd8\xff\xe0" + bytes(range(256)),
        b"\x89PNG\r\n\x1a\n" + b"\xff" * 64,
        b"GIF89a" + b"\x00" * 40,
        b"II*\x00" + b"\xff" * 64,
    ],
)
def test_garbage_is_told(content):
    with pytest.raises(UnusableImage, match=r"undecodable image"):
        centre(content)


def test_floating_point_image_is_told():
    content = encode(Image.fromarray(np.ones((8, 8), dtype=np.float32)), "TIFF")
    with pytest.raises(UnusableImage, match=r"floating-point"):
        centre(content)


# --- what is drawn ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1152, 864), (64, 64), (3, 500), (500, 3), (1, 1)])
def test_random_boxes_are_inside_and_of_the_right_shape(size):
    width, height = size
    for seed in range(200):
        left, top, right, bottom = random_box(generator(seed), width, height, (0.5, 1.0))
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        if min(size) > 50:
            w, h = right - left, bottom - top
            assert 0.48 <= w * h / (width * height) <= 1.0
            assert ASPECT[0] - 0.02 <= w / h <= ASPECT[1] + 0.02


def test_area_is_uniform_and_aspect_log_uniform():
    boxes = [random_box(generator(seed), 1000, 1000, (0.1, 0.4)) for seed in range(2000)]
    areas = np.array([(r - le) * (b - t) / 1e6 for le, t, r, b in boxes])
    aspects = np.log([(r - le) / (b - t) for le, t, r, b in boxes])
    assert np.quantile(areas, [0.25, 0.5, 0.75]) == pytest.approx([0.175, 0.25, 0.325], abs=0.015)
    assert np.quantile(aspects, [0.25, 0.5, 0.75]) == pytest.approx(
        [-math.log(4 / 3) / 2, 0, math.log(4 / 3) / 2], abs=0.025
    )


def test_half_are_mirrored_but_never_what_has_a_side():
    content = encode(scene())
    transform = Transform(16, crop_scale=(1.0, 1.0), flip=True)

    def is_mirrored(caption: str | None, seed: int) -> bool:
        pixels_CHW = transform(content, caption, generator(seed), None)
        return bool(pixels_CHW[0, :, 0].mean() > pixels_CHW[0, :, -1].mean())

    plain = [is_mirrored("a dog", seed) for seed in range(200)]
    assert 70 < sum(plain) < 130
    assert plain == [is_mirrored(None, seed) for seed in range(200)]
    # "bright" has no side.
    assert plain == [is_mirrored("a bright dog", seed) for seed in range(200)]
    for caption in ("Left of a dog", "the rightmost dog", "a dog (right)"):
        assert not any(is_mirrored(caption, seed) for seed in range(50))


def test_rand_augment_is_drawn_from_its_generator_alone():
    image = scene().resize((32, 32))
    results = [np.asarray(rand_augment(image, generator(seed), 2, 7)) for seed in range(60)]
    again = [np.asarray(rand_augment(image, generator(seed), 2, 7)) for seed in range(60)]
    assert all(np.array_equal(a, b) for a, b in zip(results, again, strict=True))
    assert all(result.shape == (32, 32, 3) for result in results)
    unchanged = sum(np.array_equal(result, np.asarray(image)) for result in results)
    # Both operations passed over or the identity: (0.5 + 0.5 / 10) ** 2 = 0.30, a little more where
    # autocontrast finds nothing to do.
    assert 8 <= unchanged <= 32
    assert len({result.tobytes() for result in results}) > 15


def test_augmentation_does_not_move_the_crop():
    content = encode(scene())
    plain = Transform(16, (0.3, 1.0), flip=True)
    augmented = Transform(16, (0.3, 1.0), flip=True, rand_augment=(2, 7))
    same = sum(
        np.array_equal(
            plain(content, None, generator(seed), None),
            augmented(content, None, generator(seed), generator(seed, "augment")),
        )
        for seed in range(60)
    )
    assert 8 <= same <= 32
