from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train.loop.loop
import train.stages.conversations
from cache.errors import SettingsError
from cache.files.atomic import sha256_of
from train.finetune import finetune
from train.model.language_model import load_language_model, load_lora
from train.model.projector import load_projector, seeded_projector
from train.pretrain import pretrain
from train.settings import LlmSettings
from workspace.errors import StageError

FILES = {
    "projector.safetensors", "adapter", "metrics.json", "history.csv", "params.yaml",
    "provenance.json",
}  # fmt: skip
START = Path("runs/pretrain/projector.safetensors")
END = Path("runs/finetune/projector.safetensors")
TRAIN = set(range(100, 112))


@pytest.fixture
def pretrained(workspace):
    workspace.write_stage_1()
    return workspace


@pytest.fixture
def record(monkeypatch):
    """Record the base weights before, the model after, and the images that are learned from."""
    seen = {"images": []}
    load, step = train.stages.conversations.load_language_model, train.loop.loop.optimizer_step

    def loading(*arguments):
        seen["model"] = load(*arguments)
        seen["before"] = {n: t.clone() for n, t in seen["model"].state_dict().items()}
        return seen["model"]

    def stepping(model, optimizer, data, **named):
        seen["images"].extend(data.image_ids)
        return step(model, optimizer, data, **named)

    monkeypatch.setattr(train.stages.conversations, "load_language_model", loading)
    monkeypatch.setattr(train.loop.loop, "optimizer_step", stepping)
    return seen


@pytest.mark.parametrize(("quantize", "dtype"), [("none", "fp32"), ("nf4", "bf16")])
def test_a_run_is_complete_and_projector_and_lora_have_learned(pretrained, record, quantize, dtype):
    llm = {"quantize": quantize, "dtype": dtype}
    finetune(pretrained.params(llm=llm))
    run = Path("runs/finetune")
    assert {path.name for path in run.iterdir()} == FILES
    metrics = pretrained.json("runs/finetune/metrics.json")
    assert pretrained.json("reports/finetune.json") == metrics
    assert (metrics["images"], metrics["texts"], metrics["steps"]) == (12, 12, 3)
    assert "validation_loss" in metrics
    after = {n.replace(".base_layer", ""): t for n, t in record["model"].state_dict().items()}
    before = record["before"]
    assert all(torch.equal(after[name], before[name]) for name in before)
    start, end = (load_projector(path, 8, 64).state_dict() for path in (START, END))
    assert not any(torch.equal(start[name], end[name]) for name in start)
    lora = load_file(run / "adapter/adapter_model.safetensors")
    assert len(lora) == 2 * 6 * 2
    assert all(matrix.any() for matrix in lora.values()), "no second matrix is still zero"
    model = load_language_model(
        LlmSettings(model=str(pretrained.phi_dir), **llm), torch.device("cpu")
    )
    load_lora(model, run / "adapter")


def test_held_out_images_are_never_learned_from(pretrained, record):
    finetune(pretrained.params(finetune={"epochs": 2}))
    assert set(record["images"]) == TRAIN
    assert len(record["images"]) == 2 * len(TRAIN)


def test_the_same_inputs_give_the_same_files(pretrained):
    def made():
        torch.manual_seed(len(list(Path().rglob("*"))))
        finetune(pretrained.params())
        return [
            Path("runs/finetune", name).read_bytes()
            for name in ("projector.safetensors", "adapter/adapter_model.safetensors")
        ]

    assert made() == made()


def test_the_projector_and_lora_have_learning_rates_of_their_own(pretrained):
    finetune(pretrained.params(finetune={"projector_learning_rate": 1e-12}))
    start, end = (load_projector(path, 8, 64).state_dict() for path in (START, END))
    assert all(torch.allclose(start[name], end[name], atol=1e-9) for name in start)
    lora = load_file("runs/finetune/adapter/adapter_model.safetensors")
    assert all(m.abs().max() > 1e-4 for n, m in lora.items() if "lora_B" in n)


def test_stage_2_pools_as_the_projector_of_stage_1_does(workspace):
    pretrain(workspace.params(projector={"kind": "mlp", "pool": 2}))
    finetune(workspace.params())
    assert workspace.json("runs/finetune/metrics.json")["image_tokens"] == 1
    assert load_projector(END, 8, 64).pool == 2


def test_a_projector_whose_pool_does_not_divide_the_grid_is_refused(workspace):
    workspace.write_stage_1()
    seeded_projector("mlp", 8, 64, 0, 4).save(START)
    with pytest.raises(SettingsError, match=r"projector.safetensors: pool is 4, .* grid of 2 x 2"):
        finetune(workspace.params())


def test_without_a_holdout_there_is_no_validation_and_the_run_is_published(pretrained):
    turns = [("where", "in the box")]
    pretrained.write_index([(100, "train", "x")], [(i, "train", turns) for i in sorted(TRAIN)])
    finetune(pretrained.params())
    assert "validation_loss" not in pretrained.json("runs/finetune/metrics.json")


def test_without_a_pretrained_projector_it_says_what_to_run(workspace):
    with pytest.raises(StageError, match=r"runs/pretrain/projector.safetensors: no projector"):
        finetune(workspace.params())
    assert not Path("runs/finetune").exists()


def test_a_projector_for_another_language_model_is_refused(workspace):
    seeded_projector("mlp", 8, 128, 0).save(START)
    with pytest.raises(StageError, match=r"maps width 8 to 128, wanted 8 .features. to 64"):
        finetune(workspace.params())


def test_without_conversations_the_run_is_stage_1s_projector(pretrained, record, capsys):
    pretrained.write_index([(100, "train", "x")], [])
    finetune(pretrained.params())
    run = Path("runs/finetune")
    assert {path.name for path in run.iterdir()} == FILES - {"adapter"}
    metrics = pretrained.json("runs/finetune/metrics.json")
    assert metrics == {"steps": 0, "images": 0, "texts": 0, "image_tokens": 4}
    assert pretrained.json("reports/finetune.json") == metrics
    assert pretrained.history("finetune") == []
    assert END.read_bytes() == START.read_bytes()
    made = pretrained.json("runs/finetune/provenance.json")
    assert "no conversations" in made["untrained"]
    assert made["start_projector_sha256"] == sha256_of(START)
    assert "model" not in record, "the language model takes gigabytes"
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("finetune: 0 steps, because there are no conversations")


def test_stage_2_trains_the_fresh_projector_of_an_untrained_stage_1(workspace):
    workspace.write_index([], [(i, "train", [("where", "in the box")]) for i in sorted(TRAIN)])
    pretrain(workspace.params())
    finetune(workspace.params())
    start, end = (load_projector(path, 8, 64).state_dict() for path in (START, END))
    assert not any(torch.equal(start[name], end[name]) for name in start)
    assert workspace.json("runs/finetune/metrics.json")["steps"] == 3


def test_held_out_conversations_alone_are_an_error(pretrained):
    turns = [("where", "in the box")]
    pretrained.write_index([(100, "train", "x")], [(116, "holdout", turns)])
    with pytest.raises(StageError, match="finetune: no text to learn from"):
        finetune(pretrained.params())
    assert not END.exists()


def test_an_untrained_projector_without_conversations_is_no_run(workspace):
    workspace.write_index([], [(100, "train", [("where", "in the box")])])
    pretrain(workspace.params())
    workspace.write_index([], [])
    with pytest.raises(StageError, match="finetune: nothing to train on"):
        finetune(workspace.params())
    assert not END.exists()
