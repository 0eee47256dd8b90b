"""What is remembered of a tower holds as long as nothing that decides it has changed."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from pipeline.encoding import encoder as encoder_module
from pipeline.encoding import lazy_encoder as module
from pipeline.encoding.encoder import load_encoder
from pipeline.encoding.lazy_encoder import SPECS, Tower, recall, remember
from pipeline.encoding.versions import LIBRARIES
from pipeline.settings import EncoderSettings
from workspace.errors import StageError

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
    """A copy of the modules that decide what a feature is, which the key is made of from now on."""
    copies = folder / "code"
    copies.mkdir()
    for name in module.CODE:
        (copies / name).parent.mkdir(exist_ok=True)
        shutil.copy(Path(module.__file__).parents[1] / name, copies / name)
    monkeypatch.setattr(module, "__file__", str(copies / "encoding/lazy_encoder.py"))
    return copies


def kept():
    return sorted(SPECS.iterdir()) if SPECS.exists() else []


# What is remembered


def test_the_remembered_spec_is_that_of_the_loaded_encoder(usual):
    first = Tower(usual)
    assert first.spec == first.encoder.spec == load_encoder(usual).spec
    again = Tower(usual)
    assert again.spec == first.spec
    assert not again.is_loaded


def test_a_tower_is_loaded_when_its_encoder_is_asked_for_and_not_before(usual, monkeypatch):
    loads = []
    real = encoder_module.load_encoder
    monkeypatch.setattr(encoder_module, "load_encoder", lambda s: loads.append(s) or real(s))
    tower = Tower(usual)
    assert not tower.is_loaded
    assert tower.spec
    assert tower.is_loaded
    assert tower.encoder is tower.encoder
    assert loads == [usual]
    again = Tower(usual)
    assert again.spec
    assert not again.is_loaded
    assert again.encoder
    assert again.is_loaded
    assert loads == [usual, usual]


def test_where_nothing_is_remembered_there_is_no_spec(usual):
    assert recall(usual) is None
    assert not SPECS.exists()


def test_the_device_is_forgotten(usual, spec):
    remember(usual, spec)
    assert recall(dataclasses.replace(usual, device="cuda:7")) == spec


# What makes it forgotten


def test_every_setting_but_the_device_has_another_value_here():
    assert OTHER.keys() | {"device"} == {f.name for f in dataclasses.fields(EncoderSettings)}


@pytest.mark.parametrize("name", OTHER)
def test_of_other_settings_nothing_is_remembered(usual, spec, name):
    remember(usual, spec)
    other = dataclasses.replace(usual, **{name: OTHER[name]})
    assert recall(other) is None
    remember(other, dataclasses.replace(spec, weights_sha256="0" * 64))
    assert recall(usual) == spec


def test_another_architecture_under_the_same_name_is_not_remembered(usual, spec, tiny):
    remember(usual, spec)
    tiny["vision_cfg"]["layers"] += 1
    Path(usual.model).write_text(json.dumps(tiny))
    assert recall(usual) is None
    assert Tower(usual).spec != spec


def test_other_weights_under_the_same_name_are_not_remembered(settings, usual):
    visual = load_encoder(usual)._visual
    state = {f"visual.{name}": tensor for name, tensor in visual.state_dict().items()}
    weights = Path("weights.pt")
    torch.save(state, weights)
    given = settings(pretrained="weights.pt")
    remember(given, spec := load_encoder(usual).spec)
    assert recall(given) == spec
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    assert recall(given) is None
    weights.unlink()
    assert recall(given) is None


@pytest.mark.parametrize("library", [*LIBRARIES, "libjpeg_turbo"])
def test_with_another_library_nothing_is_remembered(usual, spec, library, monkeypatch):
    remember(usual, spec)
    versions = module.library_versions()
    assert library in versions
    monkeypatch.setattr(module, "library_versions", lambda: versions | {library: "0.0.1"})
    assert recall(usual) is None


def test_in_another_format_nothing_is_remembered(usual, spec, monkeypatch):
    remember(usual, spec)
    monkeypatch.setattr(module, "FORMAT", "patchcache/2")
    assert recall(usual) is None


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("encoder.py", ".float() / 255", ".float() / 256"),
        ("encoder.py", "PREPROCESS_VERSION = 1", "PREPROCESS_VERSION = 2"),
        ("encoder.py", "normalize_intermediates=False", "normalize_intermediates=True"),
        ("decode.py", 'image.convert("RGB")', 'image.convert("RGB").copy()'),
    ],
)
def test_after_a_change_of_the_code_nothing_is_remembered(usual, spec, code, name, before, after):
    remember(usual, spec)
    assert recall(usual) == spec
    text = (code / name).read_text()
    assert before in text
    (code / name).write_text(text.replace(before, after))
    assert recall(usual) is None


def test_comments_blank_lines_and_layout_of_the_code_do_not_matter(usual, spec, code):
    remember(usual, spec)
    for path in code.iterdir():
        text = path.read_text()
        assert "\n\n\ndef " in text
        text = text.replace("\n\n\ndef ", "\n# New.\n\n\n\n\ndef ")
        path.write_text(f"# First.\n\n{text}\n\n# Last.\n")
    assert recall(usual) == spec


# What is never remembered, and what is made anew


@pytest.mark.parametrize("name", ["laion/CLIP-ViT-B-32", "./hub/model", "a/b/c.pt"])
def test_weights_that_their_owner_can_replace_are_never_remembered(settings, spec, name):
    remember(settings(pretrained=name), spec)
    assert not kept()
    assert recall(settings(pretrained=name)) is None


def test_a_checkpoint_in_a_folder_is_no_hub_id(settings, spec):
    Path("some").mkdir()
    Path("some/weights").write_bytes(b"weights")
    given = settings(pretrained="some/weights")
    remember(given, spec)
    assert recall(given) == spec


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
def test_a_damaged_spec_is_made_anew(usual, damage):
    spec = Tower(usual).spec
    [path] = kept()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert path.read_bytes() != whole
    assert recall(usual) is None
    again = Tower(usual)
    assert again.spec == spec
    assert again.is_loaded
    assert [path] == kept()
    assert path.read_bytes() == whole


def test_a_tower_that_is_not_the_remembered_one_stops_the_stage_once(usual, spec):
    remember(usual, dataclasses.replace(spec, weights_sha256="0" * 64))
    tower = Tower(usual)
    assert tower.spec != spec
    with pytest.raises(StageError, match=r"random of .*other weights.*Run the same command again"):
        _ = tower.encoder
    again = Tower(usual)
    assert again.spec == again.encoder.spec == spec
