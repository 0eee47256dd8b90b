import base64
import io
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from PIL import Image

from eval.report.thumbnails import thumbnail_uri, thumbnails_of
from pipeline.images.decode import DecodeError, decode_rgb
from workspace.data_settings import DataSettings
from workspace.errors import StageError

INDEX = Path("data/index/images.parquet")


@pytest.fixture
def shown(world):
    """Return the thumbnails of some images."""

    def shown(image_ids, **data):
        settings = world.params(data=data).section("data", DataSettings)
        return thumbnails_of(image_ids, settings)

    return shown


def red_of(thumbnail):
    head, _, body = thumbnail.partition(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(body))) as image:
        return image.getpixel((0, 0))[0]


def test_each_image_gets_its_own_picture_from_folder_and_zip(shown):
    found = shown([101, 113, 115, 139])
    assert {i: red_of(t) for i, t in found.items()} == pytest.approx(
        {i: i for i in (101, 113, 115, 139)}, abs=2
    )


def test_only_the_pictures_asked_for_are_read(world, shown, monkeypatch):
    read = []
    monkeypatch.setattr(
        "eval.report.thumbnails.thumbnail_uri", lambda data: read.append(data) or "data:"
    )
    assert list(shown({115, 101, 113})) == [101, 113, 115]
    assert len(read) == 3


def test_no_pictures_asked_for_are_none(shown):
    assert shown([]) == {}


@pytest.mark.parametrize("place", ["nowhere", "nowhere.zip", "params.yaml", "data/empty"])
def test_without_the_images_of_a_split_the_others_are_shown(shown, place):
    Path("data/empty").mkdir()
    found = shown([101, 113], train={"images": place, "captions": "unused"})
    assert list(found) == [113]
    found = shown([101, 113], val={"images": place, "captions": "unused"})
    assert list(found) == [101]


@pytest.mark.parametrize("split", ["karpathy", "hash"])
def test_pictures_of_all_splits_come_from_one_set_of_images(world, shown, split):
    table = pq.read_table(INDEX)
    rows = [
        row | {"split": ("train", "val", "test")[row["image_id"] % 3]} for row in table.to_pylist()
    ]
    pq.write_table(pa.Table.from_pylist(rows, table.schema), INDEX)
    found = shown([101, 102, 103], split=split, val=None)
    assert {i: red_of(t) for i, t in found.items()} == pytest.approx(
        {i: i for i in (101, 102, 103)}, abs=2
    )


def test_pictures_of_several_places_are_found(world, shown):
    places = ["data/raw/val.zip", {"path": "data/raw/train", "prefix": "mine"}]
    table = pq.read_table(INDEX)
    rows = [
        row | {"split": "train", "file_name": f"mine/{row['file_name']}"}
        if row["split"] == "train"
        else row | {"split": "train"}
        for row in table.to_pylist()
    ]
    pq.write_table(pa.Table.from_pylist(rows, table.schema), INDEX)
    assert list(shown([101, 113], train={"images": places}, val=None)) == [101, 113]


def broken_png():
    """A PNG whose second chunk of pixels has no name: Pillow calls that a SyntaxError."""
    data = io.BytesIO()
    Image.effect_noise((300, 300), 99).save(data, "PNG")
    pieces = data.getvalue().split(b"IDAT")
    assert len(pieces) > 2
    return b"IDAT".join(pieces[:2]) + b"\xfb\xfa\xfa\x0c" + b"IDAT".join(pieces[2:])


@pytest.mark.parametrize(
    "content", [None, b"", b"no picture", broken_png()], ids=["gone", "empty", "text", "png"]
)
def test_a_picture_that_is_gone_or_damaged_is_left_out(shown, content):
    path = Path("data/raw/train/101.jpg")
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    found = shown([101, 102])
    assert list(found) == [102]


@pytest.mark.parametrize("image_id", [101, 113])
def test_another_picture_of_the_same_name_is_not_shown_for_it(shown, image_id):
    other = Path("data/raw/train/102.jpg").read_bytes()
    Path("data/raw/train/101.jpg").write_bytes(other)
    with zipfile.ZipFile("data/raw/val.zip", "w") as archive:
        archive.writestr("val/113.jpg", other)
    assert list(shown([image_id, 102])) == [102]


def test_an_image_of_an_impossible_size_is_left_out(shown, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30 * 20 // 2 - 1)
    assert shown([101]) == {}


def test_the_picture_is_upright_as_the_encoder_saw_it(shown):
    wide = Image.new("RGB", (60, 20))
    exif = wide.getexif()
    exif[0x0112] = 6
    wide.save("data/raw/train/101.jpg", exif=exif)
    digest = xxhash.xxh3_64_intdigest(Path("data/raw/train/101.jpg").read_bytes())
    rewrite(
        INDEX,
        lambda rows: [r | ({"source_xxh3": digest} if r["image_id"] == 101 else {}) for r in rows],
    )
    _, _, body = shown([101])[101].partition(",")
    with Image.open(io.BytesIO(base64.b64decode(body))) as image:
        assert image.size == (20, 60)


def rewrite(path, change):
    rows = pq.read_table(path).to_pylist()
    schema = pq.read_schema(path)
    pq.write_table(pa.Table.from_pylist(change(rows), schema), path)


@pytest.mark.parametrize(
    "change",
    [
        lambda row: None,
        lambda row: row | {"split": "test"},
        lambda row: row | {"file_name": "../../../etc/passwd"},
        lambda row: row | {"file_name": "/etc/passwd"},
        lambda row: row | {"file_name": ""},
        lambda row: row | {"file_name": "\u00e9t\u00e9 " * 99},
    ],
    ids=["no row", "unknown split", "leaves the root", "absolute", "no name", "long name"],
)
def test_an_image_that_the_index_cannot_place_is_left_out(world, shown, change):
    rewrite(INDEX, lambda rows: [r for r in rows if r["image_id"] != 101 or change(r)])
    rewrite(
        INDEX,
        lambda rows: [change(r) if r["image_id"] == 101 else r for r in rows],
    )
    found = shown([101, 102])
    assert list(found) == [102]


@pytest.mark.parametrize("content", [None, b"", b"PAR1 no table PAR1"])
def test_without_a_table_of_images_it_says_what_to_run(shown, content):
    INDEX.unlink()
    if content is not None:
        INDEX.write_bytes(content)
    with pytest.raises(StageError, match=r"images.parquet: .* Run the index stage") as caught:
        shown([101])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
def test_a_thumbnail_is_a_small_jpeg_of_the_same_shape(mode):
    data = io.BytesIO()
    Image.new("RGB", (400, 100), (200, 30, 30)).convert(mode).save(
        data, "TIFF" if mode == "CMYK" else "PNG"
    )
    head, _, body = thumbnail_uri(data.getvalue(), side=64).partition(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(body))) as image:
        assert (image.format, image.size, image.mode) == ("JPEG", (64, 16), "RGB")


@pytest.mark.parametrize("data", [b"", b"no picture", broken_png()[:60]])
def test_bytes_that_are_no_picture_are_an_error(data):
    with pytest.raises(DecodeError):
        thumbnail_uri(data)


def test_a_page_of_large_pictures_stays_small():
    data = io.BytesIO()
    Image.effect_noise((640, 480), 40).convert("RGB").save(data, "JPEG")
    assert len(thumbnail_uri(data.getvalue())) < 40_000, "photographs are a fraction of noise"


def stored(image):
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


@pytest.mark.parametrize(
    ("image", "wanted"),
    [
        (Image.fromarray(np.full((20, 20), 32768, np.uint16)), 128),
        (Image.new("RGBA", (20, 20), (0, 0, 0, 0)), 255),
        (Image.new("LA", (20, 20), (0, 0)), 255),
    ],
    ids=["16-bit gray", "transparent", "transparent gray"],
)
def test_a_thumbnail_is_what_the_encoder_saw(image, wanted):
    data = base64.b64decode(thumbnail_uri(stored(image)).partition(",")[2])
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    assert np.abs(pixels.astype(int) - wanted).max() <= 2
    assert np.abs(decode_rgb(stored(image), 20, "squash").astype(int) - wanted).max() == 0
