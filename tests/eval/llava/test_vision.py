"""transformers' CLIP with open_clip's weights has open_clip's hidden states, or is refused."""

import json

import open_clip
import pytest
import torch
from open_clip.transformer import VisionTransformer
from transformers import CLIPVisionModel

from eval.llava.vision import clip_vision_config, clip_vision_weights, vision_part
from pipeline.encoding.encoder import load_encoder
from pipeline.settings import EncoderSettings
from tests.pipeline.conftest import TINY
from tests.pipeline.towers.conftest import BLOCKS, KINDS, build
from workspace.errors import StageError


@pytest.fixture
def tower(tmp_path):
    """Make a tower; `changes` go to its vision config."""

    def make(quick_gelu=True, **changes):
        config = {**TINY, "quick_gelu": quick_gelu}
        config["vision_cfg"] = {**TINY["vision_cfg"], **changes}
        (tmp_path / "tower.json").write_text(json.dumps(config))
        open_clip.add_model_config(tmp_path / "tower.json")
        torch.manual_seed(0)
        visual = open_clip.create_model("tower", None, pretrained_text=False).visual.eval()
        for name, parameter in visual.named_parameters():
            # Norms start as ones and zeros, which would hide one taken for another.
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3 if "ln_" in name else 0.05)
        return visual

    return make


CASES = {
    "quick gelu": {},
    "gelu": {"quick_gelu": False},
    "tanh gelu": {"quick_gelu": False, "act_kwargs": {"approximate": "tanh"}},
    "eps": {"norm_kwargs": {"eps": 1e-2}},
    "wide": {"mlp_ratio": 2.0, "head_width": 16},
    "average": {"pool_type": "avg"},
}


@pytest.mark.parametrize("case", CASES)
def test_every_block_gives_the_same(tower, case):
    visual = tower(**CASES[case])
    model = CLIPVisionModel(clip_vision_config(visual, "tower")).eval()
    model.load_state_dict(dict(clip_vision_weights(visual)))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        hidden = model(pixels, output_hidden_states=True).hidden_states
        for layer in range(-len(visual.transformer.resblocks), 0):
            wanted = visual.forward_intermediates(
                pixels, indices=[layer], normalize_intermediates=False,
                intermediates_only=True, output_fmt="NLC",
            )["image_intermediates"][0]  # fmt: skip
            assert torch.allclose(hidden[layer][:, 1:], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "act"), [("quick gelu", "quick_gelu"), ("gelu", "gelu"), ("eps", "quick_gelu")]
)
def test_the_activation_keeps_its_name(tower, name, act):
    assert clip_vision_config(tower(**CASES[name]), "tower").hidden_act == act


REFUSED = {
    "scaled blocks": ({"ls_init_value": 0.1}, "layer scale"),
    "no norm": ({"no_ln_pre": True}, "no norm before"),
    "attention pooling": ({"attentional_pool": True}, "attention pool"),
    "custom blocks": ({"block_type": "custom", "qk_norm": True}, "another class"),
    "oblong": ({"image_size": [32, 64]}, "not square"),
    "timm": (
        {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "image_size": 32},
        "TimmModel",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_clip_does_not_have_is_refused_by_name(tower, case):
    changes, reason = REFUSED[case]
    visual = tower(**changes)
    assert isinstance(visual, VisionTransformer) == (case != "timm")
    with pytest.raises(StageError, match=rf"tower: cannot be exported.*{reason}.*Train with"):
        clip_vision_config(visual, "tower")


def settings(model, pretrained="main", layer=-2):
    return EncoderSettings(
        model=model, pretrained=pretrained, layer=layer, precision="fp32", batch_size=4,
        device="cpu",
    )  # fmt: skip


@pytest.mark.parametrize(("name", "strategy"), [("clip-whole", "default"), ("siglip", "full")])
def test_a_tower_of_transformers_is_taken_as_it_is(tmp_path, name, strategy):
    encoder = settings(f"hf:{build(name, tmp_path)}")
    part = vision_part(load_encoder(encoder), encoder)
    assert part.strategy == strategy
    assert part.config.num_hidden_layers == BLOCKS
    assert str(tmp_path) not in part.config.to_json_string()


@pytest.mark.parametrize("name", ["dinov2-registers", "dinov3"])
def test_registers_are_refused_by_name(tmp_path, name):
    encoder = settings(f"hf:{build(name, tmp_path)}")
    prefix = KINDS[name].prefix
    with pytest.raises(
        StageError, match=f"hf:.*drops one token before the patches, it has {prefix}"
    ):
        vision_part(load_encoder(encoder), encoder)


def test_the_map_of_a_convolutional_tower_is_refused_by_name():
    encoder = settings("timm:resnet10t", "random", layer=-1)
    with pytest.raises(StageError, match=r"timm:resnet10t.*places of a map"):
        vision_part(load_encoder(encoder), encoder)


@pytest.mark.parametrize("broken", ["prefix", "weights"])
def test_other_features_are_refused(tmp_path, monkeypatch, broken):
    encoder = settings(f"hf:{build('siglip', tmp_path)}")
    tower = load_encoder(encoder)
    if broken == "prefix":
        monkeypatch.setattr("eval.llava.vision.num_prefix_tokens", lambda config: 1)
    else:
        tower._visual.model.embeddings.position_embedding.weight.data.add_(0.1)
    with pytest.raises(StageError, match="other features"):
        vision_part(tower, encoder)
