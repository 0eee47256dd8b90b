"""Turns the bytes of an image file into the square RGB pixels that a vision tower takes.

Resizing and cropping equal open_clip's `image_transform(is_train=False)`, timm's evaluation
transform and transformers' Pillow processors bit for bit, with Pillow alone so that decoding
processes start fast. The steps before differ on purpose: the image is rotated as its EXIF says, and
converted to RGB before it is resized.
"""

import contextlib
import io
import struct
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cache.spec import Spec
from cache.texts import one_line

RESIZES = ("shortest", "squash")

CROPS = ("center", "center_floor")

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
"""Pillow's filter by the name of an interpolation."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
"""Accepted formats. Pillow knows more, among them EPS, which it passes to Ghostscript."""

MAX_PIXELS = 89_478_485
"""Most pixels of an image, as decoded or resized: the limit at which Pillow warns."""

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
"""Chunks that do not affect pixels, except for texts that hold the orientation."""

_PNG_ORIENTATIONS = (b"XML:com.adobe.xmp", b"Raw profile type exif", b"exif")
"""Keywords of the texts from which Pillow reads the orientation."""

_MAX_KEYWORD_BYTES = 79


class DecodeError(ValueError):
    """Bytes that are not an image, or an image that cannot be turned into 8-bit RGB."""


def image_size(data: bytes) -> tuple[int, int]:
    """Return width and height from the file's header, without decoding pixels.

    Raises:
        DecodeError: The bytes are no image, or its size is one that `decode_rgb` refuses.
    """
    with _pillow_errors():
        return _open(data).size


def decode_for(data: bytes, spec: Spec) -> np.ndarray:
    """Decode an image file as the features of a spec want it: `decode_rgb` with its fields."""
    return decode_rgb(data, spec.image_size, spec.resize, spec.interpolation, spec.crop)


def decode_rgb(
    data: bytes, size: int, resize: str, interpolation: str = "bicubic", crop: str = "center"
) -> np.ndarray:
    """Decode an image file, resize and crop it.

    Args:
        data: The file's bytes; the first frame of an animation is taken.
        size: Side of the square, in pixels.
        resize: "shortest" scales the shorter side to `size` and crops the middle; "squash" scales
            both sides to `size`. "shortest-256" and "squash-256" scale to 256 pixels before the
            crop, or to any other number that is not smaller than `size`.
        interpolation: Filter of the resizing, of `FILTERS`.
        crop: Where half a pixel goes if an odd number of pixels is cut off: "center" rounds half to
            even, as torchvision does; "center_floor" down, as transformers does.

    Returns:
        uint8 [size, size, 3].

    Raises:
        DecodeError: The bytes are no image, cut short, or too large; the text is one line.
    """
    image = decode_upright(data)
    with _pillow_errors():
        return np.array(to_square(image, size, resize, interpolation, crop))


def decode_upright(data: bytes) -> Image.Image:
    """Decode an image file to 8-bit RGB at its own size, rotated as its EXIF says.

    Raises:
        DecodeError: The bytes are no image, cut short, or too large; the text is one line.
    """
    with _pillow_errors():
        # Loaded only once: a second load of a truncated file gives half a picture.
        image = _open(data)
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))


def _open(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(_without_texts(data)), formats=FORMATS)
    _check_area(*image.size)
    return image


def _without_texts(data: bytes) -> bytes:
    """Return a PNG without texts and colour profile; other files unchanged.

    Pillow decompresses all texts, and refuses an intact picture whose texts are long.
    """
    if not data.startswith(_PNG_SIGNATURE):
        return data
    pieces, start, position = [], 0, len(_PNG_SIGNATURE)
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        # Length, kind, content, checksum.
        end = position + 12 + length
        if end > len(data):
            break
        keyword = data[position + 8 : position + 9 + _MAX_KEYWORD_BYTES].partition(b"\0")[0]
        if kind in _PNG_TEXTS and keyword not in _PNG_ORIENTATIONS:
            pieces.append(data[start:position])
            start = end
        position = end
    return b"".join([*pieces, data[start:]]) if pieces else data


def _check_area(width: int, height: int) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise DecodeError(f"{width} x {height} pixels, wanted from 1 to {MAX_PIXELS} in all")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _gray16_to_rgb(image)
    if image.mode == "F":
        raise DecodeError("pixels are floating-point numbers, which have no known white")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _gray16_to_rgb(image: Image.Image) -> Image.Image:
    """Scale 16-bit gray to 8 bits; Pillow's own conversion clips nearly everything to white."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise DecodeError("pixels do not fit 16 bits")
    gray = (values * 255 + 0x7FFF) // 0xFFFF
    gray[values == image.info.get("transparency", -1)] = 255
    return Image.fromarray(gray.astype(np.uint8)).convert("RGB")


def to_square(
    image: Image.Image, size: int, resize: str, interpolation: str, crop: str
) -> Image.Image:
    """Resize and crop an RGB image; the arguments are those of `decode_rgb`.

    Raises:
        DecodeError: The resized image would be too large.
    """
    mode, _, resized = resize.partition("-")
    side = int(resized or size)
    width, height = side, side
    if mode == "shortest":
        shorter = min(image.size)
        # Truncated, not rounded, as in torchvision's Resize.
        width, height = (int(side * length / shorter) for length in image.size)
        # A thin strip of few pixels would become gigabytes.
        _check_area(width, height)
    image = image.resize((width, height), FILTERS[interpolation])
    if crop == "center_floor":
        left, top = (width - size) // 2, (height - size) // 2
    else:
        # Rounds half to even, as torchvision's CenterCrop does.
        left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


@contextlib.contextmanager
def _pillow_errors() -> Iterator[None]:
    """Turn whatever Pillow raises into a DecodeError of one line; drop its warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UnidentifiedImageError:
        # Pillow's own text holds the buffer's address, which differs between runs.
        raise DecodeError(f"none of the formats {', '.join(FORMATS)}") from None
    except Exception as error:
        # The exceptions of Pillow's readers have no other common base.
        raise DecodeError(one_line(error) or type(error).__name__) from None
