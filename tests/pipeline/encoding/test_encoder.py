import dataclasses
import io
import json
import warnings
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cache.errors import SettingsError
from pipeline.encoding.encoder import Encoder, load_encoder
from pipeline.images.decode import decode_rgb
from pipeline.settings import EncoderSettings
from pipeline.towers.tower import patch_tokens, weights_sha256
from tests.pipeline.towers.laws import relative
from workspace.errors import StageError

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


def pixels(encoder, images):
    side = encoder.spec.image_size
    return torch.from_numpy(np.stack([decode_rgb(data, side, "shortest") for data in images]))


def one_line(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def checkpoint(tmp_path, tiny_model):
    """Weights of the small ViT other than the random ones, as a state dict."""
    open_clip.add_model_config(tiny_model)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = open_clip.create_model("tiny-vit")
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


# What the features are


@pytest.mark.parametrize("layer", [-1, -2, -3])
def test_features_are_those_of_open_clip(settings, jpeg, tiny_model, layer):
    encoder = load_encoder(settings(layer=layer))
    found = encoder.encode(pixels(encoder, [jpeg(n) for n in range(4)]))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.create_model("tiny-vit").eval()
    transform = open_clip.image_transform(32, is_train=False, mean=OPENAI_MEAN, std=OPENAI_STD)
    images = [transform(Image.open(io.BytesIO(jpeg(n)))) for n in range(4)]
    with torch.no_grad():
        x = model.visual.conv1(torch.stack(images)).flatten(2).transpose(1, 2)
        x = torch.cat([model.visual.class_embedding.expand(4, 1, -1), x], dim=1)
        x = model.visual.ln_pre(x + model.visual.positional_embedding)
        for block in model.visual.transformer.resblocks[: 4 + layer]:
            x = block(x)
    assert found.dtype == np.float16
    assert found.shape == (4, 16, 64)
    assert relative(found, x[:, 1:].numpy()) < 1e-3


def test_patches_run_row_by_row_from_the_top_left(settings):
    """Before any attention mixes them, a patch changes where its own pixels change."""
    encoder = load_encoder(settings())
    seen = []
    encoder._visual.ln_pre.register_forward_hook(lambda m, args, out: seen.append(out[:, 1:]))
    plain = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    marked = plain.clone()
    # Second row of patches, third column.
    marked[0, 8:16, 16:24] = 255
    encoder.encode(plain)
    encoder.encode(marked)
    differs = (seen[0] != seen[1]).any(dim=2)[0]
    assert differs.nonzero().flatten().tolist() == [1 * 4 + 2]


def to_transformers(state_dict, layers, width):
    """The names of transformers' CLIP vision model for open_clip's weights."""
    names = {
        "embeddings.class_embedding": "class_embedding",
        "embeddings.patch_embedding.weight": "conv1.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "pre_layrnorm.weight": "ln_pre.weight",
        "pre_layrnorm.bias": "ln_pre.bias",
        "post_layernorm.weight": "ln_post.weight",
        "post_layernorm.bias": "ln_post.bias",
    }
    parts = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
    converted = {theirs: state_dict[ours] for theirs, ours in names.items()}
    for n in range(layers):
        block, layer = f"transformer.resblocks.{n}", f"encoder.layers.{n}"
        for kind in ("weight", "bias"):
            for theirs, ours in parts.items():
                converted[f"{layer}.{theirs}.{kind}"] = state_dict[f"{block}.{ours}.{kind}"]
            joined = state_dict[f"{block}.attn.in_proj_{kind}"]
            for letter, part in zip("qkv", joined.split(width), strict=True):
                converted[f"{layer}.self_attn.{letter}_proj.{kind}"] = part
    return converted


@pytest.fixture(scope="module")
def real_size():
    """ViT-B/32 with the same random weights as an encoder and in transformers' class."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    name, kinds = "ViT-B-32-quickgelu", {"layer": -2, "precision": "fp32"}
    encoder = load_encoder(
        EncoderSettings(model=name, pretrained="random", batch_size=4, device="cpu", **kinds)
    )
    config = CLIPVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        patch_size=32,
        image_size=224,
        hidden_act="quick_gelu",
        projection_dim=512,
    )
    theirs = CLIPVisionModel(config).eval()
    weights = to_transformers(encoder._visual.state_dict(), 12, 768)
    own = theirs.state_dict()
    prefix = "vision_model." if next(iter(own)).startswith("vision_model.") else ""
    weights = {prefix + name: tensor for name, tensor in weights.items()}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.endswith("position_ids") for name in missing)
    return encoder, theirs


@pytest.mark.parametrize("backend", ["CLIPImageProcessorPil", "CLIPImageProcessor"])
def test_real_size_features_are_those_of_transformers(real_size, jpeg, backend):
    import transformers

    ours, theirs = real_size
    images = [jpeg(1, (320, 240)), jpeg(2, (200, 300))]
    processor = getattr(transformers, backend)()
    pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in images]
    inputs = processor(images=pictures, return_tensors="pt")
    with torch.no_grad():
        states = theirs(**inputs, output_hidden_states=True).hidden_states
    for layer in (-2, -1):
        spec = dataclasses.replace(ours.spec, layer=layer)
        encoder = Encoder(ours._visual, spec, ours.device)
        found = encoder.encode(pixels(encoder, images))
        assert found.shape == (2, 49, 768)
        assert relative(found, states[layer][:, 1:].numpy()) < 2e-3
        assert relative(found, states[-3 - layer][:, 1:].numpy()) > 1e-2


def test_what_comes_with_an_image_does_not_matter(settings, jpeg):
    encoder = load_encoder(settings())
    batch = pixels(encoder, [jpeg(n) for n in range(5)])
    together = encoder.encode(batch)
    alone = np.concatenate([encoder.encode(batch[n : n + 1]) for n in range(5)])
    assert relative(alone, together) < 1e-3
    assert relative(encoder.encode(batch.flip(0))[::-1], together) < 1e-3


def test_equal_batches_give_equal_bits(settings, jpeg):
    first, second = load_encoder(settings()), load_encoder(settings())
    batch = pixels(first, [jpeg(n) for n in range(4)])
    assert first.encode(batch).tobytes() == second.encode(batch).tobytes()


def test_random_weights_leave_the_random_state_alone(settings):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    load_encoder(settings())
    assert torch.equal(torch.get_rng_state(), state)


def test_bf16_is_near_fp32(settings, jpeg):
    fp32, bf16 = load_encoder(settings()), load_encoder(settings(precision="bf16"))
    batch = pixels(fp32, [jpeg(n) for n in range(4)])
    exact, rough = fp32.encode(batch), bf16.encode(batch)
    assert rough.dtype == np.float16
    assert 1e-4 < relative(rough, exact) < 3e-2
    assert fp32.spec.weights_sha256 == bf16.spec.weights_sha256
    assert fp32.spec.fingerprint != bf16.spec.fingerprint


@pytest.mark.parametrize("value", [1e6, float("nan"), float("inf")])
def test_a_value_that_does_not_fit_float16_is_an_error(settings, value):
    encoder = load_encoder(settings(layer=-1))
    with torch.no_grad():
        encoder._visual.transformer.resblocks[-1].mlp.c_proj.bias[3] = value
    with pytest.raises(StageError, match=r"outside float16 \(65504\)") as caught:
        encoder.encode(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
    assert "encoder.layer" in one_line(caught)


# The spec


def test_the_spec_describes_the_features(settings):
    spec = load_encoder(settings()).spec
    assert spec.mean == OPENAI_MEAN
    assert spec.std == OPENAI_STD
    assert spec.weights_sha256.isalnum()
    found = dataclasses.asdict(spec) | {"mean": 0, "std": 0, "weights_sha256": 0}
    assert found.pop("model").startswith("tiny-vit-")
    assert found == {
        "format": "patchcache/1",
        "weights_sha256": 0,
        "activation": "quick_gelu",
        "layer": -2,
        "tokens": "patch",
        "normalized": False,
        "image_size": 32,
        "resize": "shortest",
        "crop": "center",
        "interpolation": "bicubic",
        "mean": 0,
        "std": 0,
        "precision": "fp32",
        "batch_size": 4,
        "dtype": "float16",
        "patches": 16,
        "width": 64,
        "preprocess_version": 1,
        "about": "",
    }


def test_the_spec_survives_its_json(settings):
    spec = load_encoder(settings()).spec
    assert type(spec).from_json(spec.to_json(), "here") == spec


@pytest.mark.parametrize(
    "changes", [{"layer": -1}, {"precision": "bf16"}, {"batch_size": 5}], ids=str
)
def test_every_setting_that_changes_values_changes_the_fingerprint(settings, changes):
    assert load_encoder(settings()).spec.fingerprint != (
        load_encoder(settings(**changes)).spec.fingerprint
    )


def test_the_activation_is_in_the_spec_and_in_the_features(settings, tmp_path, tiny, jpeg):
    other = tmp_path / "tiny-gelu.json"
    other.write_text(json.dumps(tiny | {"quick_gelu": False}))
    quick, plain = load_encoder(settings()), load_encoder(settings(model=str(other)))
    assert (quick.spec.activation, plain.spec.activation) == ("quick_gelu", "gelu")
    assert quick.spec.weights_sha256 == plain.spec.weights_sha256
    batch = pixels(quick, [jpeg(0)])
    assert relative(quick.encode(batch), plain.encode(batch)) > 1e-3


def test_a_config_of_other_content_has_another_name(settings, tmp_path, tiny):
    (tmp_path / "again").mkdir()
    same, other = tmp_path / "again" / "tiny-vit.json", tmp_path / "again" / "x" / "tiny-vit.json"
    other.parent.mkdir()
    first = load_encoder(settings()).spec
    same.write_text(json.dumps(tiny, indent=4, sort_keys=True))
    assert load_encoder(settings(model=str(same))).spec == first
    tiny["vision_cfg"]["layers"] = 4
    other.write_text(json.dumps(tiny))
    assert load_encoder(settings(model=str(other))).spec.model != first.model


# Checkpoints


def test_the_weights_hash_depends_on_the_tensors_alone(settings, checkpoint, tmp_path):
    save_file(checkpoint, tmp_path / "a.safetensors")
    save_file(checkpoint, tmp_path / "b.safetensors", metadata={"made": "later"})
    torch.save(checkpoint, tmp_path / "c.pt")
    torch.save({"state_dict": checkpoint, "epoch": 3}, tmp_path / "d.pt")
    files = [tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.pt", "d.pt")]
    assert len({path.read_bytes() for path in files}) == 4
    specs = {load_encoder(settings(pretrained=str(path))).spec for path in files}
    assert len(specs) == 1
    assert specs != {load_encoder(settings()).spec}


def test_every_weight_of_the_tower_is_in_the_hash(settings):
    visual = load_encoder(settings())._visual
    before = weights_sha256(visual)
    tensors = list(visual.state_dict().values())
    assert len(tensors) > 30
    for tensor in tensors:
        kept = tensor.flatten()[-1].clone()
        tensor.view(-1)[-1] += 1
        assert weights_sha256(visual) != before
        tensor.view(-1)[-1] = kept
    assert weights_sha256(visual) == before


def test_the_text_tower_is_not_in_the_hash(settings, checkpoint, tmp_path):
    changed = {
        name: tensor if name.startswith("visual.") else tensor + 1
        for name, tensor in checkpoint.items()
    }
    save_file(checkpoint, tmp_path / "a.safetensors")
    save_file(changed, tmp_path / "b.safetensors")
    first, second = (
        load_encoder(settings(pretrained=str(tmp_path / name))).spec
        for name in ("a.safetensors", "b.safetensors")
    )
    assert first == second


def test_a_checkpoint_gives_its_own_features(settings, checkpoint, tmp_path, jpeg):
    save_file(checkpoint, tmp_path / "a.safetensors")
    encoder = load_encoder(settings(pretrained=str(tmp_path / "a.safetensors")))
    visual = open_clip.create_model("tiny-vit").eval().visual
    visual.load_state_dict(
        {n.removeprefix("visual."): t for n, t in checkpoint.items() if n.startswith("visual.")}
    )
    wanted = Encoder(visual, encoder.spec, torch.device("cpu"))
    batch = pixels(encoder, [jpeg(n) for n in range(3)])
    assert encoder.encode(batch).tobytes() == wanted.encode(batch).tobytes()


def damaged(checkpoint, folder):
    save_file(checkpoint, folder / "whole.safetensors")
    torch.save(checkpoint, folder / "whole.pt")
    whole = (folder / "whole.safetensors").read_bytes(), (folder / "whole.pt").read_bytes()
    fewer = dict(list(checkpoint.items())[:-1])
    save_file(fewer, folder / "fewer.safetensors")
    save_file(checkpoint | {"more": torch.zeros(1)}, folder / "more.safetensors")
    wrong = checkpoint | {"visual.proj": torch.zeros(3, 3)}
    save_file(wrong, folder / "shape.safetensors")
    torch.save([1, 2], folder / "list.pt")
    torch.save({}, folder / "nothing.pt")
    torch.save({"x": Path("a")}, folder / "code.pt")
    contents = {
        "short.safetensors": whole[0][:-100],
        "shorter.safetensors": whole[0][:20],
        "short.pt": whole[1][:-1000],
        "empty.safetensors": b"",
        "empty.pt": b"",
        "garbage.safetensors": b"garbage" * 99,
        "garbage.pt": b"garbage" * 99,
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    names = ["fewer.safetensors", "more.safetensors", "shape.safetensors"]
    return [*names, "list.pt", "nothing.pt", "code.pt", *contents]


def test_a_damaged_checkpoint_gives_one_line(settings, checkpoint, tmp_path):
    for name in damaged(checkpoint, tmp_path):
        path = str(tmp_path / name)
        with pytest.raises(StageError, match="cannot load") as caught:
            load_encoder(settings(pretrained=path))
        text = one_line(caught)
        assert path in text
        # torch's own advice for a file that holds code is to run it.
        assert "Re-running" not in text


# What is refused


@pytest.mark.parametrize("tag", ["openai", "laion400m_e32"])
def test_weights_under_another_activation_are_refused_before_any_download(
    settings, monkeypatch, tag
):
    monkeypatch.setattr(open_clip, "create_model", lambda *a, **k: pytest.fail("went on"))
    with pytest.raises(SettingsError, match="trained with QuickGELU") as caught:
        load_encoder(settings(model="ViT-B-32", pretrained=tag))
    assert "-quickgelu" in one_line(caught)


def test_a_tower_without_patches_is_refused(settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(
            SettingsError, match=r"RN50 has no patch tokens.*Wanted a ViT"
        ) as caught:
            load_encoder(settings(model="RN50"))
    one_line(caught)


@pytest.mark.parametrize("layer", [-4, -100])
def test_a_missing_layer_is_refused(settings, layer):
    with pytest.raises(SettingsError, match=f"encoder.layer: .*no block {layer} ") as caught:
        load_encoder(settings(layer=layer))
    one_line(caught)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_counted_from_the_front_is_refused(settings, layer):
    with pytest.raises(ValueError, match="layer is"):
        settings(layer=layer)


@pytest.mark.parametrize("model", ["ViT-nothing", "", "hf-hub:some/model", "local-dir:/tmp"])
def test_an_unknown_model_is_refused(settings, model):
    with pytest.raises(SettingsError, match=r"encoder.model: open_clip .* has no") as caught:
        load_encoder(settings(model=model))
    one_line(caught)


@pytest.mark.parametrize("name", ["nowhere.pt", "nowhere.safetensors", "some/where/a.pt", "tag"])
def test_a_missing_checkpoint_is_refused(settings, name):
    with pytest.raises(SettingsError, match="no file and no tag") as caught:
        load_encoder(settings(pretrained=name))
    assert name in one_line(caught)


def test_a_hub_id_is_loaded_like_a_file(settings, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.towers.hub.hub_failure", lambda: "")
    save_file(checkpoint, tmp_path / "a.safetensors")
    asked = []
    monkeypatch.setattr(
        "pipeline.towers.open_clip_tower.download_pretrained_from_hf",
        lambda name: asked.append(name) or str(tmp_path / "a.safetensors"),
    )
    found = load_encoder(settings(pretrained="somebody/some-clip")).spec
    assert asked == ["somebody/some-clip"]
    assert found == load_encoder(settings(pretrained=str(tmp_path / "a.safetensors"))).spec


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """A machine that reaches no hub; returns the folder that is its cache of one repository."""
    monkeypatch.setattr("pipeline.towers.hub.hub_failure", lambda: "no network")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub/models--somebody--some-clip"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    return folder / "snapshots" / ("0" * 40)


@pytest.mark.parametrize(
    ("model", "pretrained"),
    [
        ("ViT-B-32-quickgelu", "openai"),
        ("ViT-B-32", "laion2b_s34b_b79k"),
        ("ViT-B-32", "somebody/some-clip"),
    ],
)
@pytest.mark.usefixtures("no_network")
def test_without_a_network_the_error_is_one_line(settings, model, pretrained, capfd):
    with pytest.raises(StageError, match=r"hub cannot be reached \(no network\)") as caught:
        load_encoder(settings(model=model, pretrained=pretrained))
    assert f"'{pretrained}'" in one_line(caught)
    assert "encoder.pretrained" in str(caught.value)
    assert "HF_HOME" in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_without_a_network_cached_weights_are_loaded(settings, checkpoint, no_network, name):
    path = no_network / name
    save_file(checkpoint, path) if path.suffix == ".safetensors" else torch.save(checkpoint, path)
    found = load_encoder(settings(pretrained="somebody/some-clip")).spec
    assert found == load_encoder(settings(pretrained=str(path))).spec


def test_without_a_network_a_damaged_file_in_the_cache_is_called_so(settings, no_network):
    (no_network / "open_clip_model.safetensors").write_bytes(b"garbage" * 99)
    with pytest.raises(StageError, match="cannot load") as caught:
        load_encoder(settings(pretrained="somebody/some-clip"))
    assert "cannot be reached" not in one_line(caught)


def test_random_weights_are_no_warning(settings, capfd):
    load_encoder(settings())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "{}", '{"embed_dim": 3}', "\ud800"])
def test_a_file_that_is_no_config_is_refused(settings, tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(SettingsError, match=r"encoder.model: .*broken.json") as caught:
        load_encoder(settings(model=str(path)))
    one_line(caught)
    path.unlink()
    with pytest.raises(SettingsError, match=r"broken.json"):
        load_encoder(settings(model=str(path)))


@pytest.mark.parametrize(
    "vision",
    [
        None,
        {},
        {"widht": 3},
        {"layers": "a"},
        {"head_width": 0},
        {"patch_size": 0},
        {"width": -1},
        {"image_size": 4, "patch_size": 8},
    ],
    ids=str,
)
def test_an_impossible_config_gives_one_line(settings, tmp_path, tiny, vision):
    tiny["vision_cfg"] = vision if not vision else tiny["vision_cfg"] | vision
    if vision == {}:
        tiny["vision_cfg"] = {"layers": 2, "width": 60}
    path = tmp_path / "impossible.json"
    path.write_text(json.dumps(tiny))
    with pytest.raises((StageError, SettingsError), match="encoder") as caught:
        load_encoder(settings(model=str(path)))
    one_line(caught)


@pytest.mark.parametrize("device", ["nothing", "cuda:99", ""])
def test_a_missing_device_is_refused(settings, device):
    with pytest.raises(SettingsError, match=r"encoder.device: ") as caught:
        load_encoder(settings(device=device))
    one_line(caught)


def test_patch_tokens_are_those_of_one_block(settings):
    visual = load_encoder(settings())._visual
    x = torch.zeros(2, 3, 32, 32)
    with torch.inference_mode():
        tokens = [patch_tokens(visual, x, layer) for layer in (-1, -2, -3)]
    assert all(t.shape == (2, 16, 64) for t in tokens)
    assert not torch.equal(tokens[0], tokens[1])
