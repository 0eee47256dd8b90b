import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cache.errors import PatchcacheError, SpecMismatchError
from cache.files.atomic import sha256_of
from tests.conftest import write_store
from train.finetune import finetune
from train.model.fingerprint import language_model_identity
from train.model.language_model import load_tokenizer
from train.provenance import read_provenance
from train.settings import LlmSettings
from workspace.errors import StageError

PROVENANCE = Path("runs/pretrain/provenance.json")


def identity(folder, quantize="none", dtype="fp32"):
    settings = LlmSettings(model=str(folder), quantize=quantize, dtype=dtype)
    found = language_model_identity(settings, load_tokenizer(settings))
    return {part: digest for part, digest in found.items() if part != "name"}


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(folder):
    """Store the same tensors in two files, as large models are."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, part in files.items() for name in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def change_weight(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.bias"][-1] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_activation(folder):
    change_json(folder / "config.json", hidden_act="relu")


def change_frequencies(folder):
    rope = {"partial_rotary_factor": 0.5, "rope_theta": 500.0, "rope_type": "default"}
    change_json(folder / "config.json", rope_parameters=rope)


def swap_tokens(folder):
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(values))


def drop_merge(folder):
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["merges"].pop()
    path.write_text(json.dumps(values))


def lowercase(folder):
    change_json(folder / "tokenizer.json", normalizer={"type": "Lowercase"})


def rename_writer(folder):
    entries = {"transformers_version": "4.0", "torch_dtype": "float16", "use_cache": False}
    change_json(folder / "config.json", _name_or_path="elsewhere", **entries)


SAME = [lambda folder: None, shard, rename_writer]
OTHERS = {
    change_weight: "weights",
    change_activation: "config",
    change_frequencies: "config",
    swap_tokens: "tokenizer",
    drop_merge: "tokenizer",
    lowercase: "tokenizer",
}


@pytest.fixture
def copied(phi_dir, tmp_path):
    """The same language model at another place."""
    return Path(shutil.copytree(phi_dir, tmp_path / "elsewhere" / "phi"))


@pytest.mark.parametrize("change", SAME)
def test_the_same_weights_are_the_same_model_wherever_and_however_they_lie(phi_dir, copied, change):
    change(copied)
    assert identity(copied) == identity(phi_dir)


@pytest.mark.parametrize("change", OTHERS)
def test_what_decides_numbers_changes_the_identity_of_its_part(phi_dir, copied, change):
    before = identity(phi_dir)
    change(copied)
    after = identity(copied)
    assert {part for part in before if after[part] != before[part]} == {OTHERS[change]}


def test_quantisation_and_type_change_no_identity(phi_dir):
    kinds = [("none", "fp32"), ("nf4", "fp32"), ("nf4", "bf16")]
    assert len({json.dumps(identity(phi_dir, *kind)) for kind in kinds}) == 1


def test_a_hub_id_has_the_identity_of_its_files(phi_dir, tmp_path, monkeypatch):
    folder = tmp_path / "hub/models--nobody--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("0" * 40)
    shutil.copytree(phi_dir, folder / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert identity("nobody/tiny") == identity(phi_dir)


@pytest.fixture
def no_model(monkeypatch):
    """Fail where the language model would be loaded."""

    def loaded(*_):
        raise AssertionError("the language model was loaded")

    monkeypatch.setattr("train.stages.conversations.load_language_model", loaded)


@pytest.mark.parametrize("change", OTHERS)
def test_stage_2_refuses_a_projector_of_another_language_model(workspace, copied, no_model, change):
    workspace.write_stage_1()
    change(copied)
    with pytest.raises(StageError) as error:
        finetune(workspace.params(llm={"model": str(copied)}))
    words = (str(PROVENANCE), str(workspace.phi_dir), str(copied), OTHERS[change])
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_stage_2_accepts_the_same_language_model_at_another_place(workspace, copied, capsys):
    workspace.write_stage_1()
    shard(copied)
    finetune(workspace.params(llm={"model": str(copied), "quantize": "nf4"}))
    assert "cannot check" not in capsys.readouterr().err
    made_from = workspace.json("runs/finetune/provenance.json")
    assert made_from["language_model"] == identity(copied) | {"name": str(copied)}


def test_stage_2_refuses_a_projector_that_learned_from_other_features(workspace, no_model):
    workspace.write_stage_1(features_fingerprint="0" * 64)
    with pytest.raises(SpecMismatchError, match="features of fingerprint 000000000000, data/feat"):
        finetune(workspace.params())


@pytest.mark.parametrize("changes", [{}, {"learning_rate": 0.5}])
def test_stage_2_says_which_settings_of_stage_1_are_others_now(workspace, capsys, changes):
    workspace.write_stage_1()
    params = workspace.params()
    stage_1 = workspace.params(pretrain=dict(params.values["pretrain"]) | changes)
    workspace.write("runs/pretrain/params.yaml", stage_1.text)
    finetune(workspace.params())
    usual = params.values["pretrain"]["learning_rate"]
    text = f"trained with other settings: pretrain.learning_rate 0.5 (now {usual})"
    assert (text in capsys.readouterr().err) is bool(changes)


@pytest.mark.parametrize("pool", [1, 2])
def test_a_stage_1_from_before_the_pool_has_no_other_settings(workspace, capsys, pool):
    workspace.write_stage_1()
    workspace.write("runs/pretrain/params.yaml", workspace.params().text)
    finetune(workspace.params(projector={"kind": "mlp", "pool": pool}))
    assert ("projector.pool None (now 2)" in capsys.readouterr().err) is (pool == 2)


def test_other_images_of_the_same_features_are_no_other_features(workspace):
    workspace.write_stage_1()
    shutil.rmtree("data/features")
    write_store(Path("data/features"), range(100, 130))
    finetune(workspace.params())


def test_the_projector_of_an_earlier_version_is_taken_with_a_word(workspace, capsys):
    workspace.write_stage_1(language_model=None)
    finetune(workspace.params())
    lines = [line for line in capsys.readouterr().err.splitlines() if "cannot check" in line]
    assert len(lines) == 1
    assert str(PROVENANCE) in lines[0]


@pytest.mark.parametrize(
    "text",
    [None, "", "[]", "{}", "[" * 10**5, '{"features_fingerprint": 3}', "\udcff",
     '{"features_fingerprint": "FOUND", "language_model": "phi"}',
     '{"features_fingerprint": "FOUND", "language_model": {"name": "x", "weights": 3}}'],
)  # fmt: skip
def test_a_damaged_provenance_of_stage_1_is_one_line(workspace, no_model, text):
    workspace.write_stage_1()
    found = json.loads(PROVENANCE.read_text())["features_fingerprint"]
    PROVENANCE.unlink()
    if text is not None:
        PROVENANCE.write_text(text.replace("FOUND", found), errors="surrogateescape")
    with pytest.raises(PatchcacheError) as error:
        finetune(workspace.params())
    assert str(error.value).startswith(str(PROVENANCE))
    assert "\n" not in str(error.value)


def test_a_run_is_refused_whose_weights_are_not_those_that_it_ended_with(tmp_path):
    (tmp_path / "adapter").mkdir()
    names = ("projector.safetensors", "adapter/adapter_model.safetensors")
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    hashes = {name: sha256_of(tmp_path / name) for name in names}
    path = tmp_path / "provenance.json"
    path.write_text(json.dumps({"features_fingerprint": "f", "weights_sha256": hashes}))
    assert read_provenance(path)["weights_sha256"] == hashes
    for name in names:
        kept = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        with pytest.raises(StageError, match=rf"{name}: sha256 no such file, but the run ended"):
            read_provenance(path)
        (tmp_path / name).write_bytes(b"of another run")
        with pytest.raises(StageError, match=rf"{name}: sha256 [0-9a-f]+, but the run ended"):
            read_provenance(path)
        (tmp_path / name).write_bytes(kept)
    assert read_provenance(path)
