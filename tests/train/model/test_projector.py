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
from cache.errors import SettingsError
from train.model.projector import (
    Projector,
    Residual,
    check_pool,
    load_projector,
    seeded_projector,
)
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("side", "pool"), [(2, 2), (6, 2), (4, 4), (8, 4)])
def test_a_pool_gives_the_layers_the_mean_of_each_square(kind, side, pool):
    pooling, plain = (seeded_projector(kind, D, H, 0, p).double() for p in (pool, 1))
    grid = torch.randn(3, side, side, D).double()
    means = torch.stack(
        [
            grid[:, y : y + pool, x : x + pool].flatten(1, 2).mean(1)
            for y in range(0, side, pool)
            for x in range(0, side, pool)
        ],
        dim=1,
    )
    found = pooling(grid.flatten(1, 2))
    assert found.shape[1] == pooling.num_embeddings(side**2) == (side // pool) ** 2
    torch.testing.assert_close(found, plain(means))


def test_float16_patches_are_averaged_in_the_dtype_of_the_weights():
    # Their sum is no number of float16.
    largest = torch.full((1, 4, D), 60_000, dtype=torch.float16)
    found = seeded_projector("linear", D, H, 0, 2)(largest)
    assert torch.equal(found, seeded_projector("linear", D, H, 0)(largest[:, :1]))


def test_a_file_names_its_pool_and_nothing_without_one(tmp_path):
    path, plain = tmp_path / "p.safetensors", tmp_path / "plain.safetensors"
    seeded_projector("mlp", D, H, 0, 4).save(path)
    assert load_projector(path, D, H).pool == 4
    projector = seeded_projector("mlp", D, H, 0)
    projector.save(plain)
    about = {"kind": "mlp", "vision_width": D, "text_width": H}
    save_file(projector.state_dict(), path, described(about))
    assert plain.read_bytes() == path.read_bytes()
    assert load_projector(plain, D, H).pool == 1


@pytest.mark.parametrize("num_patches", [1, 7, 16, 49, 50, 36, 100])
def test_every_grid_is_right_without_a_pool(num_patches):
    check_pool(1, num_patches, "projector.pool")


@pytest.mark.parametrize(
    ("pool", "num_patches", "says"),
    [
        (2, 50, r"projector.pool: pool is 2, .* 50 patches an image, which are no square"),
        (2, 49, r"a grid of 7 x 7, and 7 is no multiple of 2. Set projector.pool to 1\."),
        (4, 36, r"a grid of 6 x 6, and 6 is no multiple of 4. Set projector.pool to 1 or 2\."),
        (4, 8, "no square"),
    ],
)
def test_a_grid_that_a_pool_does_not_divide_is_refused_with_sizes(pool, num_patches, says):
    with pytest.raises(SettingsError, match=says):
        check_pool(pool, num_patches, "projector.pool")
    check_pool(pool, (2 * pool) ** 2, "projector.pool")


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
    for pool in (0, 3, True, 2.0, "2", None):
        save_file(tensors, tmp_path / f"pool {pool!r}", described(about | {"pool": pool}))
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
    assert len(paths) == 27
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
