"""Every reader of a JSON, CSV, YAML or parquet file of ours, against every kind of damage.

A damaged file is read, passed over, or refused in one line that names it; a disk that fails is
told in the system's words. Other files have such laws beside their readers: shards, checkpoints,
tokenizers, adapters, kept texts.
"""

import errno
import hashlib
import json
import os
import random
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cache.dvc_objects import drop_damaged_objects
from cache.errors import PatchcacheError
from eval.compare import compare
from eval.llava.card import read_score_report
from eval.runs import read_history
from eval.snapshots import COLUMNS
from eval.systems.coco_files import read_captions, read_results
from eval.systems.pope_files import read_answers, read_labels
from pipeline.download import _Partial
from train.provenance import read_provenance
from train.run import RunDirectory
from workspace.settings import Params

DEEPER_THAN_PYTHON = 2_000
"""JSON may be so deep that it is parsed, and a function that calls itself cannot follow."""

TEXTS = {
    "empty": b"",
    "no text": b"\xff\xfe\x00",
    "endless": b"[" * 10**5,
    "huge number": b"9" * 10**5,
    "list": b"[]",
    "number": b"7",
    "nothing": b"null",
    "list of numbers": b"[1, 2]",
    "list of keys": b'[{}, {"md5": 1, "relpath": 2, "image_id": true, "caption": 3}]',
    "deep": b'{"a":' * DEEPER_THAN_PYTHON + b"1" + b"}" * DEEPER_THAN_PYTHON,
}
CHANGED_VALUES = {
    "wrong types": [[], 7],
    "half a character": "\ud800",
    "beyond every float": 10**400,
    "nothing": None,
}

DAMAGE = ["cut", "flipped", *TEXTS, *(f"values: {kind}" for kind in CHANGED_VALUES)]


def damaged(data, kind):
    """Return some bytes with damage of a kind, at several places."""
    if kind in TEXTS:
        return [TEXTS[kind]]
    chance = random.Random(kind)
    places = [chance.randrange(len(data)) for _ in range(25)]
    if kind == "cut":
        return [data[:place] for place in places]
    if kind == "flipped":
        return [
            data[:p] + bytes([data[p] ^ 1 << chance.randrange(8)]) + data[p + 1 :] for p in places
        ]
    value = CHANGED_VALUES[kind.removeprefix("values: ")]
    try:
        values = json.loads(data)
    except ValueError:
        return damaged_lines(data.split(b"\n"), value)
    return [json.dumps(changed).encode() for changed in changes(values, value)]


def damaged_lines(lines, value):
    """Return JSON Lines with one thing in the last line changed; nothing for other files."""
    try:
        *first, last = (json.loads(line) for line in lines)
    except ValueError:
        return []
    texts = [[*first, changed] for changed in changes(last, value)]
    return ["\n".join(map(json.dumps, rows)).encode() for rows in texts]


def changes(values, value):
    """Yield some JSON with one thing in it changed: each key and entry once."""
    yield value
    places = values.items() if isinstance(values, dict) else enumerate(values)
    for place, inner in list(places) if isinstance(values, dict | list) else []:
        for changed in changes(inner, value) if isinstance(inner, dict | list) else [value]:
            copied = values.copy()
            copied[place] = changed
            yield copied


SCORES = {
    "captions": {
        "CIDEr": 0.5, "count": 2, "intervals": {"CIDEr": [0.4, 0.6]}, "blind": {"CIDEr": 0.1},
    },
    "pope": {"random": {"accuracy": 0.5, "count": 2}},
    "projectors_sha256": {"finetune": hashlib.sha256(b"").hexdigest()},
}  # fmt: skip
ROW = dict.fromkeys(COLUMNS.names, "x") | {"image_id": 1, "targets": ["x"], "score": 0.5}


def run_folder(folder):
    """Write the files of a run directory."""
    folder.mkdir()
    for name, values in {
        "params.yaml": {"seed": 0, "llm": {"model": "phi"}},
        "metrics.json": {"loss": 0.5, "steps": 3},
        "provenance.json": {"features_fingerprint": "f", "versions": {"torch": "2"}},
    }.items():
        (folder / name).write_text(json.dumps(values))
    return folder


def reports_folder(folder):
    """Write the files of an evaluation."""
    folder.mkdir()
    (folder / "eval.json").write_text(json.dumps(SCORES))
    pq.write_table(pa.Table.from_pylist([ROW], COLUMNS), folder / "predictions.parquet")
    return folder


def compared(write, name):
    """Compare two folders, of which a file of the second is damaged."""

    def prepare():
        write(Path("whole"))
        path = write(Path("other")) / name
        return path, lambda: compare("whole", "other")

    return prepare


def of_history():
    path = Path("runs/pretrain/history.csv")
    path.parent.mkdir(parents=True)
    path.write_text("step,loss\n1,0.5\n2,\n")
    return path, lambda: read_history(path.parent)


def of_provenance():
    path = run_folder(Path("run")) / "provenance.json"
    return path, lambda: read_provenance(path)


def of_model_card():
    folder = Path("runs/finetune").resolve()
    folder.mkdir(parents=True)
    (folder / "projector.safetensors").touch()
    path = Path("reports/eval.json").resolve()
    path.parent.mkdir()
    path.write_text(json.dumps(SCORES))
    params = SimpleNamespace(values={"data": {"source": "coco"}})
    trained = SimpleNamespace(folder=folder, answers=True, params=params)
    return path, lambda: read_score_report(trained)


def of_captions():
    path = Path("captions.json")
    path.write_text(json.dumps({"annotations": [{"image_id": 1, "caption": "a"}]}))
    return path, lambda: read_captions(path)


def of_results():
    path = Path("results.json")
    path.write_text(json.dumps([{"image_id": 1, "caption": "a"}]))
    return path, lambda: read_results(path)


QUESTIONS = [
    {"question_id": n, "image": "a.jpg", "text": "Is there a cat?", "label": "yes"} for n in (1, 2)
]


def of_labels():
    path = Path("coco_pope_random.json")
    path.write_text("\n".join(map(json.dumps, QUESTIONS)))
    return path, lambda: read_labels(path)


def of_answers():
    of_labels()
    questions = read_labels(Path("coco_pope_random.json"))
    path = Path("answers.jsonl")
    path.write_text("\n".join(json.dumps({"question_id": n, "text": "Yes"}) for n in (1, 2)))
    return path, lambda: read_answers(path, questions)


def of_download():
    partial = _Partial(Path("images.zip.partial"))
    partial.version_path.write_text(json.dumps({"ETag": "x"}))
    return partial.version_path, partial.version


def of_unfinished_run():
    saving = {"every_steps": 1, "every_minutes": 1.0, "keep": 1}
    params = Params(Path("params.yaml"), "", {"checkpoints": saving})
    run = RunDirectory("pretrain", params, {"seed": 0}, {})
    run.checkpoints.mkdir()
    (run.checkpoints / "step-00000001.safetensors").touch()
    path = run.checkpoints.parent / "identity.json"
    seeds = iter(range(1, 10**6))
    return path, lambda: RunDirectory("pretrain", params, {"seed": next(seeds)}, {})


def of_dvc_listing():
    objects = Path(".dvc/cache/files/md5")
    path = objects / "listing"
    objects.mkdir(parents=True)
    path.write_text(json.dumps([{"md5": "a" * 32, "relpath": "0123456789abcdef.h5"}]))

    def read():
        # Only a listing whose own hash is right is looked into.
        data = path.read_bytes()
        md5 = hashlib.md5(data).hexdigest()
        listing = objects / md5[:2] / f"{md5[2:]}.dir"
        listing.parent.mkdir(exist_ok=True)
        listing.write_bytes(data)
        try:
            drop_damaged_objects(Path("features"), ["0123456789abcdef.h5"])
        finally:
            listing.unlink()

    return path, read


REFUSING = {
    "settings of a run": compared(run_folder, "params.yaml"),
    "metrics": compared(run_folder, "metrics.json"),
    "provenance of two runs": compared(run_folder, "provenance.json"),
    "scores": compared(reports_folder, "eval.json"),
    "predictions": compared(reports_folder, "predictions.parquet"),
    "history": of_history,
    "provenance": of_provenance,
    "scores of a model card": of_model_card,
    "captions": of_captions,
    "results": of_results,
    "labels": of_labels,
    "answers": of_answers,
}
"""Readers that need the file."""

READERS = REFUSING | {
    "version of a download": of_download,
    "identity of an unfinished run": of_unfinished_run,
    "listing of DVC": of_dvc_listing,
}


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_file_is_read_or_refused_in_one_line(reader, kind, capsys):
    path, read = READERS[reader]()
    whole = path.read_bytes()
    read()
    for data in damaged(whole, kind):
        path.write_bytes(data)
        capsys.readouterr()
        refusal = refusal_of(read)
        assert refusal is None or path.name in refusal
        assert len((refusal or "").splitlines()) <= 1
        printed = capsys.readouterr()
        assert printed.err.count("\n") <= 1
        printed.out.encode()


@pytest.mark.parametrize("reader", REFUSING)
def test_what_cannot_be_a_file_of_ours_is_refused(reader):
    path, read = READERS[reader]()
    for data in (b"", b"\xff\xfe\x00", b"[" * 10**5):
        path.write_bytes(data)
        with pytest.raises(PatchcacheError):
            read()


def refusal_of(read):
    try:
        read()
    except PatchcacheError as error:
        return str(error)
    return None


class _FailingFile:
    """An open file whose disk has failed."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def __getattr__(self, name):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def __iter__(self):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("reader", [*REFUSING, "version of a download"])
def test_a_failing_disk_is_told_in_the_words_of_the_system(reader, monkeypatch):
    path, read = READERS[reader]()
    usual = Path.open

    def fails(self, mode="r", *arguments, **options):
        is_it = self.name == path.name and self.parent != Path("whole")
        return _FailingFile() if is_it else usual(self, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", fails)
    with pytest.raises(OSError, match=rf"Input/output error: '.*{path.name}'") as caught:
        read()
    assert not isinstance(caught.value, PatchcacheError)
