"""Runs all stages of the demo afresh and records how long they took and what they scored.

    python -m bench.demo

Every stage is forced to run, so that nothing comes out of DVC's cache.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from bench.measure import RESULTS, machine
from cache.files import write_json

STAGES = ("extract", "pretrain", "finetune")


def main() -> None:
    """Run everything, then write the result file."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "dvc", "repro", "--force"], check=True)
    seconds = time.perf_counter() - started
    reports = {name: json.loads(Path(f"reports/{name}.json").read_text()) for name in STAGES}
    result = {
        "seconds": round(seconds),
        "scores": json.loads(Path("reports/eval.json").read_text()),
        "stages": reports,
        "machine": machine(),
    }
    write_json(RESULTS / "demo.json", result)
    print(f"\ndemo: {seconds:.0f} s from nothing to the report")


if __name__ == "__main__":
    main()
