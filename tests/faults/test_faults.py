"""Every stage on a disk that fails: `tests.faults.campaign`, on a sample of the calls.

FAULTS=all pytest tests/faults      every call, an hour of a core
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.campaign import FAULTS
from tests.faults.stages import ROOT, STAGES

pytestmark = pytest.mark.slow("runs every stage with failing writes")

SOURCE = Path(__file__).with_name("failing_io.c")

TRIES = 3
"""Of each stage, without FAULTS=all."""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The calls that fail, compiled; without a compiler the test is skipped, and fails in CI."""
    compiler = shutil.which("gcc")
    if compiler is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no gcc is on PATH")
    path = tmp_path_factory.mktemp("library") / "failing_io.so"
    flags = ("-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror")
    subprocess.run([compiler, *flags, "-o", path, SOURCE, "-ldl"], check=True)
    return path


def test_a_stage_fails_in_a_line_or_makes_the_right_files_and_the_next_run_does(
    library, tmp_path_factory
):
    is_sample = os.environ.get("FAULTS") != "all"
    folder = tmp_path_factory.mktemp("campaign") / "work"
    options = ("--most", str(TRIES)) if is_sample else ()
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.campaign", library, folder, *options],
        env=os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    shutil.rmtree(folder)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line for line in found if line["wrong"]] == []
    assert {line["fault"] for line in found} == {fault.name for fault in FAULTS}
    for stage in STAGES:
        assert sum(line["tries"] for line in found if line["stage"] == stage.name) >= TRIES
