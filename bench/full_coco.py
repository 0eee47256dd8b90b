"""Data of full size, for real: COCO 2017 and LLaVA-Instruct-150K, and a store of all the images.

    python -m bench.full_coco

The annotation files are in the official layouts, the pictures are some hundred small JPEGs over and
over, and the features are random ones of ViT-B/32's shape: 9.3 GB, written by `cache.write_store`
and published by the stage extract (`encoder.model: external`). Needs 40 GB of disk.

Everything runs in a process of its own. Index may take 3 GB, and what reads the store 4 GB, page
cache included (`bench.memory_group`): the store is larger than that, and its files are dropped from
the page cache before (`bench.pages`). Where no such limit can be set the result says so. For DVC's
part the outputs of the training stages are stand-ins, noted by `dvc commit`.
"""

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from bench import full_store, pages
from bench.child import ROOT, call_measured, run_measured
from bench.coco_sized import COCO, DataSize, write_inputs
from bench.command import benchmark_parser, run_benchmark
from bench.measure import at_most, print_goals
from bench.memory_group import MemoryGroup, memory_group
from cache.files.atomic import write_json, write_text
from workspace.code_hash import PACKAGES
from workspace.paths import FEATURES, REPORTS

QUICK_DIVISOR = 100
PICTURES = 400
"""Different ones."""

INDEX_SECONDS, INDEX_BYTES = 90, 3 * 10**9
PLAN_SECONDS, REPRO_SECONDS = 5, 5
READER_BYTES = 4 * 10**9
"""The goals, and what index and the readers are limited to."""

STAGES = ("code", "fetch", "inputs")
"""Commands of `pipeline` that come before index."""
ORDERS = ("global", "windowed, read ahead")
UNCHANGED = "Data and pipelines are up to date."


def make_workspace(folder: Path, size: DataSize) -> None:
    """Make inputs and settings, the code, and the outputs of the stages before index."""
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    (folder / ".dvc").mkdir()
    for name in ("dvc.yaml", ".dvcignore", ".gitignore", ".dvc/config"):
        shutil.copy(ROOT / name, folder / name)
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    write_inputs(folder, size, PICTURES)
    params = json.loads((folder / "params.yaml").read_text())
    params["encoder"] |= {"model": "external", "pretrained": "made"}
    write_json(folder / "params.yaml", params)
    for stage in STAGES:
        run_measured(["-m", f"pipeline.{stage}"], folder).check(stage)


@contextlib.contextmanager
def limited(num_bytes: int) -> Iterator[MemoryGroup | None]:
    """Limit the memory of processes, or say that this machine cannot and give None."""
    with contextlib.ExitStack() as stack:
        try:
            group = stack.enter_context(memory_group(num_bytes))
        except OSError as error:
            print(f"full_coco: memory is not limited here: {error}", flush=True)
            group = None
        yield group


def with_peak(found: dict[str, Any], group: MemoryGroup | None) -> dict[str, Any]:
    """Add the group's peak, page cache included, to what a process took."""
    found["group_peak_gb"] = round(group.peak() / 1e9, 3) if group else None
    return found


def measure_index(folder: Path, size: DataSize) -> dict[str, Any]:
    """Run the stage; every record must be used."""
    with limited(INDEX_BYTES) as group:
        child = run_measured(["-m", "pipeline.index"], folder, group=group)
        child.check("index")
        found = with_peak({"seconds": round(child.seconds, 2), **child.memory()}, group)
    report = json.loads((folder / REPORTS / "index.json").read_text())
    wanted = {name: sum(counts.values()) for name, counts in vars(size).items()}
    kept = {name: report[name]["kept"] for name in wanted}
    if kept != wanted:
        raise RuntimeError(f"index kept {kept} of {wanted}")
    return found


def measure_store(folder: Path) -> dict[str, dict[str, Any]]:
    """Write and publish the store, then use it with limited memory, from the disk each time."""
    found = {
        "plan": call_measured(full_store.plan, folder=folder),
        "write": call_measured(full_store.write, "made", folder=folder),
    }
    child = run_measured(["-m", "pipeline.extract"], folder)
    child.check("extract")
    found["extract"] = {"seconds": round(child.seconds, 2), **child.memory()}
    shutil.rmtree(folder / "made")
    pages.sync(folder / FEATURES)
    readers: dict[str, tuple[Callable[..., dict[str, float]], tuple[str, ...]]] = {
        "open": (full_store.open_store, ()),
        "verify": (full_store.verify, ()),
        "gather": (full_store.gather, ()),
        **{f"epoch, {order}": (full_store.epoch_in_order, (order,)) for order in ORDERS},
    }
    for name, (function, arguments) in readers.items():
        pages.drop(folder / FEATURES)
        with limited(READER_BYTES) as group:
            taken = call_measured(function, *arguments, folder=folder, group=group)
            found[name] = with_peak(taken, group)
    return found


def measure_repro(folder: Path) -> dict[str, float]:
    """Note all outputs in DVC; return the seconds of that, and of `dvc repro` with no change."""
    stages = YAML(typ="safe", pure=True).load(folder / "dvc.yaml")["stages"]
    for stage in stages.values():
        for output in (*stage.get("outs", ()), *stage.get("metrics", ())):
            path = folder / (output if isinstance(output, str) else next(iter(output)))
            if not path.exists():
                write_text(path / "stand_in" if path.suffix == "" else path, "stand-in\n")
    started = time.perf_counter()
    _dvc(folder, "commit", "--force")
    noted = time.perf_counter()
    if UNCHANGED not in _dvc(folder, "repro"):
        raise RuntimeError("dvc repro ran a stage, although nothing has changed")
    return {
        "commit_seconds": round(noted - started, 2),
        "seconds": round(time.perf_counter() - noted, 2),
    }


def _dvc(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout


def goals_of(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what was wanted and what was found."""
    index_gb = found["index"]["group_peak_gb"] or found["index"]["peak_gib"] * 2**30 / 1e9
    goals = {
        "index: seconds": at_most(INDEX_SECONDS, found["index"]["seconds"]),
        "index: GB of memory": at_most(INDEX_BYTES / 1e9, index_gb),
        "plan of all shards: seconds": at_most(PLAN_SECONDS, found["plan"]["seconds"]),
        "dvc repro, nothing changed: seconds": at_most(REPRO_SECONDS, found["repro"]["seconds"]),
    }
    for name in ("open", "verify", "gather", *(f"epoch, {order}" for order in ORDERS)):
        if peak := found[name]["group_peak_gb"]:
            goals[f"{name}: GB of memory, page cache included"] = at_most(READER_BYTES / 1e9, peak)
    return goals


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; return what the result file says."""
    size = COCO.divided_by(QUICK_DIVISOR) if arguments.quick else COCO
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_workspace(folder, size)
        found = {"index": measure_index(folder, size), **measure_store(folder)}
        found["repro"] = measure_repro(folder)
    goals = goals_of(found)
    for step, figures in found.items():
        print(f"  {step:<28}", *(f"{key} {value}" for key, value in figures.items()))
    print_goals(goals)
    setting = {kind: sum(counts.values()) for kind, counts in vars(size).items()}
    return {"setting": setting | {"pictures": PICTURES}, **found, "goals": goals}


def main() -> None:
    """Measure and write the result file."""
    run_benchmark(
        "full_coco",
        measure,
        benchmark_parser(__doc__),
        minutes=8,
        quick_seconds=60,
        libraries=("dvc", "h5py", "numpy", "pyarrow", "xxhash"),
    )


if __name__ == "__main__":
    main()
