"""Towers of transformers: their hidden states and pixels are ours, and what is refused."""

import io
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file

from cache import FeatureStore
from cache.errors import SettingsError
from pipeline import extract as extract_module
from pipeline.encoding.encoder import load_encoder
from pipeline.images.decode import decode_for
from pipeline.towers import transformers_tower
from pipeline.towers.transformers_tower import PREFIX_TOKENS, blocks_of
from tests.pipeline.towers.conftest import BLOCKS, KINDS, WIDTH
from tests.pipeline.towers.laws import (
    assert_patches_run_row_by_row_from_the_top_left,
    assert_what_comes_with_an_image_does_not_matter,
    random_pixels,
    relative,
)


@pytest.fixture
def tower(settings, checkpoints):
    """Loads the tower of a kind, or of a folder."""

    def load(kind=None, folder=None, **changes):
        model = f"hf:{folder or checkpoints(kind)}"
        return load_encoder(settings(**{"model": model, "pretrained": "main"} | changes))

    return load


@pytest.fixture
def copied(checkpoints, tmp_path):
    """Makes a copy of a checkpoint that a test may change."""

    def make(kind):
        folder = tmp_path / kind
        shutil.copytree(checkpoints(kind), folder)
        return folder

    return make


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(tower, folder, **changes):
    with pytest.raises(SettingsError, match=r"^encoder\.") as caught:
        tower(folder=folder, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def normalised(encoder, pixels):
    mean, std = torch.tensor(encoder.spec.mean), torch.tensor(encoder.spec.std)
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def vision_model(kind, folder, **options):
    """The vision model as a user of transformers would load it."""
    return getattr(transformers, KINDS[kind].model).from_pretrained(folder, **options).eval()


def hidden_states(model, x):
    with torch.inference_mode():
        return model(pixel_values=x, output_hidden_states=True).hidden_states


# What the features are


def test_every_family_is_tried():
    types = [getattr(transformers, kind.model).config_class.model_type for kind in KINDS.values()]
    assert {name.removesuffix("_vision_model") for name in types} == PREFIX_TOKENS.keys()


@pytest.mark.parametrize("layer", [-1, -2, -3])
@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_hidden_states_without_the_prefix_tokens(tower, checkpoints, kind, layer):
    encoder = tower(kind, layer=layer)
    pixels = random_pixels(encoder, 3)
    states = hidden_states(vision_model(kind, checkpoints(kind)), normalised(encoder, pixels))
    assert len(states) == BLOCKS + 1
    wanted = states[layer][:, KINDS[kind].prefix :]
    assert wanted.shape == (3, KINDS[kind].side ** 2, WIDTH)
    np.testing.assert_array_equal(encoder.encode(pixels), wanted.half().numpy())
    # The law would say nothing if neighbouring blocks gave the same.
    assert relative(states[layer - 1][:, KINDS[kind].prefix :], wanted) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_end_up_as_transformers_hidden_states(tower, checkpoints, jpeg, kind):
    """From the file of a picture to its features, each by its own code."""
    encoder = tower(kind)
    files = [jpeg(1, (61, 40)), jpeg(2, (40, 61)), jpeg(3, (31, 33))]
    pixels = torch.from_numpy(np.stack([decode_for(data, encoder.spec) for data in files]))
    processor = transformers.AutoImageProcessor.from_pretrained(checkpoints(kind), backend="pil")
    images = [Image.open(io.BytesIO(data)) for data in files]
    theirs = processor(images=images, return_tensors="pt")["pixel_values"]
    model = vision_model(kind, checkpoints(kind))
    wanted = hidden_states(model, theirs)[-2][:, KINDS[kind].prefix :]
    # DINOv3's processor does not round to whole gray levels.
    tolerance = 2e-2 if kind == "dinov3" else 1e-3
    assert relative(encoder.encode(pixels), wanted) < tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_patches_run_row_by_row_from_the_top_left(tower, kind):
    encoder = tower(kind)
    assert_patches_run_row_by_row_from_the_top_left(
        encoder, blocks_of(encoder._visual.model)[0], 4, KINDS[kind].prefix
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_with_an_image_does_not_matter(tower, kind):
    encoder = tower(kind)
    assert_what_comes_with_an_image_does_not_matter(encoder, random_pixels(encoder, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_near_fp32_and_that_of_transformers(tower, checkpoints, kind):
    fp32, bf16 = tower(kind), tower(kind, precision="bf16")
    pixels = random_pixels(fp32, 2)
    assert 1e-4 < relative(bf16.encode(pixels), fp32.encode(pixels)) < 5e-2
    model = vision_model(kind, checkpoints(kind), dtype=torch.bfloat16)
    states = hidden_states(model, normalised(fp32, pixels).bfloat16())
    wanted = states[-2][:, KINDS[kind].prefix :]
    np.testing.assert_array_equal(bf16.encode(pixels), wanted.half().numpy())
    assert bf16.spec.weights_sha256 == fp32.spec.weights_sha256


# The spec


@pytest.mark.parametrize("kind", KINDS)
def test_the_spec_describes_the_features(tower, kind):
    spec = tower(kind).spec
    name = getattr(transformers, KINDS[kind].model).config_class.model_type
    assert spec.model.startswith(f"hf:{name.removesuffix('_vision_model')}-")
    assert (spec.tokens, spec.normalized, spec.layer) == ("patch", False, -2)
    assert (spec.patches, spec.width) == (KINDS[kind].side ** 2, WIDTH)
    assert spec.activation == KINDS[kind].activation


def test_the_numbers_are_those_of_the_processor(tower):
    spec = tower("dinov2").spec
    processor = transformers.BitImageProcessorPil()
    assert (spec.mean, spec.std) == (tuple(processor.image_mean), tuple(processor.image_std))
    found = spec.image_size, spec.resize, spec.crop, spec.interpolation
    assert found == (32, "shortest-37", "center_floor", "bicubic")
    spec = tower("dinov3").spec
    found = spec.image_size, spec.resize, spec.crop, spec.interpolation
    assert found == (32, "squash", "center", "bilinear")


def test_the_same_weights_have_the_same_fingerprint_wherever_they_are(tower, copied):
    folder = copied("clip-whole")
    elsewhere = folder.parent / "vision-alone"
    vision_model("clip-whole", folder).save_pretrained(elsewhere)
    shutil.copy(folder / "preprocessor_config.json", elsewhere)
    assert tower(folder=elsewhere).spec == tower(folder=folder).spec


def test_weights_of_half_precision_are_loaded_in_float32(tower, copied):
    folder = copied("siglip")
    whole = tower(folder=folder).spec
    weights = {n: t.bfloat16() for n, t in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    edit(folder / "config.json", dtype="bfloat16")
    rounded = tower(folder=folder)
    assert {parameter.dtype for parameter in rounded._visual.parameters()} == {torch.float32}
    assert rounded.spec.weights_sha256 != whole.weights_sha256


@pytest.mark.parametrize(
    ("kind", "entries"),
    [
        ("clip", {"num_attention_heads": 4}),
        ("clip", {"hidden_act": "gelu"}),
        ("siglip", {"layer_norm_eps": 0.1}),
        ("dinov3", {"rope_theta": 7.0}),
        ("aimv2", {"rms_norm_eps": 0.1}),
    ],
    ids=str,
)
def test_a_config_entry_that_no_tensor_shows_is_in_the_spec(tower, copied, kind, entries):
    folder = copied(kind)
    before = tower(folder=folder)
    edit(folder / "config.json", **entries)
    after = tower(folder=folder)
    assert after.spec.weights_sha256 == before.spec.weights_sha256
    assert after.spec.model != before.spec.model
    pixels = random_pixels(before, 2)
    assert relative(after.encode(pixels), before.encode(pixels)) > 1e-4


def test_weights_in_several_files_are_loaded(tower, copied):
    folder = copied("dinov2")
    before = tower(folder=folder).spec
    model = vision_model("dinov2", folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert tower(folder=folder).spec == before


def test_the_weights_are_the_same_whatever_the_layer(tower):
    first, second = (tower("dinov2", layer=layer) for layer in (-1, -3))
    assert first.spec.weights_sha256 == second.spec.weights_sha256
    assert len(blocks_of(second._visual.model)) == 1


def test_random_weights_are_the_same_each_time_and_need_no_file(tower, copied):
    folder = copied("dinov3")
    (folder / "model.safetensors").unlink()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = (tower(folder=folder, pretrained="random") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.spec == second.spec
    pixels = random_pixels(first, 2)
    assert first.encode(pixels).tobytes() == second.encode(pixels).tobytes()


def test_loading_prints_nothing(tower, checkpoints, capfd, monkeypatch):
    checkpoints("clip-whole"), checkpoints("dinov3")
    capfd.readouterr()
    # Pytest's own stderr goes past the file descriptor.
    monkeypatch.setattr(sys, "stderr", os.fdopen(2, "w", closefd=False))
    tower("dinov3")
    tower("clip-whole")
    assert capfd.readouterr() == ("", "")


# What is refused


@pytest.mark.parametrize("model_type", ["vit", "siglip2", "dinov3_convnext", "phi", 5, None])
def test_an_unknown_family_is_refused_by_name_before_any_image_is_read(
    make_workspace, copied, monkeypatch, model_type
):
    folder = copied("clip")
    edit(folder / "config.json", model_type=model_type)
    workspace = make_workspace(encoder={"model": f"hf:{folder}", "pretrained": "main"})
    monkeypatch.setattr(extract_module, "open_images", lambda *a: pytest.fail("went on"))
    with pytest.raises(SettingsError, match=r"encoder.model: .*model_type is ") as caught:
        workspace.run()
    text = str(caught.value)
    assert repr(model_type) in text
    assert all(family in text for family in PREFIX_TOKENS)
    assert ("NaFlex" in text) == (model_type == "siglip2")


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ({"num_hidden_layers": 10**6}, "wanted at most 10000"),
        ({"num_hidden_layers": 900}, "more layers than the files hold weights for"),
        ({"hidden_size": 4096}, "cannot load"),
        ({"hidden_size": "wide"}, "cannot load"),
        ({"_attn_implementation": "somebody/kernel"}, "_attn_implementation"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantised"),
        ({"transformers_weights": "x.safetensors"}, "transformers_weights"),
        ({"patch_size": 0}, "cannot load"),
        ({"layer_norm_eps": float("inf")}, "layer_norm_eps is inf, wanted a finite number"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan, wanted a finite number"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_is_refused(tower, copied, entries, why):
    folder = copied("siglip")
    edit(folder / "config.json", **entries)
    text = refusal(tower, folder)
    assert "config.json" in text
    assert why in text


@pytest.mark.parametrize(
    "entries",
    [{"num_attention_heads": 0}, {"hidden_act": "x"}, {"hidden_size": -1}, {"patch_size": "x"}],
    ids=str,
)
def test_a_config_that_cannot_be_is_refused_of_a_random_tower_too(tower, copied, entries):
    folder = copied("dinov2")
    edit(folder / "config.json", **entries)
    assert "config.json" in refusal(tower, folder, pretrained="random")


def test_weights_without_their_scales_are_refused(tower, copied):
    folder = copied("dinov2")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith(".weight"))
    weights[name] = (100 * weights[name]).to(torch.int8)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert f"model.safetensors: {name} is of type I8" in refusal(tower, folder)


def test_a_network_that_fails_in_any_way_is_refused(tower, checkpoints, monkeypatch):
    def fail(*arguments):
        raise KeyError("x")

    monkeypatch.setattr(transformers_tower.BlockEncoder, "forward", fail)
    text = refusal(tower, checkpoints("clip"))
    assert "cannot encode an image of 32 x 32 pixels: KeyError" in text


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"[]", b"garbage" * 99])
def test_a_missing_or_damaged_file_is_refused_by_name(tower, copied, name, content):
    folder = copied("dinov2")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    assert name in refusal(tower, folder)


def test_weights_that_are_pickled_are_not_loaded(tower, copied):
    folder = copied("clip")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "model.safetensors: no such file" in refusal(tower, folder)


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tower, copied):
    folder = copied("clip")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "layers.1" in name)
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "it lacks " in (text := refusal(tower, folder))
    assert "layers.1" in text


def test_code_beside_a_checkpoint_is_not_run(tower, copied):
    folder = copied("clip")
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    auto = {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoImageProcessor": "evil.P"}
    edit(folder / "config.json", auto_map=auto)
    edit(folder / "preprocessor_config.json", auto_map=auto)
    assert tower(folder=folder).spec == tower("clip").spec
    edit(folder / "preprocessor_config.json", image_processor_type="MyImageProcessor")
    assert "preprocessor_config.json" in refusal(tower, folder)


def test_a_missing_layer_is_refused(tower, checkpoints):
    text = refusal(tower, checkpoints("dinov2"), layer=-4)
    assert "encoder.layer" in text
    assert "no block -4 (it has 3)" in text


def test_a_processor_of_another_size_than_the_model_is_refused(tower, copied):
    folder = copied("siglip")
    edit(folder / "preprocessor_config.json", size={"height": 48, "width": 48})
    assert "cannot encode an image of 48 x 48" in refusal(tower, folder)


@pytest.mark.parametrize("pretrained", ["openai", "0" * 40])
def test_a_folder_has_no_other_revision(tower, checkpoints, pretrained):
    text = refusal(tower, checkpoints("clip"), pretrained=pretrained)
    assert text.startswith("encoder.pretrained: ")
    assert "main" in text


# The hub


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """A machine that reaches no hub; returns the folder that is its cache of one repository."""
    monkeypatch.setattr("pipeline.towers.hub.hub_failure", lambda: "no network")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub/models--somebody--some-tower"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    return repository


def test_without_a_network_the_cached_revision_is_loaded(settings, tower, checkpoints, no_network):
    shutil.copytree(checkpoints("clip"), no_network / "snapshots" / ("0" * 40))
    shutil.copytree(checkpoints("siglip"), no_network / "snapshots" / ("1" * 40))
    for revision, kind in {"main": "clip", "0" * 40: "clip", "1" * 40: "siglip"}.items():
        given = settings(model="hf:somebody/some-tower", pretrained=revision)
        assert load_encoder(given).spec == tower(kind).spec


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("model", ["somebody/some-tower", "somebody/other", "no/hub/id", ""])
@pytest.mark.parametrize("pretrained", ["v2", "random"])
def test_without_a_network_the_error_is_one_line(settings, model, pretrained, capfd):
    with pytest.raises(SettingsError, match=r"encoder.model: cannot load 'hf:") as caught:
        load_encoder(settings(model=f"hf:{model}", pretrained=pretrained))
    assert "\n" not in str(caught.value)
    if model.startswith("somebody"):
        assert "hub cannot be reached (no network)" in str(caught.value)
    assert capfd.readouterr() == ("", "")


# The stage


def test_the_stage_encodes_with_a_tower_of_transformers(make_workspace, copied, tower):
    folder = copied("dinov2-registers")
    workspace = make_workspace(
        image_ids=range(1, 9), encoder={"model": f"hf:{folder}", "pretrained": "main"}
    )
    workspace.run()
    store = FeatureStore(workspace.features)
    encoder = tower(folder=folder, batch_size=3)
    assert store.spec == encoder.spec
    pixels = [decode_for(workspace.images[n], store.spec) for n in range(1, 9)]
    features = encoder.encode(torch.from_numpy(np.stack(pixels)))
    assert relative(store.gather(range(1, 9)), features) < 1e-3
    before = workspace.store_bytes()
    assert workspace.run()["shards_encoded"] == 0
    assert workspace.store_bytes() == before
