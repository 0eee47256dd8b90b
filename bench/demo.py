"""Runs all stages of the demo in an empty folder and records how long they took and what came out.

    python -m bench.demo

On a processor with AVX2 alone, or on another one that is held to it with
`ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2`, the result file is `demo_avx2.json`.

An empty folder, so that nothing made before is used again, and nothing of the user's is touched.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML

from bench.command import benchmark_parser, run_benchmark
from bench.measure import at_least, at_most, print_goals
from demo.world import write_world

ROOT = Path(__file__).parents[1]
MODULES = (
    "pipeline.fetch",
    "pipeline.index",
    "pipeline.extract",
    "train.pretrain",
    "train.finetune",
    "train.control",
    "eval.evaluate",
)
REPORTS = ("index", "extract", "pretrain", "finetune", "eval")


def write_small_settings(folder: Path) -> None:
    """Write the default settings, for a world of some dozen pictures."""
    write_world(folder / "world", num_train=60, num_val=12, seed=0)
    yaml = YAML(typ="safe", pure=True)
    params = yaml.load(ROOT / "params.yaml")
    for split, name in (("train", "train2017"), ("val", "val2017")):
        captions = f"world/annotations/captions_{name}.json"
        params["data"][split] = {"images": f"world/{name}.zip", "captions": captions}
    params["data"] |= {"source": "local", "instruct": "world/llava_instruct_150k.json"}
    yaml.dump(params, folder / "params.yaml")


def run_stages(folder: Path) -> dict[str, float]:
    """Run every stage with the settings in a folder; return the seconds of each."""
    (folder / "demo").symlink_to(ROOT / "demo")
    seconds: dict[str, float] = {}
    for module in MODULES:
        started = time.perf_counter()
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-m", module], cwd=folder, env=environment, check=True)
        seconds[module] = round(time.perf_counter() - started, 1)
    return seconds


def goals_of(total: float, scores: dict[str, Any]) -> dict[str, Any]:
    """Compare the demo with its goals: time, gains over the wrong image, texts that end."""
    goals = {"seconds of all stages": at_most(300, total)}
    for section, key in (("captions", "CIDEr"), ("answers", "exact_match")):
        low, _ = scores[section]["gains"]["blind"][key]["interval"]
        goals[f"{section}: {key}, lower end of the gain over the wrong image"] = at_least(0, low)
        goals[f"{section}: stop rate"] = at_least(0.99, scores[section]["stop_rate"])
    return goals


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run everything and print the seconds; return what the result file says."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.quick:
            write_small_settings(folder)
        else:
            shutil.copy(ROOT / "params.yaml", folder)
        seconds = run_stages(folder)
        reports = {
            report: json.loads((folder / f"reports/{report}.json").read_text())
            for report in REPORTS
        }
    seconds["total"] = round(sum(seconds.values()), 1)
    goals = goals_of(seconds["total"], reports["eval"])
    for module, value in seconds.items():
        print(f"  {module:<20} {value:>8.1f} s")
    print_goals(goals)
    return {"seconds": seconds, "goals": goals, "reports": reports}


def main() -> None:
    """Measure and write the result file, named after the processor's instructions."""
    only_avx2 = torch.backends.cpu.get_cpu_capability() == "AVX2"
    run_benchmark(
        "demo_avx2" if only_avx2 else "demo",
        measure,
        benchmark_parser(__doc__),
        minutes=3,
        quick_seconds=60,
        libraries=("torch",),
    )


if __name__ == "__main__":
    main()
