"""Runs all stages of the demo in an empty folder and records how long they took and what came out.

    python -m bench.demo

An empty folder, so that nothing made before is used again, and nothing of the user's is touched.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.measure import RESULTS, at_least, at_most, machine, print_goals
from cache.files import write_json

ROOT = Path(__file__).parents[1]
MODULES = (
    "pipeline.fetch",
    "pipeline.index",
    "pipeline.extract",
    "train.pretrain",
    "train.finetune",
    "eval.evaluate",
)
REPORTS = ("index", "extract", "pretrain", "finetune", "eval")


def run_stages(folder: Path) -> dict[str, float]:
    """Run every stage with the default settings in a folder; return the seconds of each."""
    shutil.copy(ROOT / "params.yaml", folder)
    (folder / "demo").symlink_to(ROOT / "demo")
    seconds: dict[str, float] = {}
    for module in MODULES:
        started = time.perf_counter()
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-m", module], cwd=folder, env=environment, check=True)
        seconds[module] = round(time.perf_counter() - started, 1)
    return seconds


def goals_of(total: float, scores: dict[str, Any]) -> dict[str, Any]:
    """Compare the demo with what it is to reach: time, seeing against blind, texts that end."""
    goals = {"seconds of all stages": at_most(300, total)}
    for section, key in (("captions", "CIDEr"), ("answers", "exact_match")):
        low, _ = scores[section]["intervals"][key]
        _, high = scores[section]["blind"]["intervals"][key]
        goals[f"{section}: {key} beyond the blind control's, ends of intervals"] = at_least(
            high, low
        )
        goals[f"{section}: stop rate"] = at_least(0.99, scores[section]["stop_rate"])
    return goals


def main() -> None:
    """Run everything, print the seconds, write the result file."""
    with tempfile.TemporaryDirectory() as folder:
        seconds = run_stages(Path(folder))
        reports = {
            name: json.loads((Path(folder) / f"reports/{name}.json").read_text())
            for name in REPORTS
        }
    total = round(sum(seconds.values()), 1)
    goals = goals_of(total, reports["eval"])
    result = {
        "seconds": seconds | {"total": total},
        "goals": goals,
        "reports": reports,
        "machine": machine(),
    }
    write_json(RESULTS / "demo.json", result)
    for module, value in result["seconds"].items():
        print(f"  {module:<20} {value:>8.1f} s")
    print_goals(goals)


if __name__ == "__main__":
    main()
