import errno
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from cache import FeatureStore
from cache.files.atomic import sha256_of
from train.run import (
    LIBRARIES,
    RunDirectory,
    git_commit,
    provenance,
    run_identity,
    stage_lock,
)
from workspace.errors import StageError
from workspace.paths import CAPTIONS, CONVERSATIONS, FEATURES, RUNS, UNFINISHED_RUNS

REPORT = Path("reports/pretrain.json")
PUBLISHED = {"params.yaml", "provenance.json", "metrics.json", "history.csv"}


NOW = "2026-03-01T08:00:00Z"


@pytest.fixture(autouse=True)
def _clock(monkeypatch):
    monkeypatch.setattr("train.run.utc_now", lambda: NOW)


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_nothing_is_seen_before_it_is_published_whole(workspace):
    run = RunDirectory("pretrain", workspace.params(), {}, {"git_commit": "x"})
    run.write_history([{"step": 1, "loss": 2.0}])
    assert not RUNS.exists()
    run.publish({"loss": 2.0}, REPORT)
    assert names(RUNS / "pretrain") == PUBLISHED
    assert names(RUNS) == {"pretrain"}
    assert workspace.json("runs/pretrain/metrics.json") == {"loss": 2.0}
    assert workspace.json("runs/pretrain/provenance.json") == {
        "git_commit": "x",
        "finished_utc": NOW,
        "weights_sha256": {},
    }
    assert workspace.json("reports/pretrain.json") == {"loss": 2.0}
    assert not any(UNFINISHED_RUNS.joinpath("pretrain").iterdir())


def test_settings_are_those_that_the_run_began_with(workspace):
    params = workspace.params(seed=5)
    before = params.path.read_bytes()
    run = RunDirectory("pretrain", params, {}, {})
    workspace.params(seed=6)
    run.publish({}, REPORT)
    assert (RUNS / "pretrain/params.yaml").read_bytes() == before


def test_an_older_run_is_replaced_whole(workspace):
    first = RunDirectory("pretrain", workspace.params(), {}, {})
    (first.files / "old.txt").write_text("old")
    first.publish({"loss": 1}, REPORT)
    second = RunDirectory("pretrain", workspace.params(), {}, {})
    assert "old.txt" in names(RUNS / "pretrain"), "until the next is finished"
    second.publish({"loss": 2}, REPORT)
    assert "old.txt" not in names(RUNS / "pretrain")
    assert workspace.json("runs/pretrain/metrics.json") == {"loss": 2}


def test_no_half_run_is_there_while_an_older_one_is_deleted(workspace, monkeypatch):
    def make(loss):
        run = RunDirectory("pretrain", workspace.params(), {}, {})
        run.write_history([])
        run.publish({"loss": loss}, REPORT)

    make(1)
    seen = []

    def watched(function):
        def look_and_do(path, *rest, **named):
            for step in (None, function, None):
                if step:
                    step(path, *rest, **named)
                elif RUNS.joinpath("pretrain").exists():
                    seen.append(names(RUNS / "pretrain"))

        return look_and_do

    rmtree = shutil.rmtree

    def remove(path, ignore_errors=False):
        assert RUNS not in path.parents, "what readers see is never deleted piece by piece"
        rmtree(path, ignore_errors)

    monkeypatch.setattr(os, "replace", watched(os.replace))
    monkeypatch.setattr(shutil, "rmtree", watched(remove))
    make(2)
    assert len(seen) > 3
    assert all(found == PUBLISHED for found in seen)


def test_a_run_is_published_on_another_disk(workspace, monkeypatch):
    replace = os.replace

    def within_a_disk(source, target):
        if (RUNS in Path(source).parents) != (RUNS in Path(target).parents):
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(source), None, str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", within_a_disk)
    for loss in (1, 2):
        run = RunDirectory("pretrain", workspace.params(), {}, {})
        run.write_history([])
        run.publish({"loss": loss}, REPORT)
        assert [path.name for path in RUNS.iterdir()] == ["pretrain"]
        assert names(RUNS / "pretrain") == PUBLISHED
        assert workspace.json("runs/pretrain/metrics.json") == {"loss": loss}


def test_what_a_killed_run_left_is_not_taken_over(workspace):
    (RunDirectory("pretrain", workspace.params(), {}, {}).files / "left.txt").write_text("x")
    RunDirectory("pretrain", workspace.params(), {}, {}).publish({}, REPORT)
    assert "left.txt" not in names(RUNS / "pretrain")


def checkpoint(run, name="step-00000001.safetensors"):
    run.checkpoints.mkdir(exist_ok=True)
    (run.checkpoints / name).write_bytes(b"x")


def test_the_same_inputs_find_their_checkpoints_and_others_do_not(workspace):
    params = workspace.params()
    first = RunDirectory("pretrain", params, {"seed": 0, "features": "a"}, {})
    checkpoint(first)
    again = RunDirectory("pretrain", params, {"features": "a", "seed": 0}, {})
    assert names(again.checkpoints) == {"step-00000001.safetensors"}
    for other in ({"seed": 1, "features": "a"}, {"seed": 0}, {"seed": 0, "features": "b"}):
        assert not RunDirectory("pretrain", params, other, {}).checkpoints.exists()
    assert not RunDirectory(
        "finetune", params, {"seed": 0, "features": "a"}, {}
    ).checkpoints.exists()


def test_it_says_in_one_line_why_it_starts_afresh(workspace, capsys):
    params = workspace.params()
    RunDirectory("pretrain", params, {"seed": 0}, {})
    assert capsys.readouterr().err == "", "there was nothing"
    first = RunDirectory("pretrain", params, {"seed": 0, "pretrain.epochs": 1, "llm": "x"}, {})
    assert capsys.readouterr().err == "", "there was no checkpoint"
    checkpoint(first)
    other = {"seed": 1, "llm": "x", "features": "f"}
    RunDirectory("pretrain", params, other, {})
    folder = first.checkpoints.parent
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"pretrain: starts afresh. The checkpoints in {folder}")
    for name in ("features none there, f here", "pretrain.epochs 1 there, none here",
                 "seed 0 there, 1 here"):  # fmt: skip
        assert name in said
    assert "llm" not in said
    RunDirectory("pretrain", params, other, {})
    assert capsys.readouterr().err == "", "it is not said again"


def test_of_several_unfinished_runs_it_names_the_one_that_was_begun_last(workspace, capsys):
    params = workspace.params()
    for seed, begun in ((0, 1_000), (1, 3_000), (2, 2_000)):
        run = RunDirectory("pretrain", params, {"seed": seed}, {})
        checkpoint(run)
        os.utime(run.checkpoints.parent, (begun, begun))
    capsys.readouterr()
    RunDirectory("pretrain", params, {"seed": 3}, {})
    assert "seed 1 there, 3 here" in capsys.readouterr().err


def test_that_a_run_was_continued_is_in_its_provenance(workspace, capsys):
    run = RunDirectory("pretrain", workspace.params(), {}, {"device": "CPU"})
    run.continue_after(3, 9)
    assert capsys.readouterr().err == "pretrain: going on after step 3 of 9\n"
    run.publish({}, REPORT)
    assert workspace.json("runs/pretrain/provenance.json") == {
        "device": "CPU",
        "continued_after_step": 3,
        "finished_utc": NOW,
        "weights_sha256": {},
    }


def test_a_continued_run_keeps_its_name_for_wandb_and_one_that_is_run_again_gets_another(workspace):
    params = workspace.params()
    first = RunDirectory("pretrain", params, {}, {})
    name = first.tracking_id()
    assert name == first.tracking_id()
    assert name == RunDirectory("pretrain", params, {}, {}).tracking_id()
    first.publish({}, REPORT)
    assert "tracking_id" not in names(RUNS / "pretrain")
    assert name != RunDirectory("pretrain", params, {}, {}).tracking_id()


@pytest.mark.usefixtures("workspace")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_one_command_at_a_time_has_the_runs_of_a_stage():
    """Another process: a lock does not keep its own out."""

    def refused(stage):
        child = os.fork()
        if child == 0:
            code = 2
            try:
                with stage_lock(stage):
                    code = 0
            except StageError:
                code = 1
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    with stage_lock("pretrain"):
        assert refused("pretrain") == 1
        assert refused("finetune") == 0
    assert refused("pretrain") == 0


@pytest.mark.usefixtures("workspace")
def test_what_decides_a_run_has_a_name_each(workspace):
    store = FeatureStore(FEATURES)
    made = run_identity(workspace.params(), ("llm", "finetune"), store, language_model="abc")
    assert made["seed"] == 0
    assert made["llm.quantize"] == "none"
    assert made["finetune.lora.dropout"] == 0.05
    assert made["features"] == store.fingerprint
    assert made["features_sha256"] == sha256_of(FEATURES / "index.parquet")
    assert made["captions.parquet_sha256"] == sha256_of(CAPTIONS)
    assert made["conversations.parquet_sha256"] == sha256_of(CONVERSATIONS)
    assert made["language_model"] == "abc"
    sections = {name.partition(".")[0] for name in made}
    assert not sections & {"pretrain", "checkpoints", "tracking", "evaluate"}


@pytest.mark.usefixtures("workspace")
def test_the_setting_of_the_prompt_decides_nothing_but_the_format_that_it_stands_for(
    workspace, prompt_format, chat_prompts
):
    store = FeatureStore(FEATURES)

    def identity(made, **llm):
        return run_identity(workspace.params(llm=llm), ["llm"], store, **made.identity())

    wanted = identity(prompt_format)
    assert wanted == identity(prompt_format, prompt="auto") == identity(prompt_format, prompt="phi")
    assert not any("prompt" in name for name in wanted), "runs from before there were formats"
    assert identity(chat_prompts)["prompt"].startswith("chat ")
    assert identity(chat_prompts) == identity(chat_prompts, prompt="chat")


@pytest.mark.usefixtures("workspace")
def test_a_run_may_go_on_with_gradient_checkpointing(workspace):
    store = FeatureStore(FEATURES)
    made = [
        run_identity(
            workspace.params(finetune={"gradient_checkpointing": value}), ["finetune"], store
        )
        for value in (False, True)
    ]
    assert made[0] == made[1]
    assert not any("checkpointing" in name for name in made[0])


@pytest.mark.usefixtures("workspace")
def test_a_run_from_before_the_pool_keeps_its_identity(workspace):
    store = FeatureStore(FEATURES)
    absent, one, two = (
        run_identity(workspace.params(projector={"kind": "mlp", **pool}), ["projector"], store)
        for pool in ({}, {"pool": 1}, {"pool": 2})
    )
    assert absent == one
    assert two == absent | {"projector.pool": 2}


@pytest.mark.usefixtures("workspace")
def test_provenance_names_code_features_texts_libraries_and_device():
    store = FeatureStore(FEATURES)
    made = provenance(store, torch.device("cpu"))
    assert set(made) == {
        "git_commit", "features_fingerprint", "index_sha256", "versions", "device", "processes",
    }  # fmt: skip
    assert made["features_fingerprint"] == store.fingerprint
    assert made["index_sha256"] == {
        path.name: sha256_of(path) for path in (CAPTIONS, CONVERSATIONS)
    }
    assert set(made["versions"]) == set(LIBRARIES)
    assert made["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert made["device"].startswith("CPU")
    assert made["processes"] == 1


@pytest.mark.parametrize("error", [FileNotFoundError, subprocess.CalledProcessError(128, "git")])
def test_code_outside_git_has_no_commit(monkeypatch, error):
    def fail(*_, **__):
        raise error

    assert len(git_commit().partition("+")[0]) == 40
    monkeypatch.setattr(subprocess, "run", fail)
    assert git_commit() == "unknown: not a git checkout"


def test_the_provenance_names_the_weights_that_are_published(workspace):
    run = RunDirectory("finetune", workspace.params(), {}, {})
    weights = {"projector.safetensors": b"p", "adapter/adapter_model.safetensors": b"a"}
    for name, data in weights.items():
        (run.files / name).parent.mkdir(exist_ok=True)
        (run.files / name).write_bytes(data)
    run.publish({}, REPORT)
    wanted = {name: hashlib.sha256(data).hexdigest() for name, data in weights.items()}
    assert workspace.json("runs/finetune/provenance.json")["weights_sha256"] == wanted
