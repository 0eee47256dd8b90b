"""What `python -m train.compare` prints for two run directories."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cache.errors import SettingsError
from train.compare import compare, flatten
from workspace.errors import StageError

ROOT = Path(__file__).parents[2]

SETTINGS = {
    "seed": 0,
    "fetch": {"files": []},
    "finetune": {"learning_rate": 2e-3, "lora": {"r": 16, "alpha": 32}},
}
METRICS = {"steps": 836, "loss": 0.2361449, "validation_loss": None}
PROVENANCE = {"git_commit": "a" * 40, "versions": {"torch": "2.15.0"}, "device": "CPU, 1 threads"}


def write_run(folder, settings=SETTINGS, metrics=METRICS, provenance=PROVENANCE):
    folder.mkdir()
    files = {"params.yaml": settings, "metrics.json": metrics, "provenance.json": provenance}
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values))
    return str(folder)


@pytest.fixture
def left(tmp_path):
    return write_run(tmp_path / "left")


def printed(capsys, left, right):
    """The lines of each part, with one space between the columns."""
    compare(left, str(right))
    parts = re.split(r"^(\w+)\n", capsys.readouterr().out, flags=re.MULTILINE)[1:]
    lines = [[" ".join(line.split()) for line in part.splitlines()] for part in parts[1::2]]
    return dict(zip(parts[::2], lines, strict=True))


def test_a_run_and_its_copy_differ_in_nothing(capsys, tmp_path, left):
    shutil.copytree(left, tmp_path / "copy")
    assert printed(capsys, left, tmp_path / "copy") == {
        "settings": ["5 settings equal"],
        "metrics": ["3 metrics equal"],
        "provenance": ["3 other facts equal"],
    }


def test_the_setting_that_differs_is_named_and_no_other(capsys, tmp_path, left):
    lora = SETTINGS["finetune"]["lora"] | {"r": 64}
    settings = SETTINGS | {"finetune": SETTINGS["finetune"] | {"lora": lora}}
    right = write_run(tmp_path / "right", settings=settings)
    assert printed(capsys, left, right)["settings"] == [
        "finetune.lora.r 16 64",
        "4 settings equal",
    ]


def test_metrics_are_shown_with_their_difference(capsys, tmp_path, left):
    right = write_run(tmp_path / "right", metrics=METRICS | {"steps": 800, "loss": 0.25})
    assert printed(capsys, left, right)["metrics"] == [
        "steps 836 800 -36",
        "loss 0.23614 0.25 +0.013855",
        "1 metrics equal",
    ]


def test_what_only_one_run_has_is_a_dash_on_the_other_side(capsys, tmp_path, left):
    metrics = {"steps": 836, "loss": 0.2361449, "stop_rate": 1.0}
    right = write_run(tmp_path / "right", metrics=metrics)
    assert printed(capsys, left, right)["metrics"] == [
        "validation_loss null -",
        "stop_rate - 1",
        "2 metrics equal",
    ]


def test_a_number_and_none_have_no_difference(capsys, tmp_path, left):
    right = write_run(tmp_path / "right", metrics=METRICS | {"validation_loss": 0.5})
    assert "validation_loss null 0.5" in printed(capsys, left, right)["metrics"]


def test_not_a_number_equals_itself(capsys, tmp_path):
    runs = [write_run(tmp_path / name, metrics={"loss": float("nan")}) for name in ("one", "two")]
    assert printed(capsys, *runs)["metrics"] == ["1 metrics equal"]


def test_one_and_one_point_zero_are_the_same_setting(capsys, tmp_path, left):
    right = write_run(tmp_path / "right", settings=SETTINGS | {"seed": 0.0})
    assert printed(capsys, left, right)["settings"] == ["5 settings equal"]


def test_another_commit_is_shown_short(capsys, tmp_path, left):
    provenance = PROVENANCE | {"git_commit": "b" * 40 + "+changes"}
    right = write_run(tmp_path / "right", provenance=provenance)
    assert printed(capsys, left, right)["provenance"] == [
        f"git_commit {'a' * 12} {'b' * 12}+changes",
        "2 other facts equal",
    ]


def test_what_steers_a_terminal_is_spelled_out(capsys, tmp_path, left):
    right = write_run(tmp_path / "right", provenance=PROVENANCE | {"device": "\x1b[31m"})
    assert printed(capsys, left, right)["provenance"][0].endswith(r" '\x1b[31m'")


def test_columns_are_aligned(capsys, tmp_path, left):
    right = write_run(tmp_path / "right", metrics=METRICS | {"steps": 8, "loss": 0.25})
    compare(left, right)
    head, *lines = [line for line in capsys.readouterr().out.splitlines() if "equal" not in line]
    metrics = lines[lines.index("metrics") + 1 :][:2]
    for column in (left, right, "second - first"):
        assert {line[head.index(column) + len(column) - 1] == " " for line in metrics} == {False}
    assert {len(line) for line in (head, *metrics)} == {len(head)}


def test_flattening_keeps_every_value_and_the_order():
    values = {"a": {"b": 1, "c": {"d": [2, {"e": 3}]}}, "f": [], "g": {}, "h": None}
    assert list(flatten(values, "x.").items()) == [
        ("x.a.b", 1),
        ("x.a.c.d.0", 2),
        ("x.a.c.d.1.e", 3),
        ("x.f", []),
        ("x.g", {}),
        ("x.h", None),
    ]


def test_a_folder_that_is_no_run_is_named(tmp_path, left):
    with pytest.raises(SettingsError, match=r"is no run: it has no params\.yaml"):
        compare(left, str(tmp_path))


def test_a_run_without_metrics_is_named(tmp_path, left):
    right = write_run(tmp_path / "right")
    (tmp_path / "right/metrics.json").unlink()
    with pytest.raises(StageError, match=r"right has no metrics: wanted metrics\.json"):
        compare(left, right)


def test_a_run_without_provenance_is_compared(capsys, tmp_path, left):
    right = write_run(tmp_path / "right")
    (tmp_path / "right/provenance.json").unlink()
    assert "device CPU, 1 threads -" in printed(capsys, left, right)["provenance"]


@pytest.mark.parametrize("name", ["params.yaml", "metrics.json", "provenance.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe\x00", b"7"])
def test_a_damaged_file_is_named(tmp_path, left, name, content):
    right = write_run(tmp_path / "right")
    (tmp_path / "right" / name).write_bytes(content)
    with pytest.raises(StageError, match=rf"right: {name} is damaged"):
        compare(left, right)


def test_a_folder_and_a_revision_are_not_compared(left):
    with pytest.raises(SettingsError, match=r"HEAD is no folder, and .*left is one"):
        compare(left, "HEAD")


@pytest.mark.parametrize(("right", "exit_code"), [("nowhere", 2), (".", 1)])
def test_a_mistake_is_one_line(left, right, exit_code, tmp_path):
    (tmp_path / "params.yaml").write_text("seed: 0\n")
    done = subprocess.run(
        [sys.executable, "-m", "train.compare", left, right],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (exit_code, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
