import errno
import json
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from train.loop.checkpoint import Checkpoints, _hash, _read

PROGRESS = {"rows": [{"step": 3, "loss": 0.1 + 0.2}], "learning_rate": 1e-3 / 3}


class Small:
    """Something that learns from random numbers, with two groups and two kinds of numbers."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 1).to(torch.bfloat16)
        self.unused = nn.Parameter(torch.ones(()))
        groups = [
            {"params": self.first.parameters(), "lr": 0.1},
            {"params": [*self.second.parameters(), self.unused], "lr": 0.01},
        ]
        self.optimizer = torch.optim.AdamW(groups)

    @property
    def learning(self):
        named = [("first", self.first), ("second", self.second)]
        learning = {f"{n}.{m}": p for n, part in named for m, p in part.named_parameters()}
        return learning | {"unused": self.unused}

    def step(self, number):
        random_5x3 = torch.randn(5, 3, generator=torch.Generator().manual_seed(number))
        self.optimizer.zero_grad()
        self.second(self.first(random_5x3).to(torch.bfloat16)).square().sum().backward()
        self.optimizer.step()

    def same(self, other):
        pairs = [(self.learning[name], other.learning[name]) for name in self.learning]
        mine, theirs = (s.optimizer.state_dict()["state"] for s in (self, other))
        assert mine.keys() == theirs.keys()
        for number, state in mine.items():
            assert state.keys() == theirs[number].keys()
            pairs += [(value, theirs[number][name]) for name, value in state.items()]
        return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def small():
    made = Small()
    for number in range(3):
        made.step(number)
    return made


@pytest.fixture
def save(tmp_path):
    """Save a state after some steps, with the parts of it that fit in JSON."""

    def save(small, step, keep=2, progress=PROGRESS, folder="checkpoints"):
        kept = Checkpoints(tmp_path / folder, keep)
        return kept.save(step, small.learning, small.optimizer, progress)

    return save


def test_what_is_restored_is_what_was_saved_and_learns_on_the_same(small, save, tmp_path):
    save(small, 3)
    found = Checkpoints(tmp_path / "checkpoints", 2).latest()
    assert (found.step, found.progress) == (3, PROGRESS)
    other = Small(seed=1)
    other.step(7)
    found.restore(other.learning, other.optimizer)
    assert other.same(small)
    assert [group["lr"] for group in other.optimizer.param_groups] == [0.1, 0.01]
    for number in range(3, 6):
        small.step(number)
        other.step(number)
    assert other.same(small)
    small.step(0)
    assert not other.same(small)


def test_what_was_read_is_no_view_of_the_file(small, save, tmp_path):
    """The file is deleted, or replaced, while the run goes on."""
    path = save(small, 3)
    found = Checkpoints(tmp_path / "checkpoints", 2).latest()
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    other = Small(seed=1)
    found.restore(other.learning, other.optimizer)
    assert other.same(small)


def test_the_same_state_is_the_same_file(small, save):
    assert save(small, 3).read_bytes() == save(small, 3, folder="again").read_bytes()


def test_without_a_checkpoint_there_is_none(tmp_path, capsys):
    assert Checkpoints(tmp_path / "checkpoints", 2).latest() is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_last_ones_are_kept(small, save, tmp_path, keep):
    steps = [1, 2, 10, 99, 100, 12_345_678]
    for number, step in enumerate(steps, start=1):
        path = save(small, step, keep=keep)
        paths = Checkpoints(tmp_path / "checkpoints", keep).paths
        wanted = steps[max(0, number - keep) : number]
        assert [int(p.stem.removeprefix("step-")) for p in paths] == wanted
        assert paths[-1] == path
        assert {p.name for p in path.parent.iterdir()} == {p.name for p in paths}
        assert Checkpoints(tmp_path / "checkpoints", keep).latest().step == step


def test_a_file_cut_at_any_length_is_named_and_the_one_before_read(small, save, tmp_path, capsys):
    save(small, 3)
    path = save(small, 4)
    whole = path.read_bytes()
    lengths = [*range(0, len(whole), 7), *range(12), len(whole) - 1]
    assert len(lengths) > 100
    for length in lengths:
        path.write_bytes(whole[:length])
        assert Checkpoints(tmp_path / "checkpoints", 2).latest().step == 3, length
        said = capsys.readouterr().err
        assert said.startswith(f"{path}: damaged (")
        assert said.endswith("); trying the one before\n")
        assert said.count("\n") == 1
        assert path.exists(), "somebody may want to look at it"


def test_a_flipped_bit_of_a_tensor_is_noticed(small, save, tmp_path):
    save(small, 3)
    path = save(small, 4)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    bits = random.Random(0)
    for place in range(header, len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bits.randrange(8)
        path.write_bytes(damaged)
        assert Checkpoints(tmp_path / "checkpoints", 2).latest().step == 3, place


def test_with_none_that_is_whole_all_are_named_and_there_is_none(small, save, tmp_path, capsys):
    paths = [save(small, step) for step in (3, 4)]
    for path in paths:
        path.write_bytes(bytes(50))
    assert Checkpoints(tmp_path / "checkpoints", 2).latest() is None
    said = capsys.readouterr().err.splitlines()
    assert [line.split(": damaged")[0] for line in said] == [str(path) for path in reversed(paths)]


def test_a_save_that_fails_leaves_those_before_and_no_half_file(small, save, tmp_path, monkeypatch):
    save(small, 3)
    for name in ("fsync", "replace"):

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(OSError, match="No space left"):
                save(small, 4, keep=1)
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [
            "step-00000003.safetensors"
        ]
    assert Checkpoints(tmp_path / "checkpoints", 2).latest().step == 3


def test_a_flipped_bit_in_what_stands_before_the_tensors_is_noticed(small, tmp_path):
    kept = Checkpoints(tmp_path, 2)
    kept.save(3, small.learning, small.optimizer, PROGRESS)
    path = kept.save(4, small.learning, small.optimizer, PROGRESS)
    whole = path.read_bytes()
    unnoticed = []
    for place in range(8 + int.from_bytes(whole[:8], "little")):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        found = kept.latest()
        if found.step != 3 and (found.step, found.progress) != (4, PROGRESS):
            unnoticed.append(place)
    assert not unnoticed


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_ones_do_not_count_as_kept(small, tmp_path, keep):
    kept = Checkpoints(tmp_path, keep)
    for step in (10, 11):
        kept.save(step, small.learning, small.optimizer, PROGRESS).write_bytes(b"")
    assert kept.latest() is None
    path = kept.save(2, small.learning, small.optimizer, PROGRESS)
    assert path.exists()
    assert kept.latest().step == 2


def with_metadata(path, metadata):
    """Rewrite a safetensors file with other metadata."""
    save_file(load_file(path), path, metadata)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"other": "{}"},
        {"checkpoint": "[" * 10**5},
        {"checkpoint": "9" * 10**5},
        {"checkpoint": "[]"},
        {"checkpoint": "null"},
        {"checkpoint": '{"state": {"step": NaN}, "xxh3_128": ""}'},
        {"checkpoint": '{"state": "' + chr(92) + 'ud800", "xxh3_128": ""}'},
    ],
    ids=lambda metadata: str(metadata)[:32],
)
def test_metadata_of_any_kind_is_damage(small, save, tmp_path, capsys, metadata):
    save(small, 1)
    path = save(small, 2)
    with_metadata(path, metadata)
    assert Checkpoints(tmp_path / "checkpoints", 2).latest().step == 1
    said = capsys.readouterr().err
    assert said.startswith(f"{path}: damaged (")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "shape", [[2**40], [2**62, 2**62], [2**40, 2**40, 2**40], [-1], [0, 2**60]]
)
def test_a_header_that_claims_more_than_the_file_holds_takes_no_memory(
    small, save, tmp_path, capsys, shape
):
    save(small, 1)
    path = save(small, 2)
    header = {"big": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"1234")
    assert Checkpoints(tmp_path / "checkpoints", 2).latest().step == 1
    assert f"{path}: damaged (" in capsys.readouterr().err


def test_a_failing_disk_is_no_damage(small, save, tmp_path, monkeypatch):
    save(small, 1)
    save(small, 2)

    def failing(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "open", failing)
    with pytest.raises(OSError, match="Input/output error"):
        Checkpoints(tmp_path / "checkpoints", 2).latest()


def with_tensor(path, name, tensor):
    """Save a checkpoint's tensors with one changed, or left out, under their right hash."""
    whole = _read(path)
    tensors = {key: value for key, value in whole.tensors.items() if key != name}
    if tensor is not None:
        tensors[name] = tensor
    state = {"step": whole.step, "progress": whole.progress}
    about = {"state": state, "xxh3_128": _hash(state, tensors)}
    save_file(tensors, path, {"checkpoint": json.dumps(about)})


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("parameter.first.weight", None),
        ("parameter.first.weight", torch.ones(3)),
        ("parameter.first.weight", torch.ones(1)),
        ("parameter.first.weight", torch.ones(4, 3, dtype=torch.float64)),
        ("parameter.another", torch.ones(1)),
        ("optimizer.0.exp_avg", None),
        ("optimizer.0.exp_avg", torch.ones(1)),
        ("optimizer.0.step", torch.ones(7)),
        ("optimizer.0.another", torch.ones(())),
        ("optimizer.99.step", torch.ones(())),
        ("optimizer.x.step", torch.ones(())),
        ("optimizer.0", torch.ones(())),
    ],
)
def test_a_whole_checkpoint_of_something_else_changes_nothing(small, save, tmp_path, name, tensor):
    with_tensor(save(small, 3), name, tensor)
    found = Checkpoints(tmp_path / "checkpoints", 2).latest()
    other = Small(seed=1)
    with pytest.raises((ValueError, IndexError)):
        found.restore(other.learning, other.optimizer)
    assert other.same(Small(seed=1))
