"""Every setting of training changes what a stage makes, or asks for."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import train.finetune
import train.loop.loop
import train.loop.tracking
import train.model.blocks
import train.pretrain
from cache.errors import PatchcacheError, SettingsError
from cache.remote.destination import Destination
from tests.settings_law import ODD_NUMBERS, leaves, merged, section_with
from train.model.blocks import compile_blocks
from train.settings import (
    CheckpointSettings,
    FinetuneSettings,
    LlmSettings,
    PretrainSettings,
    ProjectorSettings,
    TrackingSettings,
)
from workspace.paths import RUNS

pytestmark = pytest.mark.slow("trains once for each setting")

SHARED = {
    "llm": LlmSettings,
    "checkpoints": CheckpointSettings,
    "tracking": TrackingSettings,
}
SECTIONS = {
    "pretrain": SHARED | {"pretrain": PretrainSettings, "projector": ProjectorSettings},
    "finetune": SHARED | {"finetune": FinetuneSettings},
}
STAGES = {"pretrain": train.pretrain.pretrain, "finetune": train.finetune.finetune}

OTHER_MODEL = "the folder of another language model"
LOOP_CHANGES = {
    "epochs": 2,
    "learning_rate": 2e-2,
    "weight_decay": 0.5,
    "warmup_share": 0.9,
    "clip_norm": 1e-3,
    "texts_per_image": 1,
    "micro_batch_tokens": 32,
    "row_tokens": 24,
    "gradient_checkpointing": True,
    "compile": True,
    "max_text_tokens": 6,
    "order": "windowed",
    "window_shards": 1,
    "log_every_steps": 2,
    "validate_every_steps": 1,
    "validation_images": 1,
    "samples": 2,
}
CHANGES = {f"{stage}.{name}": value for stage in STAGES for name, value in LOOP_CHANGES.items()} | {
    "finetune.row_tokens": 96,
    "finetune.max_text_tokens": 16,
    "seed": 1,
    "llm.model": OTHER_MODEL,
    "llm.quantize": "nf4",
    "llm.dtype": "bf16",
    "projector.kind": "linear",
    "projector.pool": 2,
    "pretrain.batch_captions": 4,
    "finetune.batch_examples": 2,
    "finetune.projector_learning_rate": 2e-3,
    "finetune.lora.r": 2,
    "finetune.lora.alpha": 16,
    "finetune.lora.dropout": 0.5,
    "checkpoints.every_steps": 2,
    "checkpoints.every_minutes": 1e-9,
    "checkpoints.keep": 1,
    "checkpoints.to": "memory://runs",
    "tracking.wandb": "offline",
}
"""A value of each setting that is not the one of `tests/conftest.py`."""

NEEDED = {
    "pretrain.window_shards": {"pretrain": {"order": "windowed"}},
    "finetune.window_shards": {"finetune": {"order": "windowed"}},
    "pretrain.micro_batch_tokens": {"pretrain": {"row_tokens": 32}},
    # What is dropped depends on the number of a pass.
    "finetune.micro_batch_tokens": {"finetune": {"lora": {"dropout": 0.0}}},
    "finetune.row_tokens": {"finetune": {"lora": {"dropout": 0.0}}},
    "finetune.compile": {"finetune": {"lora": {"dropout": 0.0}}},
    "checkpoints.every_minutes": {"checkpoints": {"every_steps": 99}},
}
"""Other settings without which one does nothing, or does more than its own."""

ONLY_ROUNDING = {"micro_batch_tokens": "passes", "row_tokens": "passes", "compile": "compiled"}
"""How a step is computed, not what is learned; and what it changes: the cut into forward passes, or
whether blocks are compiled."""

ONLY_ASKED_FOR = {"samples": "samples", "gradient_checkpointing": "saved"}
"""Settings that change no bit of what is learned, and what else they change: the texts that are
generated, and the tensors that a step saves for its backward passes."""

BESIDE_THE_RUN = {"checkpoints": "checkpoints", "checkpoints.to": "sent", "tracking": "wandb"}
"""Sections that change nothing in what is learned, and what else they, or one setting, change."""

CASES = [
    (stage, leaf)
    for stage in STAGES
    for leaf in CHANGES
    if leaf == "seed" or leaf.partition(".")[0] in SECTIONS[stage]
]
NUMBERS = [
    (stage, leaf, value)
    for stage in STAGES
    for name, cls in SECTIONS[stage].items()
    if stage == "pretrain" or name not in SHARED
    for leaf, wanted in leaves(cls, name).items()
    for value in ODD_NUMBERS.get(wanted, ())
]


@pytest.fixture(scope="session")
def other_model(phi_dir, tmp_path_factory):
    """The folder of a language model with other weights."""
    folder = tmp_path_factory.mktemp("other") / "phi"
    shutil.copytree(phi_dir, folder)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: -w for name, w in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


@pytest.fixture
def observe(workspace, monkeypatch, other_model):
    """Run a stage with some sections changed and return what it made and what it asked for."""
    requests = {
        "wandb": [],
        "samples": [],
        "checkpoints": [],
        "sent": [],
        "passes": [],
        "saved": [],
        "compiled": [],
    }
    init, save, step = (
        train.loop.tracking.wandb.init,
        train.loop.loop.Checkpoints.save,
        train.loop.loop.optimizer_step,
    )

    def compiled(*arguments):
        requests["compiled"].append(len(arguments))
        return compile_blocks(*arguments, backend="aot_eager")

    # A backend that needs no compiler.
    monkeypatch.setattr(train.model.blocks, "compile_blocks", compiled)

    def started(**named):
        requests["wandb"].append(named["mode"])
        return init(**{**named, "mode": "disabled"})

    def saved(self, *arguments):
        path = save(self, *arguments)
        requests["checkpoints"].append([path.name for path in self.paths])
        return path

    def stepped(model, optimizer, data, **named):
        requests["passes"].append([tuple(batch.token_ids.shape) for batch in data.batches])
        kept = []

        def keep(tensor):
            kept.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = step(model, optimizer, data, **named)
        requests["saved"].append(kept)
        return loss

    put = Destination.put

    def sent(self, name, content):
        requests["sent"].append(name)
        put(self, name, content)

    monkeypatch.setattr(Destination, "put", sent)
    monkeypatch.setattr(train.loop.tracking.wandb, "init", started)
    monkeypatch.setattr(train.loop.loop.Checkpoints, "save", saved)
    monkeypatch.setattr(train.loop.loop, "optimizer_step", stepped)
    monkeypatch.setattr(
        train.loop.tracking.Tracker,
        "log_samples",
        lambda self, *rows: requests["samples"].append(rows),
    )
    # Images of both shards, so that windows of one and of two shards differ.
    captions = [
        (i, split, f"a {color} {animal} in the box")
        for split, ids in (
            ("train", (*range(100, 106), *range(130, 136))),
            ("val", range(112, 116)),
        )
        for i in ids
        for color, animal in (("red", "cat"), ("blue", "dog"))
    ]
    turns = [[("What is on the box", "a red cat"), ("how many", "the dog")], [("no", "yes")]]
    ids = {"train": (*range(100, 106), *range(130, 136)), "holdout": range(116, 120)}
    conversations = [(i, split, said) for split in ids for i in ids[split] for said in turns]
    workspace.write_index(captions, conversations)

    def run(stage, changes):
        for made in requests.values():
            made.clear()
        shutil.rmtree(RUNS, ignore_errors=True)
        shutil.rmtree(".work", ignore_errors=True)
        (RUNS / "pretrain").mkdir(parents=True)
        if stage == "finetune":
            # Of no model in particular: which one is asked is a setting.
            workspace.write_stage_1(language_model=None)
        text = workspace.params().values
        values = merged(text, changes)
        if values["llm"]["model"] == OTHER_MODEL:
            values["llm"]["model"] = str(other_model)
        STAGES[stage](workspace.params(**values))
        learned = {path.name: load_file(path) for path in (RUNS / stage).rglob("*.safetensors")}
        metrics = workspace.json(f"runs/{stage}/metrics.json")
        torch._dynamo.reset()
        return {
            "weights": {name: w for one in learned.values() for name, w in one.items()},
            "history": [_without_clock(row) for row in workspace.history(stage)],
            "metrics": _without_clock(metrics),
            **{name: list(made) for name, made in requests.items()},
        }

    return run


def _without_clock(values):
    clock = ("seconds", "per_second", "wait_share", "memory")
    return {name: v for name, v in values.items() if not any(part in name for part in clock)}


def differing(one, other):
    """Return the names under which two observations differ, bit by bit."""
    same_weights = one["weights"].keys() == other["weights"].keys() and all(
        torch.equal(one["weights"][name], other["weights"][name]) for name in one["weights"]
    )
    names = {name for name in one if name != "weights" and one[name] != other[name]}
    return names | ({"weights"} if not same_weights else set())


@pytest.fixture(scope="module")
def usual():
    """What was observed without the change, by stage and by what the change needs."""
    return {}


@pytest.mark.parametrize(("stage", "leaf"), CASES)
def test_a_setting_changes_what_is_learned_or_asked_for(observe, usual, stage, leaf):
    needed = NEEDED.get(leaf, {})
    key = stage, str(needed)
    if key not in usual:
        usual[key] = observe(stage, needed)
    changed = observe(stage, merged(needed, section_with(leaf, CHANGES[leaf])))
    found = differing(usual[key], changed)
    assert found, "the setting is not wired to anything"
    section, name = leaf.partition(".")[::2]
    if section in BESIDE_THE_RUN:
        assert found == {BESIDE_THE_RUN.get(leaf, BESIDE_THE_RUN[section])}
    elif name in ONLY_ROUNDING:
        assert ONLY_ROUNDING[name] in found
        for weight, before in usual[key]["weights"].items():
            torch.testing.assert_close(changed["weights"][weight], before, rtol=1e-3, atol=1e-4)
        losses = [[float(row["loss"]) for row in one["history"]] for one in (usual[key], changed)]
        np.testing.assert_allclose(*losses, rtol=1e-4)
    elif name in ("log_every_steps", "validate_every_steps", "validation_images"):
        assert "history" in found
        assert "weights" not in found
    elif name in ONLY_ASKED_FOR:
        assert found == {ONLY_ASKED_FOR[name]}
    else:
        assert "weights" in found


@pytest.mark.parametrize("stage", STAGES)
def test_the_same_settings_make_the_same_run(observe, stage):
    assert not differing(observe(stage, {}), observe(stage, {}))


@pytest.mark.parametrize(("stage", "leaf", "value"), NUMBERS)
def test_an_odd_number_is_refused_by_name_or_works(observe, stage, leaf, value):
    # Of the orders, the one that also computes with numbers of shards; texts take their time.
    usual = {stage: {"order": "windowed", "samples": 0}}
    changes = merged(usual, section_with(leaf, value))
    refusal = refusal_of(observe, stage, changes)
    assert refusal is None or "\n" not in str(refusal)
    if isinstance(refusal, SettingsError):
        assert leaf.rpartition(".")[2] in str(refusal)
        assert len(str(refusal)) < 500


def refusal_of(observe, stage, changes):
    """Return the error of ours with which a stage ends, if it ends with one."""
    try:
        observe(stage, changes)
    except PatchcacheError as error:
        return error
    return None
