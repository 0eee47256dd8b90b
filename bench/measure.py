"""Runs contenders one after the other, again and again, and writes medians and ratios.

Interleaved in one process, because on a shared machine only a ratio within one run means anything.
"""

import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from cache.files import write_json

RESULTS = Path(__file__).parent / "results"


def compare(
    name: str,
    contenders: Mapping[str, Callable[[], int]],
    *,
    unit: str,
    repeats: int,
    libraries: tuple[str, ...],
    setting: Mapping[str, Any],
) -> dict[str, float]:
    """Measure contenders side by side, print a table, write `bench/results/<name>.json`.

    Args:
        name: Of the result file.
        contenders: Each does its work once and returns how many units it did.
        unit: What is counted.
        repeats: Rounds; every contender runs once a round. The first round is not counted.
        libraries: Whose versions belong to the result.
        setting: What was measured, for the file.

    Returns:
        Median units a second of each.
    """
    rates: dict[str, list[float]] = {contender: [] for contender in contenders}
    for repeat in range(repeats + 1):
        for contender, work in contenders.items():
            started = time.perf_counter()
            units = work()
            if repeat:
                rates[contender].append(units / (time.perf_counter() - started))
    medians = {contender: statistics.median(values) for contender, values in rates.items()}
    _print_table(name, unit, medians)
    result = {
        "unit": f"{unit}/s",
        "setting": dict(setting),
        "repeats": repeats,
        "median": {contender: round(value, 2) for contender, value in medians.items()},
        "runs": {c: [round(value, 2) for value in values] for c, values in rates.items()},
        "machine": machine(),
        "versions": {library: importlib.metadata.version(library) for library in libraries},
    }
    write_json(RESULTS / f"{name}.json", result)
    return medians


def machine() -> dict[str, Any]:
    """Name the machine: processor, threads, GPU, Python."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _print_table(name: str, unit: str, medians: Mapping[str, float]) -> None:
    first = next(iter(medians.values()))
    print(f"\n{name}: median {unit}/s, and how many times faster the first is")
    for contender, value in medians.items():
        print(f"  {contender:<44} {value:>12,.1f} {first / value:>8.2f}x")
