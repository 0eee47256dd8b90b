import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import gpu
from bench.gpu_parts.goals import COMPARED, OURS, conclude, row_name
from bench.gpu_parts.sizes import DRY, FULL
from bench.step import FINETUNE, PRETRAIN
from workspace.errors import StageError

ROOT = Path(__file__).parents[2]
ABSENT = ("dvc", "wandb", "gradio", "ruamel")
"""What a bare GPU machine lacks."""
START = (
    f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r})); from bench.gpu import main; main()"
)

pytestmark = pytest.mark.slow("runs every part of the GPU's benchmark")


def start(*arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", START, *map(str, arguments)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    ended = start("--dry-run", "--out", folder, "--minutes", "30")
    assert ended.returncode == 0, ended.stderr
    (path,) = folder.iterdir()
    return json.loads(path.read_text())


def test_every_part_runs_and_no_row_fails(result):
    assert list(result["parts"]) == list(gpu.PARTS)
    for part, rows in result["parts"].items():
        assert len(rows) > 1, part
        for name, row in rows.items():
            assert "error" not in row, f"{part}, {name}: {row}"


def test_what_needs_a_gpu_or_a_package_is_all_that_is_skipped(result):
    rows = [row for rows in result["parts"].values() for row in rows.values()]
    reasons = {row["skipped"] for row in rows if "skipped" in row}
    assert reasons == {"FlexAttention has gradients on a GPU only", "not installed"}


def test_all_comparisons_with_the_cpu_are_within_their_limits(result):
    within = [row["within"] for row in result["parts"]["right"].values() if "within" in row]
    # Two head shapes in two dtypes; NF4 and features in two each.
    assert within == [True] * 8


def test_every_goal_is_judged_but_that_of_waits(result):
    assert result["goals"] == conclude(result["parts"])["goals"]
    assert len(result["goals"]) == 9
    assert "host waits of a step" not in result["goals"]
    assert result["goals"]["difference of the gradients"]["met"]
    assert result["goals"]["comparisons with the CPU beyond their limits"]["met"]


def test_a_run_without_time_skips_all_rows_and_says_so(tmp_path):
    ended = start("--dry-run", "--out", tmp_path, "--minutes", "0.001")
    assert ended.returncode == 0, ended.stderr
    parts = json.loads((tmp_path / "gpu_dry_run.json").read_text())["parts"]
    assert list(parts) == list(gpu.PARTS)
    for part, rows in parts.items():
        for name, row in rows.items():
            assert name == "whole part" or "skipped" in row, part


def test_without_a_gpu_the_command_says_what_to_do(tmp_path):
    ended = start("--out", tmp_path)
    if "finds no GPU" not in ended.stderr:
        pytest.skip("there is a GPU")
    assert ended.returncode == 2
    assert ended.stderr.strip().endswith("Take --dry-run to try every part on the CPU.")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--minutes", "-1"), "--minutes is -1, wanted more than 0."),
        (("--minutes", "nan"), "--minutes is nan, wanted more than 0."),
        (("--out", "missing"), "--out: missing is no folder."),
        (("--out", "README.md"), "--out: README.md is no folder."),
    ],
)
def test_arguments_that_cannot_be_are_refused(arguments, reason):
    ended = start("--dry-run", *arguments)
    assert ended.returncode == 2
    assert ended.stderr.strip().endswith(reason)


def test_a_row_that_fails_in_a_dry_run_is_an_error(monkeypatch, tmp_path):
    def measure(report, bench):
        report.row("a row", 1, lambda: 1 / 0)

    monkeypatch.setattr(gpu, "PARTS", {"a part": measure})
    arguments = argparse.Namespace(out=tmp_path, minutes=1.0, dry_run=True)
    with pytest.raises(StageError, match=r"1 rows failed: a part: a row\.$"):
        gpu.run(arguments)


def test_the_result_file_is_named_after_the_gpu():
    assert gpu.short_name("NVIDIA H200") == "h200"
    assert gpu.short_name("NVIDIA A100-SXM4-80GB") == "a100_sxm4_80gb"


def test_both_sizes_try_the_same_parts():
    for sizes in (FULL, DRY):
        assert sizes.compared_pass not in sizes.passes
        assert sizes.usual_batches.keys() == sizes.coco_batch.keys() == {PRETRAIN, FINETUNE}
        assert list(sizes.card_passes) == sorted(sizes.card_passes)
        assert sizes.phi.vocab_size > 50_295
    name = row_name("nf4", PRETRAIN, OURS + COMPARED)
    assert name == "nf4, pretrain: ours, as many images as the others"
