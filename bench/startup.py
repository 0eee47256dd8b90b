"""How long a training stage takes to its first optimizer step, on an index as large as COCO's.

    python -m bench.startup

Each stage runs as its command does, in a fresh process, until its history shows the first step;
then a few steps further for its memory, and is ended. Where the seconds go is asked of other
processes, `bench.first_step`. Everything was read before, so that no disk is measured.
"""

import argparse
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.coco_sized import COCO, ROOT, SPEC_SMALL, make_workspace
from bench.command import benchmark_parser, run_benchmark
from bench.measure import at_most, medians, print_goals
from cache.cli.interrupts import INTERRUPTED
from cache.files.atomic import write_json
from train.model.projector import seeded_projector

STAGES = ("pretrain", "finetune")
ROUNDS = 5
QUICK_DIVISOR = 100
"""By which the records are divided for `--quick`."""
SETTLED_STEPS = 10
"""Steps after which the memory is taken as what the stage needs."""

WANTED_SECONDS = 10.0
WANTED_GIGABYTES = 2.0


class Stage:
    """A stage that runs in a process of its own."""

    def __init__(self, folder: Path, stage: str) -> None:
        shutil.rmtree(folder / ".work", ignore_errors=True)
        self._stage, self._runs = stage, folder / ".work/runs" / stage
        self._log = folder / f"{stage}.log"
        self._started = time.monotonic()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"train.{stage}"],
                cwd=folder,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=log,
            )
        self._about = Path(f"/proc/{self._process.pid}")
        self.peak_bytes = 0
        """Most memory of its own so far."""

    def steps(self) -> int:
        """Return how many steps its history has."""
        files = list(self._runs.glob("*/files/history.csv"))
        return len(files[0].read_text().splitlines()) - 1 if files else 0

    def wait_for(self, steps: int) -> float:
        """Wait until the history has so many steps; return the seconds since the start."""
        while self.steps() < steps:
            if self._process.poll() is not None:
                raise RuntimeError(f"{self._stage} ended early:\n{self._log.read_text()}")
            self.peak_bytes = max(self.peak_bytes, self._own_bytes())
            time.sleep(0.005)
        return time.monotonic() - self._started

    def _own_bytes(self) -> int:
        """Return the resident memory that no file backs."""
        status = (self._about / "status").read_text()
        found = re.findall(r"^(?:RssAnon|RssShmem):\s+(\d+) kB", status, re.M)
        return sum(map(int, found)) * 1024

    def cpu_seconds(self) -> float:
        """Return the processor's time so far: on a busy machine it says more than the clock."""
        # Behind the name in brackets, which can hold anything: fields 14 and 15 of proc(5).
        fields = (self._about / "stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")

    def bytes_besides_features(self) -> int:
        """Return the resident memory, libraries included, without the features' files."""
        total = 0
        for mapping in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", self._smaps(), flags=re.M)[1:]:
            resident = re.search(r"^Rss:\s+(\d+) kB", mapping, re.M)
            if resident and not mapping.partition("\n")[0].endswith(".h5"):
                total += int(resident[1]) * 1024
        return total

    def _smaps(self) -> str:
        return (self._about / "smaps").read_text(errors="replace")

    def end(self) -> None:
        """Ask it to stop, which it does after the step that it is at."""
        self._process.send_signal(signal.SIGTERM)
        code = self._process.wait()
        if code != INTERRUPTED:
            raise RuntimeError(f"{self._stage} ended with {code}:\n{self._log.read_text()}")


def first_step(folder: Path, stage: str) -> dict[str, float]:
    """Run a stage some steps far; return what the first one took, and the memory."""
    process = Stage(folder, stage)
    found = {"seconds": process.wait_for(1), "cpu_seconds": process.cpu_seconds()}
    first = process.bytes_besides_features()
    process.wait_for(SETTLED_STEPS)
    settled = process.bytes_besides_features()
    process.end()
    return found | {
        "gigabytes_at_first_step": first / 1e9,
        "gigabytes_later": settled / 1e9,
        "gigabytes_of_its_own_at_most": process.peak_bytes / 1e9,
    }


def phases(folder: Path, stage: str) -> dict[str, float]:
    """Return the seconds of the phases before the first step."""
    shutil.rmtree(folder / ".work", ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "-m", "bench.first_step", stage, str(time.monotonic())],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


Figures = dict[str, dict[str, list[float]]]
"""Stage and figure to what each round gave."""


def look_at_stages(
    folder: Path, look: Callable[[Path, str], dict[str, float]], *, quick: bool
) -> Figures:
    """Look at every stage once a round, a first round is not counted; quick: once at the first."""
    runs: Figures = {stage: {} for stage in (STAGES[:1] if quick else STAGES)}
    for number in [0] if quick else range(-1, ROUNDS):
        for stage in runs:
            for figure, value in look(folder, stage).items():
                if number >= 0:
                    runs[stage].setdefault(figure, []).append(round(value, 3))
    return runs


def goals_of(runs: Figures) -> dict[str, Any]:
    """Return what was wanted and what was found."""
    goals = {}
    for stage, figures in runs.items():
        memory = max(max(values) for name, values in figures.items() if "gigabytes" in name)
        seconds = medians(figures)["seconds"]
        goals[f"{stage}: seconds to the first step"] = at_most(WANTED_SECONDS, seconds)
        goals[f"{stage}: GB besides the features"] = at_most(WANTED_GIGABYTES, memory)
    return goals


def print_figures(name: str, runs: Figures) -> None:
    """Print the medians, a line a stage."""
    print(f"\n{name}: medians")
    for stage, figures in runs.items():
        found = "  ".join(f"{figure} {value:.2f}" for figure, value in medians(figures).items())
        print(f"  {stage:<10} {found}")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the files, measure and print; return what the result file says."""
    size = COCO.divided_by(QUICK_DIVISOR) if arguments.quick else COCO
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_workspace(folder, size)
        # Stage 2 starts from one of stage 1: of the demo's two widths.
        projector = seeded_projector("mlp", SPEC_SMALL.width, 128, 0)
        (folder / "runs/pretrain").mkdir(parents=True)
        projector.save(folder / "runs/pretrain/projector.safetensors")
        made_from = {"features_fingerprint": SPEC_SMALL.fingerprint}
        write_json(folder / "runs/pretrain/provenance.json", made_from)
        runs = look_at_stages(folder, first_step, quick=arguments.quick)
        split = look_at_stages(folder, phases, quick=arguments.quick)
    print_figures("first step", runs)
    print_figures("its phases, in seconds", split)
    goals = goals_of(runs)
    print_goals(goals)
    return {
        "setting": {
            **dataclasses.asdict(size),
            "patches": SPEC_SMALL.patches,
            "width": SPEC_SMALL.width,
            "language_model": "demo/checkpoints/phi",
        },
        "processes": ROUNDS,
        "median": {stage: medians(figures) for stage, figures in runs.items()},
        "phases": {stage: medians(figures) for stage, figures in split.items()},
        "runs": runs,
        "goals": goals,
    }


def main() -> None:
    """Measure and write the result file."""
    run_benchmark(
        "startup",
        measure,
        benchmark_parser(__doc__),
        minutes=8,
        quick_seconds=60,
        libraries=("torch", "transformers", "bitsandbytes", "peft", "wandb", "pyarrow"),
    )


if __name__ == "__main__":
    main()
