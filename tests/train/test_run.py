import os
import shutil
import subprocess

import pytest
import torch

from cache import FeatureStore
from cache.files import sha256_of
from train.data import CAPTIONS, CONVERSATIONS, FEATURES
from train.run import LIBRARIES, RUNS, RunDirectory, git_commit, provenance

PUBLISHED = {"params.yaml", "provenance.json", "metrics.json", "history.csv"}


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_nothing_is_seen_before_it_is_published_whole(workspace):
    run = RunDirectory("pretrain", workspace.params(), {"git_commit": "x"})
    run.write_history([{"step": 1, "loss": 2.0}])
    assert not RUNS.exists()
    run.publish({"loss": 2.0})
    assert names(RUNS / "pretrain") == PUBLISHED
    assert names(RUNS) == {"pretrain"}
    assert workspace.json("runs/pretrain/metrics.json") == {"loss": 2.0}
    assert workspace.json("runs/pretrain/provenance.json") == {"git_commit": "x"}
    assert not any((workspace.root / ".work/runs").iterdir())


def test_settings_are_those_that_the_run_began_with(workspace):
    params = workspace.params(seed=5)
    before = params.path.read_bytes()
    run = RunDirectory("pretrain", params, {})
    workspace.params(seed=6)
    run.publish({})
    assert (RUNS / "pretrain/params.yaml").read_bytes() == before


def test_an_older_run_is_replaced_whole(workspace):
    first = RunDirectory("pretrain", workspace.params(), {})
    (first.path / "old.txt").write_text("old")
    first.publish({"loss": 1})
    second = RunDirectory("pretrain", workspace.params(), {})
    assert "old.txt" in names(RUNS / "pretrain"), "until the next is finished"
    second.publish({"loss": 2})
    assert "old.txt" not in names(RUNS / "pretrain")
    assert workspace.json("runs/pretrain/metrics.json") == {"loss": 2}


def test_no_half_run_is_there_while_an_older_one_is_deleted(workspace, monkeypatch):
    def make(loss):
        run = RunDirectory("pretrain", workspace.params(), {})
        run.write_history([])
        run.publish({"loss": loss})

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


def test_what_a_killed_run_left_is_not_taken_over(workspace):
    (RunDirectory("pretrain", workspace.params(), {}).path / "left.txt").write_text("x")
    RunDirectory("pretrain", workspace.params(), {}).publish({})
    assert "left.txt" not in names(RUNS / "pretrain")


@pytest.mark.usefixtures("workspace")
def test_provenance_names_code_features_texts_libraries_and_device():
    store = FeatureStore(FEATURES)
    made = provenance(store, torch.device("cpu"))
    assert set(made) == {
        "git_commit", "features_fingerprint", "index_sha256", "versions", "device",
    }  # fmt: skip
    assert made["features_fingerprint"] == store.fingerprint
    assert made["index_sha256"] == {
        path.name: sha256_of(path) for path in (CAPTIONS, CONVERSATIONS)
    }
    assert set(made["versions"]) == set(LIBRARIES)
    assert made["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert made["device"].startswith("CPU")


@pytest.mark.parametrize("error", [FileNotFoundError, subprocess.CalledProcessError(128, "git")])
def test_code_outside_git_has_no_commit(monkeypatch, error):
    def fail(*_, **__):
        raise error

    assert len(git_commit().partition("+")[0]) == 40
    monkeypatch.setattr(subprocess, "run", fail)
    assert git_commit() == "unknown: not a git checkout"
