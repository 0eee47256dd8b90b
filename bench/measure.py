"""Runs contenders one after the other, again and again, and gives medians and ratios.

Interleaved in one process, because on a shared machine only a ratio within one run means anything.
"""

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def compare(
    name: str,
    contenders: Mapping[str, Callable[[], int]],
    *,
    unit: str,
    repeats: int,
    setting: Mapping[str, Any],
) -> dict[str, Any]:
    """Measure contenders side by side and print a table.

    Args:
        name: Of the benchmark.
        contenders: Each does its work once and returns how many units it did.
        unit: What is counted.
        repeats: Rounds; every contender runs once a round. The first round is not counted.
        setting: What was measured, for the result file.

    Returns:
        What the result file says.
    """
    rates = interleaved({name: rate_of(work) for name, work in contenders.items()}, repeats)
    print_table(name, unit, medians(rates))
    return {
        "unit": f"{unit}/s",
        "setting": dict(setting),
        "repeats": repeats,
        **summary(rates),
    }


def rate_of(work: Callable[[], int]) -> Callable[[], float]:
    """Turn work that returns how many units it did into one that returns units a second."""

    def timed() -> float:
        started = time.perf_counter()
        units = work()
        return units / (time.perf_counter() - started)

    return timed


def seconds_of(work: Callable[[], object]) -> Callable[[], float]:
    """Turn work into one that returns the seconds it took."""

    def timed() -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return timed


def interleaved(
    contenders: Mapping[str, Callable[[], float]], repeats: int, *, uncounted: int = 1
) -> dict[str, list[float]]:
    """Run every contender once a round and return what each gave.

    Args:
        contenders: Each measures itself once.
        repeats: Rounds that count.
        uncounted: Rounds before them.
    """
    runs: dict[str, list[float]] = {contender: [] for contender in contenders}
    for repeat in range(-uncounted, repeats):
        for contender, measured in contenders.items():
            value = measured()
            if repeat >= 0:
                runs[contender].append(value)
    return runs


def medians(runs: Mapping[str, list[float]]) -> dict[str, float]:
    """Return the median of each contender's runs."""
    return {contender: statistics.median(values) for contender, values in runs.items()}


def summary(runs: Mapping[str, list[float]], digits: int = 2) -> dict[str, Any]:
    """Return medians and runs, rounded for a result file."""
    return {
        "median": {name: round(value, digits) for name, value in medians(runs).items()},
        "runs": {name: [round(value, digits) for value in runs[name]] for name in runs},
    }


def at_least(wanted: float, found: float) -> dict[str, Any]:
    """Return a goal's entry in a result file."""
    return {"wanted": f">= {wanted}", "found": round(found, 3), "met": found >= wanted}


def at_most(wanted: float, found: float) -> dict[str, Any]:
    """Return a goal's entry in a result file."""
    return {"wanted": f"<= {wanted}", "found": round(found, 3), "met": found <= wanted}


def print_goals(goals: Mapping[str, Mapping[str, Any]]) -> None:
    """Print what was wanted and what was found."""
    for name, goal in goals.items():
        met = "met" if goal["met"] else "not met"
        print(f"  {name}: {goal['found']}, wanted {goal['wanted']}: {met}")


def versions(libraries: tuple[str, ...]) -> dict[str, str]:
    """Return the installed versions; a library that is missing is said to be."""
    found = {}
    for library in libraries:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """Name the machine: processor, the instructions that may be used, threads, GPU, Python."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "processor": _processor(),
        "torch_instructions": torch.backends.cpu.get_cpu_capability(),
        "onednn_instructions": os.environ.get("ONEDNN_MAX_CPU_ISA", "all"),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def print_table(name: str, unit: str, median: Mapping[str, float]) -> None:
    """Print the medians, and how many times as fast the first contender is."""
    first = next(iter(median.values()))
    print(f"\n{name}: median {unit}/s, and how many times faster the first is")
    for contender, value in median.items():
        print(f"  {contender:<44} {value:>12,.1f} {first / value:>8.2f}x")
