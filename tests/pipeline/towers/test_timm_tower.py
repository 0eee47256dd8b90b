"""Convolutional networks of timm: the last map is the patches, pixels are those of timm."""

import io

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from timm.models import ConvNeXt, EfficientNet
from timm.models._efficientnet_builder import decode_arch_def
from timm.models._pretrained import PretrainedCfg
from timm.models._registry import _model_entrypoints, _model_pretrained_cfgs
from torch import nn

from cache import FeatureStore
from cache.errors import PatchcacheError, SettingsError
from pipeline.encoding.encoder import load_encoder
from pipeline.images.decode import decode_for
from pipeline.towers import timm_tower
from tests.pipeline.towers.laws import (
    assert_what_comes_with_an_image_does_not_matter,
    relative,
)
from workspace.errors import StageError

STAGES = [["ds_r1_k3_s2_e1_c8"], *[["ir_r1_k3_s2_e2_c8"]] * 3]

NETWORKS = {
    "small_convnext": lambda **options: ConvNeXt(
        depths=(1, 1, 1, 1), dims=(8, 8, 8, 12), **options
    ),
    "small_efficientnet": lambda **options: EfficientNet(
        decode_arch_def(STAGES), stem_size=8, num_features=24, **options
    ),
}
"""Networks that map 96 pixels to 3 x 3 places."""

WIDTHS = {"small_convnext": 12, "small_efficientnet": 24}

CFG = {
    "input_size": (3, 96, 96),
    "mean": (0.1, 0.2, 0.3),
    "std": (0.4, 0.5, 0.6),
    "crop_pct": 0.9,
    "interpolation": "bicubic",
}

CLASSIFIERS = {"small_convnext": "head.fc", "small_efficientnet": "classifier"}


@pytest.fixture
def register(monkeypatch):
    """Makes small networks known to timm, with facts about their weights under the tag "own"."""

    def make(**changes):
        for name, network in NETWORKS.items():

            def create(network=network, *, num_classes, **options):
                made = network(num_classes=num_classes)
                for parameter in made.parameters():
                    if parameter.ndim > 1:
                        nn.init.normal_(parameter, std=0.5)
                return made

            cfg = CFG | {"classifier": CLASSIFIERS[name], "hf_hub_id": "somebody/net"} | changes
            monkeypatch.setitem(_model_entrypoints, name, create)
            for full in (name, f"{name}.own"):
                monkeypatch.setitem(_model_pretrained_cfgs, full, PretrainedCfg(**cfg))
        monkeypatch.setattr(timm, "list_pretrained", lambda pattern: [pattern.replace("*", "own")])

    make()
    return make


@pytest.fixture
def tower(settings, register):
    def load(name="small_convnext", **changes):
        given = {"model": f"timm:{name}", "pretrained": "random", "layer": -1}
        return load_encoder(settings(**given | changes))

    return load


@pytest.fixture
def weights(tmp_path, register):
    """Writes weights of a network, with its classifier, and returns their path and the network."""

    def write(name):
        torch.manual_seed(5)
        network = timm.create_model(name, num_classes=7).eval()
        path = tmp_path / f"{name}.safetensors"
        save_file(network.state_dict(), path)
        return path, network

    return write


def random_pixels(num_images, side=96):
    """Images of 6 x 6 fields in random colours."""
    rng = np.random.default_rng(0)
    fields = rng.integers(0, 256, (num_images, 6, 6, 3), dtype=np.uint8)
    return torch.from_numpy(fields.repeat(side // 6, axis=1).repeat(side // 6, axis=2))


def last_map(network, spec, pixels):
    mean, std = torch.tensor(spec.mean), torch.tensor(spec.std)
    x = ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.inference_mode():
        return network.forward_features(x)


# What the features are


@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_the_places_of_the_last_map_row_by_row(tower, weights, name):
    path, network = weights(name)
    encoder = tower(name, pretrained=str(path))
    pixels = random_pixels(2)
    wanted = last_map(network, encoder.spec, pixels)
    assert wanted.shape == (2, WIDTHS[name], 3, 3)
    found = encoder.encode(pixels)
    assert (encoder.spec.tokens, encoder.spec.patches) == ("grid", 9)
    for row in range(3):
        for column in range(3):
            place = found[:, 3 * row + column]
            np.testing.assert_array_equal(place, wanted[:, :, row, column].half())
    assert relative(found[:, 1], found[:, 3]) > 1e-2


@pytest.mark.parametrize("name", NETWORKS)
def test_what_comes_with_an_image_does_not_matter(tower, name):
    encoder = tower(name)
    assert_what_comes_with_an_image_does_not_matter(encoder, random_pixels(3))


@pytest.mark.parametrize("name", NETWORKS)
def test_bf16_is_near_fp32(tower, name):
    fp32, bf16 = tower(name), tower(name, precision="bf16")
    pixels = random_pixels(2)
    assert 1e-4 < relative(bf16.encode(pixels), fp32.encode(pixels)) < 5e-2


@pytest.mark.parametrize("name", NETWORKS)
def test_the_classifier_is_not_in_the_hash(tower, weights, name):
    path, network = weights(name)
    first = tower(name, pretrained=str(path)).spec
    others = {
        key: tensor[:3] + 1 if key.startswith(CLASSIFIERS[name]) else tensor
        for key, tensor in network.state_dict().items()
    }
    assert any(len(tensor) == 3 for tensor in others.values() if tensor.ndim)
    save_file({key: tensor.contiguous() for key, tensor in others.items()}, path)
    assert tower(name, pretrained=str(path)).spec == first
    assert tower(name).spec.weights_sha256 != first.weights_sha256


def test_a_tag_is_fetched_from_the_hub_as_safetensors(tower, weights, monkeypatch):
    path, _ = weights("small_convnext")
    asked = []
    monkeypatch.setattr("pipeline.towers.hub.hub_failure", lambda: "")
    monkeypatch.setattr(
        timm_tower, "hf_hub_download", lambda *names, **options: asked.append(names) or str(path)
    )
    assert tower(pretrained="own").spec == tower(pretrained=str(path)).spec
    assert asked == [("somebody/net", "model.safetensors")]


# The pixels


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("crop_pct", [1.0, 0.9, 0.875])
def test_pixels_are_those_of_timm(tower, register, jpeg, crop_mode, crop_pct, interpolation):
    register(crop_mode=crop_mode, crop_pct=crop_pct, interpolation=interpolation)
    spec = tower().spec
    transform = create_transform(
        **resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg("small_convnext").to_dict())
    )
    for seed, size in enumerate([(640, 427), (427, 640), (130, 97), (50, 60)]):
        data = jpeg(seed, size)
        found = (decode_for(data, spec) / np.float32(255) - spec.mean) / spec.std
        wanted = transform(Image.open(io.BytesIO(data))).permute(1, 2, 0)
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_the_spec_has_the_numbers_of_the_tag(tower):
    spec = tower().spec
    assert spec.model == "timm:small_convnext"
    assert (spec.image_size, spec.resize, spec.crop) == (96, "shortest-106", "center")
    assert (spec.mean, spec.std, spec.activation) == (CFG["mean"], CFG["std"], "own")


def test_networks_of_timm_itself_have_a_last_map(settings):
    """At full size, without their weights: what docs and error texts name."""
    for name, width in {"efficientnet_b0": 1280, "convnext_atto": 320}.items():
        given = settings(model=f"timm:{name}", pretrained="random", layer=-1)
        spec = load_encoder(given).spec
        assert (spec.image_size, spec.patches, spec.width) == (224, 49, width)


# What is refused


def refused(load, error=PatchcacheError):
    with pytest.raises(error) as caught:
        load()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("layer", [-2, -5])
def test_only_the_last_map_is_taken(tower, layer):
    text = refused(lambda: tower(layer=layer), SettingsError)
    assert text.startswith("encoder.layer: ")
    assert "Set encoder.layer to -1" in text


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_a_network_without_a_last_map_is_refused(settings, name):
    given = settings(model=f"timm:{name}", pretrained="random", layer=-1)
    text = refused(lambda: load_encoder(given), SettingsError)
    assert f"timm:{name} is no convolutional network" in text


@pytest.mark.parametrize("name", ["nothing", "", "efficientnet_b0.ra_in1k", "hf-hub:some/model"])
def test_an_unknown_network_is_refused(settings, name):
    given = settings(model=f"timm:{name}", pretrained="random", layer=-1)
    assert "encoder.model: timm " in refused(lambda: load_encoder(given), SettingsError)


@pytest.mark.parametrize("pretrained", ["openai", "some/net", "weights.pth"])
def test_an_unknown_tag_is_refused_with_those_that_exist(tower, pretrained):
    text = refused(lambda: tower(pretrained=pretrained), SettingsError)
    assert text.startswith(f"encoder.pretrained: {pretrained!r} is no tag")
    assert "Tags: own." in text


@pytest.mark.parametrize("content", [None, b"", b"garbage" * 99])
def test_a_damaged_file_is_refused(tower, tmp_path, content):
    path = tmp_path / "weights.safetensors"
    if content is not None:
        path.write_bytes(content)
    text = refused(lambda: tower(pretrained=str(path)), StageError)
    assert f"cannot load {str(path)!r} into timm:small_convnext" in text


def test_weights_of_another_network_are_refused(tower, weights):
    path, _ = weights("small_efficientnet")
    assert "cannot load" in refused(lambda: tower(pretrained=str(path)), StageError)


def test_a_tag_that_is_not_on_the_hub_is_refused(tower, register):
    register(hf_hub_id=None)
    text = refused(lambda: tower(pretrained="own"), StageError)
    assert "not on the model hub" in text


def test_without_a_network_the_error_says_so(tower, monkeypatch, tmp_path):
    monkeypatch.setattr("pipeline.towers.hub.hub_failure", lambda: "no network")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    text = refused(lambda: tower(pretrained="own"), StageError)
    assert "hub cannot be reached (no network)" in text


@pytest.mark.parametrize("change", [{"interpolation": "random"}, {"crop_mode": "border"}], ids=str)
def test_pixels_that_cannot_be_made_are_refused(tower, register, change):
    register(**change)
    assert "wants images resized by" in refused(tower, SettingsError)


def test_an_image_that_is_not_square_is_refused(tower, register):
    register(input_size=(3, 96, 64))
    assert "96 x 64, wanted a square" in refused(tower, SettingsError)


# The stage


def test_the_stage_encodes_with_a_network_of_timm(make_workspace, tower, weights):
    path, _ = weights("small_efficientnet")
    encoder = {"model": "timm:small_efficientnet", "pretrained": str(path), "layer": -1}
    workspace = make_workspace(image_ids=range(1, 9), encoder=encoder)
    workspace.run()
    store = FeatureStore(workspace.features)
    assert store.spec == tower("small_efficientnet", pretrained=str(path), batch_size=3).spec
    before = workspace.store_bytes()
    assert workspace.run()["shards_encoded"] == 0
    assert workspace.store_bytes() == before
