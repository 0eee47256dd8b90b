import contextlib
import io
import random
import struct
import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from pipeline.images.decode import DecodeError, decode_rgb, decode_upright, image_size

SIZE = 32

SHAPES = [
    *[(w, h) for w in (1, 5, 31, 32, 33, 47, 64, 65) for h in (1, 7, 31, 32, 33, 50, 65)],
    (640, 427),
    (427, 640),
    (321, 100),
    (99, 322),
]


def drawn(size, mode="RGB", seed=0):
    width, height = size
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng([seed, *size]).integers(0, 256, (height, width, bands), np.uint8)
    return Image.fromarray(pixels[..., 0] if bands == 1 else pixels, mode=None)


def encoded(image, file_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png_chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def open_clip_pixels(image, resize_mode, interpolation="bicubic"):
    """What open_clip feeds the model, before the normalisation."""
    from open_clip.transform import image_transform

    transform = image_transform(
        SIZE, is_train=False, resize_mode=resize_mode, interpolation=interpolation
    )
    steps = transform.transforms[:-2]
    for step in steps:
        image = step(image)
    return np.array(image)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize", ["shortest", "squash"])
def test_pixels_are_those_of_open_clip(resize, interpolation):
    for size in SHAPES:
        image = drawn(size)
        expected = open_clip_pixels(image, resize, interpolation)
        found = decode_rgb(encoded(image), SIZE, resize, interpolation)
        assert found.dtype == np.uint8
        assert found.shape == (SIZE, SIZE, 3)
        np.testing.assert_array_equal(found, expected, err_msg=str(size))


@pytest.mark.parametrize("file_format", ["JPEG", "WEBP", "BMP", "TIFF", "PPM"])
def test_every_format_gives_the_pixels_pillow_decodes(file_format):
    data = encoded(drawn((50, 40)), file_format)
    expected = open_clip_pixels(Image.open(io.BytesIO(data)).convert("RGB"), "shortest")
    np.testing.assert_array_equal(decode_rgb(data, SIZE, "shortest"), expected)
    assert image_size(data) == (50, 40)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_undone(orientation):
    upright = drawn((48, 33))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(
        decode_rgb(encoded(stored, exif=exif), SIZE, "shortest"),
        decode_rgb(encoded(upright), SIZE, "shortest"),
    )


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_16_bit_gray_equals_its_8_bit_twin(file_format):
    gray = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) % 256
    wide = encoded(Image.fromarray((gray * 257).astype(np.uint16)), file_format)
    narrow = encoded(Image.fromarray(gray.astype(np.uint8)))
    np.testing.assert_array_equal(
        decode_rgb(wide, SIZE, "squash"), decode_rgb(narrow, SIZE, "squash")
    )


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_hidden_colours_never_show(mode):
    clear = Image.new(mode, (40, 40), (10, 20, 30, 0)[-len(mode) :] if mode == "RGBA" else (9, 0))
    assert (decode_rgb(encoded(clear), SIZE, "shortest") == 255).all()


def test_half_transparent_is_mixed_with_white():
    half = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 128))
    assert (decode_rgb(encoded(half), SIZE, "shortest") == 127).all()


@pytest.mark.parametrize(("mode", "colour"), [("L", 7), ("RGB", (1, 2, 3)), ("I;16", 700)])
def test_a_transparent_colour_key_becomes_white(mode, colour):
    data = encoded(Image.new(mode, (SIZE, SIZE), colour), transparency=colour)
    assert (decode_rgb(data, SIZE, "shortest") == 255).all()


def test_a_transparent_palette_entry_becomes_white():
    image = Image.new("RGB", (SIZE, SIZE), "navy").quantize(4)
    data = encoded(image, transparency=image.getpixel((0, 0)))
    assert (decode_rgb(data, SIZE, "shortest") == 255).all()


def test_palettes_are_resized_as_colours_not_as_indices():
    image = drawn((60, 45)).quantize(16)
    expected = open_clip_pixels(image.convert("RGB"), "shortest")
    np.testing.assert_array_equal(decode_rgb(encoded(image), SIZE, "shortest"), expected)


@pytest.mark.parametrize("mode", ["1", "L", "CMYK"])
def test_other_modes_become_rgb_first(mode):
    image = drawn((60, 45)).convert(mode)
    expected = open_clip_pixels(image.convert("RGB"), "shortest")
    found = decode_rgb(encoded(image, "TIFF"), SIZE, "shortest")
    np.testing.assert_array_equal(found, expected)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (SIZE, SIZE), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode_rgb(data, SIZE, "shortest") == (255, 0, 0)).all()


def test_a_file_cut_anywhere_is_an_error_or_whole():
    image = drawn((48, 48))
    for data in (encoded(image), encoded(image, "JPEG"), encoded(image, "WEBP")):
        for cut in range(0, len(data) * 9 // 10, 97):
            with pytest.raises(DecodeError):
                decode_rgb(data[:cut], SIZE, "shortest")


def test_broken_bytes_raise_nothing_but_decode_errors():
    dice = random.Random(0)
    image = drawn((24, 24))
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [encoded(image, name, exif=exif) for name in ("PNG", "JPEG", "WEBP", "TIFF")]
    files += [encoded(image, name) for name in ("GIF", "BMP", "PPM", "JPEG2000")]
    reasons = []
    for data in files * 60:
        broken = bytearray(data)
        for _ in range(dice.randint(1, 12)):
            broken[dice.randrange(min(len(broken), 400))] = dice.randrange(256)
        try:
            assert decode_rgb(bytes(broken), SIZE, "shortest").shape == (SIZE, SIZE, 3)
        except DecodeError as error:
            reasons.append(str(error))
    assert len(reasons) > 100
    assert all(reason and "\n" not in reason for reason in reasons)


def test_a_file_that_is_no_image_gets_the_same_error_twice():
    with pytest.raises(DecodeError, match="none of the formats JPEG") as first:
        decode_rgb(b"<html>404</html>", SIZE, "shortest")
    with pytest.raises(DecodeError) as second:
        image_size(b"<html>404</html>")
    assert str(first.value) == str(second.value)


def test_a_header_that_claims_a_huge_picture_is_refused_unread():
    header = struct.pack(">IIBBBBB", 12_000, 9_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"")
    for refuse in (image_size, lambda data: decode_rgb(data, SIZE, "squash")):
        with pytest.raises(DecodeError, match="12000 x 9000"):
            refuse(bomb)


def test_a_strip_that_would_grow_to_gigabytes_is_refused():
    strip = encoded(Image.new("L", (60_000, 1)))
    with pytest.raises(DecodeError, match="13440000 x 224"):
        decode_rgb(strip, 224, "shortest")
    assert decode_rgb(strip, 224, "squash").shape == (224, 224, 3)


def test_floating_point_pixels_are_refused():
    with pytest.raises(DecodeError, match="floating-point"):
        decode_rgb(encoded(Image.new("F", (8, 8)), "TIFF"), SIZE, "squash")


def test_decoding_needs_no_torch():
    code = "import sys, pipeline.images.decode; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def png(*texts, **options):
    """A PNG of 9 x 7 pixels with some text chunks: (keyword, text, whether it is compressed)."""
    info = PngImagePlugin.PngInfo()
    for keyword, text, is_compressed in texts:
        info.add_itxt(keyword, text, zip=is_compressed)
        info.add_text(keyword, text, zip=is_compressed)
    data = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(data, "PNG", pnginfo=info, **options)
    return data.getvalue()


@pytest.mark.parametrize("is_compressed", [False, True])
@pytest.mark.parametrize("num_texts", [1, 4])
def test_a_png_with_long_texts_is_the_picture_without_them(num_texts, is_compressed):
    texts = [(f"workflow {n}", "x" * (9 * 2**20), is_compressed) for n in range(num_texts)]
    data = png(*texts)
    assert image_size(data) == (9, 7)
    np.testing.assert_array_equal(decode_upright(data), decode_upright(png()))


def test_a_png_with_a_large_colour_profile_is_the_picture_without_it():
    profile = random.Random(0).randbytes(2**21)
    np.testing.assert_array_equal(decode_upright(png(icc_profile=profile)), decode_upright(png()))


def test_a_bomb_in_the_text_of_a_png_is_not_unpacked():
    # 128 MiB of zeros in some KB, a few times.
    packer = zlib.compressobj()
    bomb = b"".join(packer.compress(bytes(2**24)) for _ in range(8)) + packer.flush()
    chunk = png_chunk(b"zTXt", b"comment\0\0" + bomb)
    plain = png()
    place = plain.index(b"IDAT") - 4
    tracemalloc.start()
    try:
        decoded = decode_upright(plain[:place] + 3 * chunk + plain[place:])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20 * 2**20
    np.testing.assert_array_equal(decoded, decode_upright(plain))


@pytest.mark.parametrize("is_compressed", [False, True])
def test_the_orientation_in_a_text_of_a_png_is_heeded_beside_long_texts(is_compressed):
    xmp = '<x tiff:Orientation="6"/>'
    long = ("prompt", "y" * 2**21, is_compressed)
    turned = decode_upright(png(long, ("XML:com.adobe.xmp", xmp, is_compressed), long))
    assert turned.size == (7, 9)


@pytest.mark.parametrize("end", range(0, 400, 7))
def test_a_cut_png_with_texts_is_refused_or_whole(end):
    data = png(("a", "b" * 50, False), ("c", "d" * 50, True))
    with contextlib.suppress(DecodeError):
        np.testing.assert_array_equal(decode_upright(data[:end]), decode_upright(data))
