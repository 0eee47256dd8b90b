import errno
import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import train.model.projector
from train.model.projector import Projector, Residual, load_projector, seeded_projector
from workspace.errors import StageError

D, H = 6, 10
KINDS = {
    "linear": D * H + H,
    "mlp": (D * H + H) + (H * H + H),
    "resblock": (D * H + H) + 2 * H + 2 * (H * H + H),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_maps_patches_and_has_its_number_of_parameters(kind):
    projector = seeded_projector(kind, D, H, 0)
    assert projector(torch.randn(2, 5, D)).shape == (2, 5, H)
    assert sum(p.numel() for p in projector.parameters()) == KINDS[kind]
    assert {p.dtype for p in projector.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_patches_are_mapped_one_by_one(kind):
    projector, x = seeded_projector(kind, D, H, 0).double(), torch.randn(2, 5, D).double()
    alone = torch.stack([torch.stack([projector(patch) for patch in image]) for image in x])
    torch.testing.assert_close(projector(x), alone)


def test_mlp_is_llavas_layer_for_layer():
    layers = seeded_projector("mlp", D, H, 0).layers
    assert [type(layer) for layer in layers] == [nn.Linear, nn.GELU, nn.Linear]
    assert layers[1].approximate == "none"
    names = [f"layers.{n}.{p}" for n in (0, 2) for p in ("weight", "bias")]
    assert list(Projector("mlp", D, H).state_dict()) == names


def test_resblock_is_a_linear_layer_and_a_pre_norm_residual():
    projector, x = seeded_projector("resblock", D, H, 0), torch.randn(3, D)
    first, block = projector.layers
    assert isinstance(block, Residual)
    y = first(x)
    torch.testing.assert_close(
        projector(x), y + block.down(nn.functional.gelu(block.up(block.norm(y))))
    )
    nn.init.zeros_(block.down.weight)
    nn.init.zeros_(block.down.bias)
    assert torch.equal(projector(x), y)


def test_the_seed_alone_decides_the_weights():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = seeded_projector("mlp", D, H, 5).state_dict()
    assert torch.equal(torch.rand(1), expected), "the global random state is left alone"
    torch.manual_seed(2)
    again, other = (seeded_projector("mlp", D, H, seed).state_dict() for seed in (5, 6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("kind", KINDS)
def test_saving_and_loading_is_bit_exact(kind, tmp_path):
    projector, path = seeded_projector(kind, D, H, 0), tmp_path / "run" / "p.safetensors"
    projector.save(path)
    loaded = load_projector(path, D, H)
    assert loaded.kind == kind
    state = projector.state_dict()
    assert all(torch.equal(loaded.state_dict()[name], state[name]) for name in state)
    assert list(path.parent.iterdir()) == [path]
    bytes_before = path.read_bytes()
    loaded.save(path)
    assert path.read_bytes() == bytes_before


@pytest.mark.parametrize("widths", [(D + 1, H), (D, H + 1), (H, D)])
def test_a_projector_of_other_widths_is_refused_with_both_named(tmp_path, widths):
    path = tmp_path / "p.safetensors"
    seeded_projector("mlp", D, H, 0).save(path)
    text = f"width {D} to {H}, wanted {widths[0]} (features) to {widths[1]}"
    with pytest.raises(StageError, match=re.escape(text)):
        load_projector(path, *widths)


def described(about):
    return {"projector": json.dumps(about)}


def damaged(tmp_path):
    whole = tmp_path / "whole.safetensors"
    seeded_projector("mlp", D, H, 0).save(whole)
    tensors = load_file(whole)
    about = {"kind": "mlp", "vision_width": D, "text_width": H}
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("not safetensors at all")
    (tmp_path / "half").write_bytes(whole.read_bytes()[:-9])
    save_file(tensors, tmp_path / "no metadata")
    save_file(tensors, tmp_path / "other metadata", {"format": "pt"})
    save_file(tensors, tmp_path / "unknown kind", described(about | {"kind": "conv"}))
    save_file(tensors, tmp_path / "another kind", described(about | {"kind": "linear"}))
    save_file(tensors, tmp_path / "no number", described(about | {"text_width": "wide"}))
    save_file(tensors, tmp_path / "no JSON", {"projector": "mlp"})
    save_file(tensors, tmp_path / "a list", {"projector": "[1]"})
    shorter = {name: tensor[:-1].contiguous() for name, tensor in tensors.items()}
    save_file(shorter, tmp_path / "shapes", described(about))
    save_file(dict(list(tensors.items())[1:]), tmp_path / "one missing", described(about))
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    save_file(halves, tmp_path / "another type", described(about))
    save_file({}, tmp_path / "widths alone", described(about))
    deep = {"projector": "[" * 5000 + "]" * 5000}
    save_file(tensors, tmp_path / "deep", deep)
    save_file(tensors, tmp_path / "long", deep | {"more": "x" * 10**6})
    (tmp_path / "header of 2 ** 63 bytes").write_bytes(b"\0" * 7 + b"\x80{}")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    torch.save(tensors, tmp_path / "pickle")
    whole.unlink()
    return [*sorted(tmp_path.iterdir()), tmp_path / "missing"]


def test_what_is_no_projector_is_refused_in_one_line_that_names_the_file(tmp_path):
    paths = damaged(tmp_path)
    assert len(paths) == 21
    for path in paths:
        with pytest.raises(StageError, match=re.escape(str(path))) as error:
            load_projector(path, D, H)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 600


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("widths", [(D, H + 1), (D + 1, H), (10**6, 10**6), (2**62, 2**62)])
def test_widths_that_the_tensors_do_not_have_are_refused_before_memory_is_taken(
    kind, widths, tmp_path, monkeypatch
):
    class Watched(Projector):
        def __init__(self, *made_of):
            super().__init__(*made_of)
            devices.update(p.device.type for p in self.parameters())

    devices = set()
    monkeypatch.setattr(train.model.projector, "Projector", Watched)
    path = tmp_path / "p.safetensors"
    about = {"kind": kind, "vision_width": widths[0], "text_width": widths[1]}
    save_file(seeded_projector(kind, D, H, 0).state_dict(), path, described(about))
    devices.clear()
    with pytest.raises(StageError, match="no projector"):
        load_projector(path, *widths)
    assert devices <= {"meta"}


def test_a_projector_that_the_system_cannot_read_is_not_called_damaged(tmp_path, monkeypatch):
    path = tmp_path / "p.safetensors"
    seeded_projector("mlp", D, H, 0).save(path)

    def failing(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(OSError, match="Input/output error"):
        load_projector(path, D, H)
