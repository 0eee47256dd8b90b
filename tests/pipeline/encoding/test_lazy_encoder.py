"""A cached spec holds as long as nothing that decides it has changed."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from cache.files.atomic import write_bytes
from pipeline.encoding import encoder as encoder_module
from pipeline.encoding import lazy_encoder as module
from pipeline.encoding import versions
from pipeline.encoding.encoder import load_encoder
from pipeline.encoding.lazy_encoder import SPECS, LazyEncoder, cache_path, read_cached_spec
from pipeline.encoding.versions import LIBRARIES
from pipeline.settings import EncoderSettings
from workspace import code_hash
from workspace.errors import StageError

pytestmark = pytest.mark.slow("loads a tower in many tests")

OTHER = {
    "model": "ViT-B-32",
    "pretrained": "openai",
    "layer": -1,
    "precision": "bf16",
    "batch_size": 5,
}
"""Another value of each setting that decides the spec, or the bytes of a feature."""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def usual(settings):
    return settings()


@pytest.fixture
def spec(usual):
    return load_encoder(usual).spec


@pytest.fixture
def code(folder, monkeypatch):
    """A copy of the code, which is hashed from now on."""
    for package in ("cache", "pipeline", "workspace"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(code_hash.ROOT / package, folder / "code" / package, ignore=ignored)
    monkeypatch.setattr(code_hash, "ROOT", folder / "code")
    return folder / "code"


def cached_spec(settings):
    return read_cached_spec(cache_path(settings))


def cache_spec(settings, spec):
    if path := cache_path(settings):
        write_bytes(path, spec.to_json())


def cached_files():
    return sorted(SPECS.iterdir()) if SPECS.exists() else []


# The cache


def test_the_cached_spec_is_that_of_the_loaded_encoder(usual):
    first = LazyEncoder(usual)
    assert first.spec == first.encoder.spec == load_encoder(usual).spec
    again = LazyEncoder(usual)
    assert again.spec == first.spec
    assert not again.is_loaded


def test_an_encoder_is_loaded_when_it_is_needed_and_not_before(usual, monkeypatch):
    loads = []
    real = encoder_module.load_encoder
    monkeypatch.setattr(encoder_module, "load_encoder", lambda s: loads.append(s) or real(s))
    encoder = LazyEncoder(usual)
    assert not encoder.is_loaded
    assert encoder.spec
    assert encoder.is_loaded
    assert encoder.encoder is encoder.encoder
    assert loads == [usual]
    again = LazyEncoder(usual)
    assert again.spec
    assert not again.is_loaded
    assert again.encoder
    assert again.is_loaded
    assert loads == [usual, usual]


def test_without_a_cache_there_is_no_spec(usual):
    assert cached_spec(usual) is None
    assert not SPECS.exists()


def test_the_device_does_not_matter(usual, spec):
    cache_spec(usual, spec)
    assert cached_spec(dataclasses.replace(usual, device="cuda:7")) == spec


# Changes that are noticed


def test_every_setting_but_the_device_has_another_value_here():
    # `stream` is about external stores, which have no encoder.
    assert OTHER.keys() | {"device", "stream"} == {
        f.name for f in dataclasses.fields(EncoderSettings)
    }


@pytest.mark.parametrize("name", OTHER)
def test_other_settings_have_another_spec(usual, spec, name):
    cache_spec(usual, spec)
    other = dataclasses.replace(usual, **{name: OTHER[name]})
    assert cached_spec(other) is None
    cache_spec(other, dataclasses.replace(spec, weights_sha256="0" * 64))
    assert cached_spec(usual) == spec


def test_another_architecture_under_the_same_name_is_noticed(usual, spec, tiny):
    cache_spec(usual, spec)
    tiny["vision_cfg"]["layers"] += 1
    Path(usual.model).write_text(json.dumps(tiny))
    assert cached_spec(usual) is None
    assert LazyEncoder(usual).spec != spec


def test_other_weights_under_the_same_name_are_noticed(settings, usual):
    visual = load_encoder(usual)._visual
    state = {f"visual.{name}": tensor for name, tensor in visual.state_dict().items()}
    weights = Path("weights.pt")
    torch.save(state, weights)
    given = settings(pretrained="weights.pt")
    cache_spec(given, spec := load_encoder(usual).spec)
    assert cached_spec(given) == spec
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    assert cached_spec(given) is None
    weights.unlink()
    assert cached_spec(given) is None


@pytest.mark.parametrize("library", [*LIBRARIES, "libjpeg_turbo"])
def test_another_version_of_a_library_is_noticed(usual, spec, library, monkeypatch):
    cache_spec(usual, spec)
    found = module.library_versions()
    assert library in found
    monkeypatch.setattr(module, "library_versions", lambda model: found | {library: "0.0.1"})
    assert cached_spec(usual) is None


def test_another_format_is_noticed(usual, spec, monkeypatch):
    cache_spec(usual, spec)
    monkeypatch.setattr(module, "FORMAT", "patchcache/2")
    assert cached_spec(usual) is None


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("pipeline/encoding/encoder.py", ".float() / 255", ".float() / 256"),
        ("pipeline/encoding/encoder.py", "PREPROCESS_VERSION = 1", "PREPROCESS_VERSION = 2"),
        ("pipeline/towers/tower.py", "intermediates=False", "intermediates=True"),
        ("pipeline/images/decode.py", 'image.convert("RGB")', 'image.convert("RGB").copy()'),
        ("cache/spec.py", "sha256", "sha512"),
    ],
)
def test_a_change_of_the_code_is_noticed(usual, spec, code, name, before, after):
    cache_spec(usual, spec)
    assert cached_spec(usual) == spec
    text = (code / name).read_text()
    assert before in text
    (code / name).write_text(text.replace(before, after))
    assert cached_spec(usual) is None


def test_comments_blank_lines_and_layout_of_the_code_do_not_matter(usual, spec, code):
    cache_spec(usual, spec)
    for path in code.rglob("*.py"):
        text = path.read_text()
        text = text.replace("\n\n\ndef ", "\n# New.\n\n\n\n\ndef ")
        path.write_text(f"# First.\n\n{text}\n\n# Last.\n")
    assert cached_spec(usual) == spec


# Towers of transformers


@pytest.fixture
def hf_tower(settings):
    """Settings of a tower in a folder, whose files exist."""
    Path("tower").mkdir()
    for name in ("config.json", "preprocessor_config.json", "model.safetensors", "README.md"):
        Path("tower", name).write_bytes(name.encode())
    return settings(model="hf:tower", pretrained="main")


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_another_file_in_a_folder_is_noticed(hf_tower, spec, name):
    cache_spec(hf_tower, spec)
    Path("tower/README.md").write_text("other words")
    assert cached_spec(hf_tower) == spec
    Path("tower", name).write_text("other content")
    assert cached_spec(hf_tower) is None


def test_another_version_of_transformers_is_noticed_by_its_own_towers(hf_tower, usual, monkeypatch):
    paths = cache_path(usual), cache_path(hf_tower)
    real = versions.version
    monkeypatch.setattr(versions, "version", lambda n: "0" if n == "transformers" else real(n))
    assert cache_path(usual) == paths[0]
    assert cache_path(hf_tower) != paths[1]


@pytest.mark.parametrize("pretrained", ["main", "0" * 40, "random"])
def test_specs_of_towers_on_the_hub_are_never_cached(settings, pretrained):
    assert cache_path(settings(model="hf:facebook/dinov2-small", pretrained=pretrained)) is None


# Specs that are not cached, and damaged ones


@pytest.mark.parametrize("name", ["laion/CLIP-ViT-B-32", "./hub/model", "a/b/c.pt"])
def test_specs_of_weights_that_their_owner_can_replace_are_never_cached(settings, spec, name):
    cache_spec(settings(pretrained=name), spec)
    assert not cached_files()
    assert cached_spec(settings(pretrained=name)) is None


def test_a_checkpoint_in_a_folder_is_no_hub_id(settings, spec):
    Path("some").mkdir()
    Path("some/weights").write_bytes(b"weights")
    given = settings(pretrained="some/weights")
    cache_spec(given, spec)
    assert cached_spec(given) == spec


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-20],
        lambda data: b"\xff\xfe" + data,
        lambda data: data.replace(b'"layer":-2', b'"layer":-1'),
        lambda data: data.replace(b"patchcache/1", b"patchcache/0"),
        lambda data: b"[" * 100_000,
    ],
    ids=["empty", "cut", "no text", "edited", "another format", "deep"],
)
def test_a_damaged_spec_is_replaced(usual, damage):
    spec = LazyEncoder(usual).spec
    [path] = cached_files()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert path.read_bytes() != whole
    assert cached_spec(usual) is None
    again = LazyEncoder(usual)
    assert again.spec == spec
    assert again.is_loaded
    assert [path] == cached_files()
    assert path.read_bytes() == whole


def test_an_encoder_of_another_spec_than_the_cached_one_stops_the_stage_once(usual, spec):
    cache_spec(usual, dataclasses.replace(spec, weights_sha256="0" * 64))
    encoder = LazyEncoder(usual)
    assert encoder.spec != spec
    with pytest.raises(StageError, match=r"random of .*other weights.*Run the same command again"):
        _ = encoder.encoder
    again = LazyEncoder(usual)
    assert again.spec == again.encoder.spec == spec
