"""Runs tests in a process that has a GPU which computes nothing, on a machine without a GPU.

`driver.c` takes the place of libcudart and libcuda in that process. Torch must be loaded after it,
and would take it for a GPU in every other test too, so the process is one of its own.
"""

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("driver.c")
CAPABILITY = "STAND_IN_CAPABILITY"


def lacking():
    """Return what this machine lacks for a stand-in GPU, or an empty text."""
    import torch

    if shutil.which("gcc") is None:
        return "no gcc"
    if not torch.version.cuda:
        return "torch is built without CUDA"
    if not headers().is_dir():
        return "triton has no headers of CUDA"
    return ""


def headers():
    (triton,) = importlib.util.find_spec("triton").submodule_search_locations
    return Path(triton) / "backends/nvidia/include"


@functools.cache
def library_folder():
    """Compile the stand-in; the folder lives as long as the process."""
    folder = tempfile.TemporaryDirectory()
    library = Path(folder.name) / "libcuda.so.1"
    options = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{headers()}"]
    subprocess.run(["gcc", *options, SOURCE, "-o", library], check=True)
    return folder


def run(command, *, capability=80, **options):
    """Run a Python command in a process with a stand-in GPU of a compute capability."""
    library = f"{library_folder().name}/libcuda.so.1"
    environment = {
        **os.environ,
        CAPABILITY: str(capability),
        "LD_PRELOAD": library,
        "LD_LIBRARY_PATH": str(Path(library).parent),
        "PYTHONPATH": str(ROOT),
        # Kernels of an earlier run would hide what no longer compiles.
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        # Inductor leaves its folder there after an error.
        "TMPDIR": library_folder().name,
        # Triton 3.9 warns unless it is chosen.
        "TRITON_DEFAULT_FP_FUSION": "1",
    } | options.pop("env", {})
    return subprocess.run(
        [sys.executable, *command],
        env=environment, cwd=ROOT, text=True, capture_output=True, check=False, **options,
    )  # fmt: skip


def is_loaded():
    """Whether this process has a stand-in GPU."""
    return CAPABILITY in os.environ


@functools.cache
def module_failures(path):
    """Run a module's tests there; return the text of each failure by the name of the test."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={folder}/tests"]
        ran = run(["-m", "pytest", *options, f"--junitxml={report}", str(path)])
        assert report.exists(), ran.stdout + ran.stderr
        cases = ElementTree.parse(report).iter("testcase")
        return {case.get("name"): "\n".join(part.text or "" for part in case) for case in cases}


def check_there(item):
    """Fail as the test fails in a process with a stand-in GPU."""
    missing = lacking()
    if missing:
        pytest.skip(f"no stand-in GPU: {missing}")
    failures = module_failures(item.path)
    assert item.name in failures, f"{item.name} was not run with a stand-in GPU"
    if failures[item.name]:
        pytest.fail(failures[item.name], pytrace=False)
