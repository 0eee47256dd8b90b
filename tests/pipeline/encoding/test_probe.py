import dataclasses
import functools
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import xxhash
from PIL import Image, ImageOps
from safetensors.numpy import load_file

from cache.errors import CorruptShardError, IncompleteStoreError, SpecMismatchError
from cache.files.atomic import canonical_json, sha256_of, write_bytes
from pipeline.encoding import probe
from pipeline.encoding.encoder import Encoder, load_encoder
from pipeline.encoding.probe import (
    FOLDER,
    NAMES,
    TOLERANCES,
    Probe,
    check_probe,
    encode_probe_images,
    probe_pixels,
    read_probe,
    relative_differences,
    serialize_probe,
)
from pipeline.encoding.versions import library_versions
from pipeline.images import decode
from pipeline.settings import EncoderSettings
from workspace.errors import StageError

ROOT = Path(__file__).parents[3]
CLIP = "demo/checkpoints/clip/ViT-demo-32"

SHA256 = {
    "baseline.jpg": "d5c268baee398302f279b3afa7fcddb6e9fe5105acde2683142661c9c68f6a8e",
    "progressive.jpg": "27d98ac0bedd8a796f90eee6ee4273323ad214b23922568f0663ff3401ad4315",
    "gray.jpg": "62226ef562b6d9f5e713e8bfdd9af1b301cd55f95baddf02c6c0191b1552316b",
    "cmyk.jpg": "6cbfe93d7b534f03d373912b0edb76e205c313818992ddb5358b290b209b03fb",
    "orientation.jpg": "ead122462170449291f050075e407d51261337682285c8a26be925cfe1168204",
    "small.jpg": "dc6a3c269eabee23e8c14d87d6d43283f7930842231e54eb693558b92012ae74",
    "palette.png": "9697e959f2586fe7d35702e5849edec973b89ca00169a0ac47c069f91f67090c",
    "gray16.png": "00b39e2b0268426898111cc5faf95cf4a12d8ba7d9ad1facfa49468d81e2ad5d",
}


@functools.cache
def demo_encoder(precision):
    """The demo's tower: small, and its weights are trained."""
    return load_encoder(
        EncoderSettings(
            model=str(ROOT / f"{CLIP}.json"),
            pretrained=str(ROOT / f"{CLIP}.safetensors"),
            layer=-2,
            precision=precision,
            batch_size=64,
            device="cpu",
        )
    )


@functools.cache
def demo_probe(precision):
    return Probe(encode_probe_images(demo_encoder(precision)), library_versions())


@pytest.fixture(scope="module", autouse=True)
def _probes_before_any_change():
    for precision in TOLERANCES:
        demo_probe(precision)


@pytest.fixture(params=["fp32", "bf16"])
def precision(request):
    return request.param


@pytest.fixture
def spec():
    return demo_encoder("fp32").spec


@pytest.fixture
def features():
    return demo_probe("fp32").features


@pytest.fixture
def written(tmp_path, spec, features):
    path = tmp_path / "probe.safetensors"
    write_bytes(path, serialize_probe(features, spec))
    return path


def one_line(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The images


def test_the_images_are_those_of_the_first_day():
    assert list(SHA256) == list(NAMES)
    assert {path.name: sha256_of(path) for path in FOLDER.iterdir()} == SHA256
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 60_000


def test_each_image_is_of_another_kind():
    opened = {name: Image.open(io.BytesIO((FOLDER / name).read_bytes())) for name in NAMES}
    kinds = {name: (image.format, image.mode) for name, image in opened.items()}
    assert kinds == {
        "baseline.jpg": ("JPEG", "RGB"),
        "progressive.jpg": ("JPEG", "RGB"),
        "gray.jpg": ("JPEG", "L"),
        "cmyk.jpg": ("JPEG", "CMYK"),
        "orientation.jpg": ("JPEG", "RGB"),
        "small.jpg": ("JPEG", "RGB"),
        "palette.png": ("PNG", "P"),
        "gray16.png": ("PNG", "I;16"),
    }
    assert opened["progressive.jpg"].info["progressive"]
    assert "progressive" not in opened["baseline.jpg"].info
    assert opened["orientation.jpg"].getexif()[0x0112] == 6
    assert "transparency" in opened["palette.png"].info
    assert max(opened["small.jpg"].size) < 100


@pytest.mark.parametrize("size", [32, 96, 224, 336])
@pytest.mark.parametrize("resize", ["shortest", "squash"])
def test_the_pixels_are_those_of_the_decoder(spec, size, resize):
    pixels = probe_pixels(dataclasses.replace(spec, image_size=size, resize=resize))
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (8, size, size, 3)
    for name, found in zip(NAMES, pixels.numpy(), strict=True):
        wanted = decode.decode_rgb((FOLDER / name).read_bytes(), size, resize)
        assert np.array_equal(found, wanted)
        assert found.std() > 20


def test_an_image_that_cannot_be_decoded_any_more_is_named(spec, monkeypatch):
    monkeypatch.setattr(decode, "FORMATS", ("PNG",))
    with pytest.raises(StageError, match=r"baseline\.jpg cannot be decoded") as caught:
        probe_pixels(spec)
    assert "Pillow" in one_line(caught)


# The file


def test_a_probe_is_read_as_it_was_written(written, spec, features):
    kept = read_probe(written, spec)
    assert kept.features.dtype == np.float16
    assert kept.features.tobytes() == features.tobytes()
    assert kept.features.shape == features.shape == (8, spec.patches, spec.width)
    assert kept.versions == library_versions()
    assert {"torch", "open_clip_torch", "pillow", "timm", "numpy"} < kept.versions.keys()


def test_the_file_is_safetensors(written, features):
    tensors = load_file(written)
    assert list(tensors) == ["features"]
    assert np.array_equal(tensors["features"], features)


def test_two_processes_write_the_same_bytes(written, tmp_path, spec):
    """With other hash seeds; only what is given decides."""
    (tmp_path / "spec.json").write_bytes(spec.to_json())
    code = (
        "import sys; from pathlib import Path; from safetensors.numpy import load_file;"
        "from cache.spec import Spec; from pipeline.encoding.probe import serialize_probe;"
        "old, new, spec = map(Path, sys.argv[1:]);"
        "spec = Spec.from_json(spec.read_bytes(), 'here');"
        "new.write_bytes(serialize_probe(load_file(old)['features'], spec))"
    )
    paths = [written, tmp_path / "again.safetensors", tmp_path / "spec.json"]
    subprocess.run(
        [sys.executable, "-c", code, *map(str, paths)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"},
        check=True,
    )
    assert paths[1].read_bytes() == written.read_bytes()


def test_no_probe_is_an_incomplete_store(tmp_path, spec):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(IncompleteStoreError, match="no such file") as caught:
            read_probe(path, spec)
        assert str(path) in one_line(caught)


@pytest.mark.parametrize("changes", [{"layer": -1}, {"batch_size": 3}, {"width": 64}], ids=str)
def test_a_probe_of_another_encoder_is_refused(written, spec, changes):
    other = dataclasses.replace(spec, **changes)
    with pytest.raises(SpecMismatchError) as caught:
        read_probe(written, other)
    text = one_line(caught)
    assert spec.fingerprint in text
    assert other.fingerprint in text
    assert str(written) in text


def refused(path, content, spec):
    path.write_bytes(content)
    with pytest.raises(CorruptShardError) as caught:
        read_probe(path, spec)
    text = one_line(caught)
    assert str(path) in text
    assert "dvc pull" in text
    assert len(text) < 400
    return text


def test_a_probe_cut_short_or_continued_is_refused(written, spec):
    whole = written.read_bytes()
    start = len(whole) - 8 * spec.patches * spec.width * 2
    for length in (0, 1, 7, 8, 9, start // 2, start - 1, start, start + 1, len(whole) - 1):
        refused(written, whole[:length], spec)
    refused(written, whole + b"\0", spec)
    refused(written, whole + whole, spec)


def test_no_bit_can_change_unseen(written, spec):
    """But for the versions, which decide nothing, and which spaces end the header."""
    whole = written.read_bytes()
    start = len(whole) - 8 * spec.patches * spec.width * 2
    versions = range(whole.index(b"versions"), whole.index(b"xxh3"))
    places = [*range(0, start), *range(start, len(whole), 97), len(whole) - 1]
    seen = 0
    for place in places:
        if place in versions or whole[place : place + 1] == b" ":
            continue
        changed = bytearray(whole)
        changed[place] ^= 1
        written.write_bytes(changed)
        with pytest.raises((CorruptShardError, SpecMismatchError)):
            read_probe(written, spec)
        seen += 1
    assert seen > 200


def crafted(spec, features, *, told=None, header=None, metadata=None):
    """The bytes of a probe, with parts replaced."""
    data = features.tobytes()
    facts = {
        "fingerprint": spec.fingerprint,
        "versions": library_versions(),
        "xxh3": xxhash.xxh3_64_hexdigest(data),
    }
    text = canonical_json(facts | (told or {})).decode()
    tensor = {"dtype": "F16", "shape": list(features.shape), "data_offsets": [0, len(data)]}
    parts = {"__metadata__": {"probe": text} | (metadata or {}), "features": tensor}
    packed = canonical_json(parts | (header or {}))
    return len(packed).to_bytes(8, "little") + packed + data


def test_a_crafted_probe_without_a_lie_is_read(tmp_path, spec, features):
    """So that what the next test sees refused is refused for its lie."""
    path = tmp_path / "probe.safetensors"
    path.write_bytes(crafted(spec, features))
    assert read_probe(path, spec).features.tobytes() == features.tobytes()


def test_a_probe_that_no_writer_makes_is_refused(tmp_path, spec, features):
    path = tmp_path / "probe.safetensors"
    craft = functools.partial(crafted, spec, features)
    whole, half = features.nbytes, list(features.shape)
    half[0] //= 2
    more = {"dtype": "F16", "shape": [0], "data_offsets": [whole, whole]}
    tensor = {"dtype": "F16", "shape": list(features.shape), "data_offsets": [0, whole]}
    lies = [
        craft(told={"versions": {"pillow": "1\nerror: run this"}}),
        craft(told={"versions": {"pillow": "1" * 41}}),
        craft(told={"versions": {"p w": "1"}}),
        craft(told={"versions": {"pillow": 1}}),
        craft(told={"versions": ["pillow"]}),
        craft(told={"fingerprint": "x" * 7000}),
        craft(told={"fingerprint": 1}),
        craft(told={"xxh3": "0" * 16}),
        craft(told={"xxh3": None}),
        craft(told={"more": 1}),
        craft(metadata={"more": "1"}),
        craft(metadata={"probe": "[" * 5000}),
        craft(metadata={"probe": "[]"}),
        craft(metadata={"probe": "1" * 5000}),
        craft(metadata={"padding": "x" * 9000}),
        craft(header={"__metadata__": []}),
        craft(header={"__metadata__": {}}),
        craft(header={"more": more}),
        craft(header={"features": tensor | {"dtype": "BF16"}}),
        craft(header={"features": tensor | {"shape": half}}),
        craft(header={"features": tensor | {"data_offsets": [0, 2**60]}}),
        craft(header={"features": []}),
        b"\xff" * 8 + b"{}" * 500,
        (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b"\xff\xfe\xfd\xfc",
        b"garbage" * 999,
    ]
    for lie in lies:
        refused(path, lie, spec)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_stored_features_that_are_not_finite_are_refused(tmp_path, spec, features, value):
    changed = features.copy()
    changed[3, 1, 5] = value
    path = tmp_path / "probe.safetensors"
    assert "not finite" in refused(path, crafted(spec, changed), spec)


def test_a_difference_that_is_no_number_is_a_difference(features):
    changed = features.copy()
    changed[3, 1, 5] = np.nan
    with pytest.raises(StageError, match=r"1 of 8 .*: cmyk\.jpg by nan ") as caught:
        check_probe(demo_encoder("fp32"), Probe(changed, library_versions()))
    one_line(caught)


# What must pass


def differences(encoder, precision):
    found = relative_differences(encode_probe_images(encoder), demo_probe(precision).features)
    return dict(zip(NAMES, found.tolist(), strict=True))


def test_an_encoder_passes_its_own_probe(tmp_path, precision):
    encoder = demo_encoder(precision)
    path = tmp_path / "probe.safetensors"
    write_bytes(path, serialize_probe(encode_probe_images(encoder), encoder.spec))
    check_probe(encoder, read_probe(path, encoder.spec))


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_the_batch_size_does_not_matter(precision, batch_size):
    usual = demo_encoder(precision)
    spec = dataclasses.replace(usual.spec, batch_size=batch_size)
    found = encode_probe_images(Encoder(usual._visual, spec, usual.device))
    assert found.tobytes() == demo_probe(precision).features.tobytes()


@pytest.mark.parametrize("setting", ["threads", "kernels", "layout", "one by one"])
def test_other_arithmetic_of_the_same_precision_passes(precision, setting, monkeypatch):
    encoder = demo_encoder(precision)
    kept, threads = demo_probe(precision), torch.get_num_threads()
    if setting == "threads":
        try:
            torch.set_num_threads(threads + 1)
            check_probe(encoder, kept)
        finally:
            torch.set_num_threads(threads)
    elif setting == "kernels":
        try:
            torch.backends.mkldnn.set_flags(_enabled=False)
            check_probe(encoder, kept)
        finally:
            torch.backends.mkldnn.set_flags(_enabled=True)
    elif setting == "layout":
        visual = load_encoder_again(precision)._visual.to(memory_format=torch.channels_last)
        check_probe(Encoder(visual, encoder.spec, encoder.device), kept)
    else:
        whole = encoder.encode
        monkeypatch.setattr(
            encoder, "encode", lambda x: np.concatenate([whole(x[n : n + 1]) for n in range(8)])
        )
        check_probe(encoder, kept)


def load_encoder_again(precision):
    """Not the shared one: for tests that change the tower."""
    return demo_encoder.__wrapped__(precision)


def test_weights_of_tf32_pass_and_bf16_under_the_name_of_fp32_does_not():
    """TF32 keeps 10 bits, which GPUs take for convolutions unless told otherwise."""
    encoder = load_encoder_again("fp32")
    with torch.no_grad():
        for parameter in encoder._visual.parameters():
            parameter.view(torch.int32).add_(0x1000).bitwise_and_(~0x1FFF)
    check_probe(encoder, demo_probe("fp32"))
    rough = demo_encoder("bf16")._visual
    with pytest.raises(StageError, match="8 of 8"):
        check_probe(encoder_like(rough, demo_encoder("bf16")), demo_probe("fp32"))


def encoder_like(visual, usual):
    """An encoder that calculates in bf16 and is held to the tolerance of fp32."""
    made = Encoder(visual, usual.spec, usual.device)
    made.spec = demo_encoder("fp32").spec
    return made


# What must be caught: each change of preprocessing, and an image that it shows in


def resized(monkeypatch, change):
    """Put `change(image, size, usual)` in the place of Pillow's resize, also where it calls it."""
    usual = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda image, size, *_, **__: change(image, size, usual)
    )


def filtered_by(name, **options):
    def apply(monkeypatch):
        kernel = Image.Resampling[name]
        resized(monkeypatch, lambda image, size, usual: usual(image, size, kernel, **options))

    return apply


def not_antialiased(monkeypatch):
    def change(image, size, usual):
        values = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
        small = torch.nn.functional.interpolate(values, size[::-1], mode="bicubic")
        return Image.fromarray(small.clamp(0, 255).round().byte()[0].permute(1, 2, 0).numpy())

    resized(monkeypatch, change)


def size_rounded(monkeypatch):
    def change(image, size, usual):
        shorter = min(image.size)
        size = tuple(round(96 * side / shorter) for side in image.size)
        return usual(image, size, Image.Resampling.BICUBIC)

    resized(monkeypatch, change)


def cropped_one_off(monkeypatch):
    usual = Image.Image.crop
    monkeypatch.setattr(
        Image.Image, "crop", lambda image, box: usual(image, tuple(side + 1 for side in box))
    )


def rgb_after_resizing(monkeypatch):
    to_rgb, to_square = decode._to_rgb, decode.to_square
    monkeypatch.setattr(decode, "_to_rgb", lambda image: image)
    monkeypatch.setattr(decode, "to_square", lambda *given: to_rgb(to_square(*given)))


def exif_ignored(monkeypatch):
    monkeypatch.setattr(ImageOps, "exif_transpose", lambda image: image)


def before_rgb(change):
    """Applies `change` to a decoded image before it is RGB."""

    def apply(monkeypatch):
        to_rgb = decode._to_rgb
        monkeypatch.setattr(decode, "_to_rgb", lambda image: to_rgb(change(image)))

    return apply


def cmyk_inverted(image):
    return Image.fromarray(255 - np.asarray(image), "CMYK") if image.mode == "CMYK" else image


def clipped(image):
    """What Pillow's own conversion to 8 bits makes of 16-bit gray."""
    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray(np.asarray(image).clip(0, 255).astype(np.uint8))


def alpha_dropped(image):
    return image.convert("RGBA").convert("RGB") if image.has_transparency_data else image


def opened(change):
    """Applies `change` to an image that is open but not decoded yet."""

    def apply(monkeypatch):
        usual = decode._open
        monkeypatch.setattr(decode, "_open", lambda data: change(usual(data)))

    return apply


def draft(image):
    image.draft(None, (96, 96))
    return image


def chroma_repeated(image):
    """What libjpeg gives without its smooth upsampling of halved colour, nearly."""
    if image.format != "JPEG" or image.mode != "RGB" or image.layer[0][1:3] != (2, 2):
        return image
    exif = image.getexif()
    half = tuple((side + 1) // 2 for side in image.size)
    double, box = tuple(2 * side for side in half), (0, 0, *image.size)
    bright, *colours = image.convert("YCbCr").split()
    colours = [
        colour.resize(half, Image.Resampling.BOX).resize(double, Image.Resampling.NEAREST).crop(box)
        for colour in colours
    ]
    changed = Image.merge("YCbCr", (bright, *colours)).convert("RGB")
    changed.info["exif"] = exif.tobytes()
    return changed


def bgr(monkeypatch):
    usual = probe.decode_for
    monkeypatch.setattr(probe, "decode_for", lambda *given: usual(*given)[:, :, ::-1])


PREPROCESSING = {
    "bilinear": (filtered_by("BILINEAR"), "small.jpg"),
    "lanczos": (filtered_by("LANCZOS"), "small.jpg"),
    "reduced by whole factors first": (filtered_by("BICUBIC", reducing_gap=2.0), "palette.png"),
    "no antialiasing": (not_antialiased, "palette.png"),
    "size rounded": (size_rounded, "progressive.jpg"),
    "crop one pixel off": (cropped_one_off, "small.jpg"),
    "RGB after resizing": (rgb_after_resizing, "palette.png"),
    "EXIF ignored": (exif_ignored, "orientation.jpg"),
    "CMYK inverted": (before_rgb(cmyk_inverted), "cmyk.jpg"),
    "16 bits clipped": (before_rgb(clipped), "gray16.png"),
    "transparency dropped": (before_rgb(alpha_dropped), "palette.png"),
    "JPEG decoded at half size": (opened(draft), "baseline.jpg"),
    "colour of JPEG repeated": (opened(chroma_repeated), "orientation.jpg"),
    "BGR": (bgr, "baseline.jpg"),
}

MARGIN = 3
"""Every change of preprocessing is at least so many tolerances away."""


def check_refused(encoder, precision, name):
    found = differences(encoder, precision)
    assert found[name] > TOLERANCES[precision]
    with pytest.raises(StageError, match="wanted at most") as caught:
        check_probe(encoder, demo_probe(precision))
    text = one_line(caught)
    named = re.search(r"with the store: (.*?) \(relative", text).group(1).split(", ")
    wanted = {n: d for n, d in found.items() if d > TOLERANCES[precision]}
    assert named == [f"{n} by {d:.2g}" for n, d in wanted.items()]
    assert f"{len(wanted)} of 8 images" in text
    return found[name] / TOLERANCES[precision]


@pytest.mark.parametrize("change", PREPROCESSING)
def test_another_preprocessing_is_caught(monkeypatch, precision, change):
    encoder = demo_encoder(precision)
    kept = demo_probe(precision)
    apply, name = PREPROCESSING[change]
    apply(monkeypatch)
    assert check_refused(encoder, precision, name) > MARGIN
    monkeypatch.undo()
    check_probe(encoder, kept)


def test_images_that_a_change_does_not_touch_give_equal_features(monkeypatch):
    exif_ignored(monkeypatch)
    found = differences(demo_encoder("fp32"), "fp32")
    assert [name for name, difference in found.items() if difference] == ["orientation.jpg"]


@pytest.mark.parametrize(
    "changes",
    [
        {"layer": -1},
        {"layer": -3},
        {"mean": open_clip.OPENAI_DATASET_STD, "std": open_clip.OPENAI_DATASET_MEAN},
        {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
        {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    ],
    ids=str,
)
def test_another_normalisation_or_block_is_caught(precision, changes):
    usual = demo_encoder(precision)
    changed = Encoder(usual._visual, dataclasses.replace(usual.spec, **changes), usual.device)
    check_refused(changed, precision, "baseline.jpg")


def test_another_activation_is_caught_in_fp32():
    encoder = load_encoder_again("fp32")
    assert encoder.spec.activation == "gelu"
    for block in encoder._visual.transformer.resblocks:
        block.mlp.gelu = open_clip.transformer.QuickGELU()
    assert check_refused(encoder, "fp32", "palette.png") > MARGIN


# The text


def refusal(versions, monkeypatch):
    exif_ignored(monkeypatch)
    kept = Probe(demo_probe("fp32").features, versions)
    with pytest.raises(StageError) as caught:
        check_probe(demo_encoder("fp32"), kept)
    return one_line(caught)


def test_the_text_names_the_libraries_that_changed(monkeypatch):
    now = library_versions()
    then = now | {"pillow": "12.0.1", "gone": "3"}
    del then["timm"]
    text = refusal(then, monkeypatch)
    assert re.search(
        r"orientation\.jpg by 1\.\d \(relative L2, wanted at most 0\.002 in fp32\)\. What changed: "
        rf"gone 3 then, absent now; pillow 12\.0\.1 then, {re.escape(now['pillow'])} now; "
        rf"timm absent then, {re.escape(now['timm'])} now\. Go back to the former versions\. ",
        text,
    )
    assert text.endswith(
        "Or remove .work/shards, data/features and dvc.lock, which brings them back, so that all "
        "images are encoded anew."
    )


def test_the_text_says_when_no_library_changed(monkeypatch):
    text = refusal(library_versions(), monkeypatch)
    assert "library versions are the same" in text
    assert "device" in text
