"""Turns the bytes of an image file into the square RGB pixels that CLIP looks at.

Resizing and cropping are those of open_clip's `image_transform(is_train=False)`, bit by bit, with
Pillow alone so that decoding processes start fast. What comes before differs on purpose: the
image is turned as its EXIF says and is RGB before it is resized.
"""

import io
import struct
import warnings
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cache.texts import one_line

Resize = Literal["shortest", "squash"]

Interpolation = Literal["bicubic", "bilinear"]

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
"""What is read at all. Pillow knows more; among them EPS, which it hands to Ghostscript."""

MAX_PIXELS = 89_478_485
"""Pixels of the largest image that is decoded or made by resizing: Pillow's limit for a warning."""

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
"""Chunks that pixels do not depend on, but for texts that hold the orientation."""

_PNG_ORIENTATIONS = (b"XML:com.adobe.xmp", b"Raw profile type exif", b"exif")
"""Keywords of the texts in which Pillow looks for the orientation."""

_MAX_KEYWORD_BYTES = 79

_PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    IndexError,
    KeyError,
    OverflowError,
    MemoryError,
    RuntimeError,
    struct.error,
    Image.DecompressionBombError,
)
"""What Pillow's readers raise on broken files; they share no base class below Exception."""


class DecodeError(ValueError):
    """Bytes that are not an image, or an image that cannot be turned into 8-bit RGB."""


def image_size(data: bytes) -> tuple[int, int]:
    """Return width and height as the file's header states them, without decoding pixels.

    Raises:
        DecodeError: Not an image, or of a size that `decode_rgb` would refuse.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _open(data).size
    except _PILLOW_ERRORS as error:
        raise DecodeError(_reason(error)) from None


def decode_rgb(
    data: bytes, size: int, resize: Resize, interpolation: Interpolation = "bicubic"
) -> np.ndarray:
    """Decode an image file, resize and crop it.

    Args:
        data: The file's bytes; of an animation, the first frame is taken.
        size: Side of the square, in pixels.
        resize: "shortest" brings the shorter side to `size` and crops the middle; "squash" brings
            both sides to `size`.
        interpolation: How pixels are resized.

    Returns:
        uint8 [size, size, 3].

    Raises:
        DecodeError: Not an image, cut short, or too large; the text is one line.
    """
    image = decode_upright(data)
    try:
        return np.array(_to_square(image, size, resize, _FILTERS[interpolation]))
    except _PILLOW_ERRORS as error:
        raise DecodeError(_reason(error)) from None


def decode_upright(data: bytes) -> Image.Image:
    """Decode an image file: turned as its EXIF says, in 8-bit RGB, at its own size.

    Raises:
        DecodeError: Not an image, cut short, or too large; the text is one line.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Opened once and loaded once: a second load of a truncated file gives half a picture.
            image = _open(data)
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except _PILLOW_ERRORS as error:
        raise DecodeError(_reason(error)) from None


def _open(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(_without_texts(data)), formats=FORMATS)
    _check_area(*image.size)
    return image


def _without_texts(data: bytes) -> bytes:
    """Return a PNG without texts and colour profile, and anything else as it is.

    Pillow refuses a sound picture whose texts are long, and unpacks all of them.
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
        if kind in _PNG_TEXTS and not _is_orientation(data, position + 8):
            pieces.append(data[start:position])
            start = end
        position = end
    return b"".join([*pieces, data[start:]]) if pieces else data


def _is_orientation(data: bytes, start: int) -> bool:
    keyword = data[start : start + _MAX_KEYWORD_BYTES + 1].partition(b"\0")[0]
    return keyword in _PNG_ORIENTATIONS


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
    """Scale 16-bit gray to 8 bits, where Pillow's own conversion clips nearly all to white."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise DecodeError("pixels do not fit 16 bits")
    gray = (values * 255 + 0x7FFF) // 0xFFFF
    gray[values == image.info.get("transparency", -1)] = 255
    return Image.fromarray(gray.astype(np.uint8)).convert("RGB")


def _to_square(
    image: Image.Image, size: int, resize: Resize, resampling: Image.Resampling
) -> Image.Image:
    if resize == "squash":
        return image.resize((size, size), resampling)
    shorter = min(image.size)
    # Cut off, not rounded, as torchvision's Resize does.
    width, height = (int(size * side / shorter) for side in image.size)
    # A long thin strip of few pixels would become gigabytes.
    _check_area(width, height)
    image = image.resize((width, height), resampling)
    # Half to even, as torchvision's CenterCrop rounds.
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        # Pillow's own text holds the address of the buffer, which differs in each run.
        return f"none of the formats {', '.join(FORMATS)}"
    return one_line(error) or type(error).__name__
