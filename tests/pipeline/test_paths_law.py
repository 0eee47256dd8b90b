"""Whatever a path of the settings means, a stage refuses it in one line that names it, at once."""

import contextlib
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from cache.errors import PatchcacheError
from eval.compare import compare
from eval.runs import read_history
from eval.systems.coco_files import read_captions
from pipeline.extract import extract
from pipeline.index import index
from tests.pipeline.test_index import Workspace as IndexWorkspace
from train.model.language_model import load_language_model, load_tokenizer
from train.settings import LlmSettings
from workspace.settings import Params

SECONDS = 10

IN_PLACE = {
    "a pipe": os.mkfifo,
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "an empty device": lambda path: path.symlink_to("/dev/null"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "nothing": lambda path: None,
    "an empty folder": lambda path: path.mkdir(),
    "an empty file": lambda path: path.touch(),
}

OF_THE_INDEX = {
    "data.train.images": "train.zip",
    "data.train.captions": "captions_train.json",
    "data.val.images": "val.zip",
    "data.val.captions": "captions_val.json",
    "data.instruct": "instruct.json",
    "--params": "params.yaml",
}
OF_EXTRACT = {
    "data.train.images": "train",
    "data.val.images": "val",
    "encoder.model": "tiny-vit.json",
    "encoder.pretrained": "weights.pt",
    "--params": "params.yaml",
}
OF_THE_LANGUAGE_MODEL = ("", "config.json", "tokenizer.json", "model.safetensors")


@contextlib.contextmanager
def limited():
    """Let what waits for ever fail instead."""
    rung = []

    def ring(*_):
        rung.append("waited")
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        assert rung == []


def put(kind, path):
    """Put something else in the place of what a path names."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    IN_PLACE[kind](path)


def check_refused(work, name):
    with limited(), pytest.raises((PatchcacheError, OSError)) as refused:
        work()
    text = str(refused.value)
    assert name in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize("leaf", OF_THE_INDEX)
def test_the_index(tmp_path, monkeypatch, leaf, kind):
    monkeypatch.chdir(tmp_path)
    workspace = IndexWorkspace()
    workspace.run()
    put(kind, Path(OF_THE_INDEX[leaf]))
    check_refused(lambda: index(Params.read(Path("params.yaml"))), OF_THE_INDEX[leaf])


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize("leaf", OF_EXTRACT)
def test_extract(make_workspace, monkeypatch, leaf, kind):
    weights = "weights.pt" if leaf == "encoder.pretrained" else "random"
    workspace = make_workspace(image_ids=[1, 5], encoder={"pretrained": weights})
    workspace.write()
    monkeypatch.chdir(workspace.root)
    put(kind, Path(OF_EXTRACT[leaf]))
    check_refused(lambda: extract(Params.read(Path("params.yaml"))), OF_EXTRACT[leaf])


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize("name", OF_THE_LANGUAGE_MODEL)
def test_the_language_model(tmp_path, monkeypatch, phi_dir, name, kind):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(phi_dir, "phi")
    settings = LlmSettings(model="phi", quantize="none", dtype="fp32")
    put(kind, Path("phi") / name)

    def load():
        load_tokenizer(settings)
        load_language_model(settings, torch.device("cpu"))

    check_refused(load, name or "phi")


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize("name", ["params.yaml", "metrics.json", "history.csv", "captions.json"])
def test_a_file_of_a_run_and_of_a_call(tmp_path, monkeypatch, name, kind):
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/pretrain")
    folder.mkdir(parents=True)
    for other in ("params.yaml", "metrics.json"):
        (folder / other).write_text('{"seed": 1}')
    put(kind, folder / name)
    readers = {"history.csv": lambda: read_history(folder)}
    readers["captions.json"] = lambda: read_captions(folder / name)
    compared = str(folder)
    check_refused(readers.get(name, lambda: compare(compared, compared)), name)
