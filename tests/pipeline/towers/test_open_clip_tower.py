"""Every kind of open_clip tower, at small width: its patch tokens, or why it has none."""

import json
from functools import partial

import numpy as np
import open_clip
import pytest
import torch
from open_clip.constants import INCEPTION_MEAN, INCEPTION_STD
from open_clip.pretrained import _PRETRAINED
from safetensors.torch import save_file
from timm.layers import HybridEmbed
from timm.models import ConvNeXt, Eva, ResNet, SwinTransformer, VisionTransformer
from timm.models._registry import _model_entrypoints
from timm.models.resnet import BasicBlock
from timm.models.vision_transformer_hybrid import ConvStem
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import nn

from cache import FeatureStore
from cache.errors import SettingsError
from pipeline.encoding.encoder import load_encoder
from pipeline.images.decode import decode_rgb
from tests.pipeline.towers.laws import (
    assert_patches_run_row_by_row_from_the_top_left,
    assert_what_comes_with_an_image_does_not_matter,
    random_pixels,
    relative,
)

WIDTH = 32

TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}

PLAIN = {"image_size": 32, "patch_size": 8, "width": WIDTH, "head_width": 16, "layers": 3}

LARGE = open_clip.get_model_config("ViT-L-14-336-quickgelu")["vision_cfg"]

OWN = {
    "plain": {},
    "large-336": {key: LARGE[key] for key in ("image_size", "patch_size")},
    "coca": {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    "clipa": {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
    "patch-dropout": {"patch_dropout": 0.5},
    "layer-scale": {"ls_init_value": 0.1},
    "custom-block": {"qk_norm": True, "scale_attn": True, "scale_fc": True},
    "fixed-positions": {"pos_embed_type": "sin_cos_2d"},
    "uneven": {"image_size": 35},
}
"""Towers of open_clip's own class: kind to what differs from `PLAIN`."""

TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "num_heads": 2, "depth": 3}

ROTARY = TIMM | {"use_rot_pos_emb": True, "ref_feat_shape": (4, 4)}


def conv_stem(**options):
    """As in MobileCLIP-B: the patches come from three convolutions."""
    stem = ConvStem(channels=(8, 16, WIDTH), stride=(2, 2, 2), kernel_size=2, padding=0)
    embed = partial(HybridEmbed, backbone=stem, proj=False)
    return VisionTransformer(**TIMM | {"patch_size": 1}, embed_layer=embed, **options)


THROUGH_TIMM = {
    "siglip": partial(VisionTransformer, **TIMM, class_token=False),
    "class-token": partial(VisionTransformer, **TIMM),
    "registers": partial(VisionTransformer, **TIMM, reg_tokens=4, no_embed_class=True),
    "registers-alone": partial(VisionTransformer, **TIMM, class_token=False, reg_tokens=2),
    "eva": partial(Eva, **ROTARY, swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True),
    "perception": partial(Eva, **ROTARY, attn_type="rope", use_pre_transformer_norm=True),
    "relative-positions": partial(VisionTransformerRelPos, **TIMM, class_token=True),
    "conv-stem": conv_stem,
}
"""Towers of timm's classes."""

CONVOLUTIONAL = {
    "convnext": partial(ConvNeXt, depths=(1, 1, 1, 1), dims=(8, 8, 8, 12)),
    "resnet": partial(ResNet, BasicBlock, (1, 1, 1, 1), channels=(8, 8, 8, 12), stem_width=8),
}

WITHOUT_PATCHES = {
    "swin": partial(
        SwinTransformer, img_size=32, patch_size=2, embed_dim=8, depths=(1, 1), num_heads=(1, 1)
    ),
}

KINDS = [*OWN, *THROUGH_TIMM]

SIDE = dict.fromkeys(KINDS, 4) | {"large-336": 24}
"""Patches in a row."""

PREFIX = dict.fromkeys(KINDS, 1) | {"siglip": 0, "registers": 5, "registers-alone": 2}
"""Tokens before the patches."""

POOL = dict.fromkeys(THROUGH_TIMM, "token") | {"siglip": "map", "registers-alone": "map"}
"""Never the mean, for which timm leaves out the final norm."""

SIGLIP_TAG = {
    "mean": INCEPTION_MEAN,
    "std": INCEPTION_STD,
    "interpolation": "bicubic",
    "resize_mode": "squash",
}


def config(kind, vision):
    if kind in OWN:
        vision = PLAIN | OWN[kind] | vision
    else:
        pool = {"timm_pool": POOL.get(kind, "avg"), "timm_proj": "none"}
        vision = {"image_size": 32} | pool | vision
        vision["timm_model_name"] = f"small_{kind}"
    top = {"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": TEXT}
    if kind == "coca":
        top |= {"custom_text": True, "multimodal_cfg": TEXT}
    return top


@pytest.fixture
def model(tmp_path, monkeypatch):
    """Writes the config of a small tower and returns its path; timm learns of its trunk."""
    for kind, trunk in (THROUGH_TIMM | CONVOLUTIONAL | WITHOUT_PATCHES).items():

        def create(trunk=trunk, *, num_classes, global_pool, **options):
            made = trunk(num_classes=num_classes, global_pool=global_pool)
            # New blocks of timm change their input by next to nothing.
            for block_weights in getattr(made, "blocks", nn.Module()).parameters():
                nn.init.normal_(block_weights, std=0.3)
            return made

        monkeypatch.setitem(_model_entrypoints, f"small_{kind}", create)

    def write(kind, **vision):
        path = tmp_path / f"small-{kind}.json"
        path.write_text(json.dumps(config(kind, vision)))
        return str(path)

    return write


@pytest.fixture
def tag(tmp_path, monkeypatch):
    """Gives a small tower weights under an open_clip tag, with a preprocess of their own."""

    def make(path, **preprocess):
        open_clip.add_model_config(path)
        name = path.rsplit("/", 1)[1].removesuffix(".json")
        weights = open_clip.create_model(name).state_dict()
        save_file({key: t.contiguous() for key, t in weights.items()}, tmp_path / "a.safetensors")
        cfg = SIGLIP_TAG | preprocess | {"file": str(tmp_path / "a.safetensors")}
        monkeypatch.setitem(_PRETRAINED, name, {"webli": cfg})
        return "webli"

    return make


def normalised(encoder, pixels):
    mean, std = torch.tensor(encoder.spec.mean), torch.tensor(encoder.spec.std)
    return ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)


def blocks_of(visual):
    return visual.trunk.blocks if hasattr(visual, "trunk") else visual.transformer.resblocks


def embed_of(visual):
    return visual.trunk.patch_embed if hasattr(visual, "trunk") else visual.conv1


# What the features are


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_patch_tokens_of_a_block_alone(settings, model, kind, layer):
    encoder = load_encoder(settings(model=model(kind), layer=layer))
    pixels = random_pixels(encoder, 3)
    outputs = []
    for block in blocks_of(encoder._visual):
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.inference_mode():
        encoder._visual(normalised(encoder, pixels))
    assert len(outputs) == 3
    before, wanted = (outputs[n][:, PREFIX[kind] :] for n in (layer - 1, layer))
    assert wanted.shape == (3, SIDE[kind] ** 2, WIDTH)
    assert relative(encoder.encode(pixels), wanted) < 1e-3
    # The law would say nothing if neighbouring blocks gave the same.
    assert relative(before, wanted) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_patches_run_row_by_row_from_the_top_left(settings, model, kind):
    encoder = load_encoder(settings(model=model(kind)))
    assert_patches_run_row_by_row_from_the_top_left(
        encoder, blocks_of(encoder._visual)[0], SIDE[kind], PREFIX[kind]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_with_an_image_does_not_matter(settings, model, kind):
    encoder = load_encoder(settings(model=model(kind)))
    assert_what_comes_with_an_image_does_not_matter(encoder, random_pixels(encoder, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_near_fp32(settings, model, kind):
    fp32 = load_encoder(settings(model=model(kind)))
    bf16 = load_encoder(settings(model=model(kind), precision="bf16"))
    pixels = random_pixels(fp32, 2)
    assert 1e-4 < relative(bf16.encode(pixels), fp32.encode(pixels)) < 3e-2


@pytest.mark.parametrize("kind", KINDS)
def test_the_spec_has_the_number_of_patches_and_their_width(settings, model, kind):
    spec = load_encoder(settings(model=model(kind))).spec
    assert (spec.patches, spec.width) == (SIDE[kind] ** 2, WIDTH)
    if kind == "large-336":
        assert (spec.image_size, spec.patches) == (336, 576)


# Convolutional towers


@pytest.mark.parametrize("kind", CONVOLUTIONAL)
def test_the_patches_of_a_convolutional_tower_are_its_last_map(settings, model, kind):
    encoder = load_encoder(settings(model=model(kind, image_size=96), layer=-1))
    pixels = random_pixels(encoder, 2)
    with torch.inference_mode():
        wanted = encoder._visual.trunk.forward_features(normalised(encoder, pixels))
    assert wanted.shape == (2, 12, 3, 3)
    found = encoder.encode(pixels)
    assert (encoder.spec.tokens, encoder.spec.patches, encoder.spec.width) == ("grid", 9, 12)
    for row in range(3):
        for column in range(3):
            assert relative(found[:, 3 * row + column], wanted[:, :, row, column]) < 1e-3


@pytest.mark.parametrize("kind", CONVOLUTIONAL)
def test_only_the_last_map_of_a_convolutional_tower_is_taken(settings, model, kind):
    with pytest.raises(SettingsError, match=r"encoder.layer: .* no block -2: .*to -1") as caught:
        load_encoder(settings(model=model(kind), layer=-2))
    assert "\n" not in str(caught.value)


# The preprocess


@pytest.mark.parametrize("kind", ["plain", "siglip"])
def test_the_spec_and_the_pixels_follow_the_preprocess_of_the_tag(settings, model, tag, kind):
    path = model(kind)
    encoder = load_encoder(settings(model=path, pretrained=tag(path)))
    spec = encoder.spec
    assert (spec.mean, spec.std) == (INCEPTION_MEAN, INCEPTION_STD) == ((0.5,) * 3, (0.5,) * 3)
    assert (spec.resize, spec.interpolation) == ("squash", "bicubic")
    seen = []
    embed_of(encoder._visual).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    pixels = random_pixels(encoder, 1)
    encoder.encode(pixels)
    assert torch.allclose(seen[0], pixels.permute(0, 3, 1, 2) / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [{"interpolation": "random"}, {"resize_mode": "longest"}],
    ids=str,
)
def test_a_preprocess_that_is_not_known_is_refused(settings, model, tag, change):
    path = model("siglip")
    with pytest.raises(SettingsError, match=r"encoder.model: .*wants images resized") as caught:
        load_encoder(settings(model=path, pretrained=tag(path, **change)))
    assert repr(*change.values()) in str(caught.value)


def test_a_tag_that_resizes_bilinearly_is_taken_at_its_word(settings, model, tag):
    path = model("plain")
    spec = load_encoder(settings(model=path, pretrained=tag(path, interpolation="bilinear"))).spec
    assert spec.interpolation == "bilinear"


@pytest.mark.parametrize("kind", ["plain", "siglip"])
def test_an_image_that_is_not_square_is_refused(settings, model, kind):
    with pytest.raises(SettingsError, match=r"encoder.model: image size is 32 x 48, wanted a sq"):
        load_encoder(settings(model=model(kind, image_size=[32, 48])))


# What has no patches, or not of this size or block


def test_a_trunk_without_patch_tokens_is_refused(settings, model):
    for layer in (-1, -2, -30):
        with pytest.raises(
            SettingsError, match=r"encoder.model: .*swin.*no patch tokens"
        ) as caught:
            load_encoder(settings(model=model("swin"), layer=layer))
        assert "tokens: SwinTransformer merges" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_convolutional_tower_of_open_clip_is_refused(settings, model):
    path = model("plain", layers=[1, 1, 1, 1], width=8, head_width=32)
    with pytest.raises(SettingsError, match=r"encoder.model: .*no patch tokens: ModifiedResNet "):
        load_encoder(settings(model=path))


def test_a_trunk_for_another_image_size_is_refused_for_that(settings, model):
    path = model("siglip", image_size=64)
    with pytest.raises(SettingsError, match=r"encoder.model: .* cannot encode .* 64 x 64 .*match"):
        load_encoder(settings(model=path))


@pytest.mark.parametrize("kind", ["plain", "siglip", "eva"])
def test_a_missing_layer_is_refused(settings, model, kind):
    assert load_encoder(settings(model=model(kind), layer=-3)).spec.layer == -3
    with pytest.raises(SettingsError, match=r"encoder.layer: .* has no block -4 .*it has 3"):
        load_encoder(settings(model=model(kind), layer=-4))


def test_a_tower_of_one_block_has_no_block_before_the_last(settings, model):
    path = model("plain", layers=1)
    assert load_encoder(settings(model=path, layer=-1)).spec.patches == 16
    with pytest.raises(SettingsError, match=r"encoder.layer: .* has no block -2 "):
        load_encoder(settings(model=path, layer=-2))


# The stage


def test_the_stage_squashes_images_for_tags_that_want_it(make_workspace, model, tag, settings):
    path = model("siglip")
    pretrained = tag(path)
    workspace = make_workspace(
        image_ids=range(1, 9), encoder={"model": path, "pretrained": pretrained}
    )
    workspace.run()
    store = FeatureStore(workspace.features)
    encoder = load_encoder(settings(model=path, pretrained=pretrained, batch_size=3))
    assert store.spec == encoder.spec
    for resize, same in (("squash", True), ("shortest", False)):
        pixels = [decode_rgb(workspace.images[n], 32, resize) for n in range(1, 9)]
        features = encoder.encode(torch.from_numpy(np.stack(pixels)))
        assert (relative(store.gather(range(1, 9)), features) < 1e-3) == same


@pytest.mark.parametrize("kind", ["plain", "siglip"])
def test_a_file_gets_the_preprocess_that_all_tags_of_its_architecture_share(
    settings, model, tag, tmp_path, kind
):
    path = model(kind)
    of_tag = load_encoder(settings(model=path, pretrained=tag(path))).spec
    for pretrained in (str(tmp_path / "a.safetensors"), "random"):
        spec = load_encoder(settings(model=path, pretrained=pretrained)).spec
        assert (spec.mean, spec.std, spec.resize) == (of_tag.mean, of_tag.std, of_tag.resize)
