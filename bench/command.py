"""The frame around a benchmark's entry point: `--help`, `--quick`, and how long it takes.

`--quick` runs the same code on small sizes, so that a change to it is tried in a minute.
"""

import argparse
import os
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch

from bench.measure import RESULTS, machine, versions
from cache.cli.command import command_parser, run_guarded
from cache.files.atomic import write_json


def run_benchmark(
    name: str,
    measure: Callable[[argparse.Namespace], Mapping[str, Any]],
    parser: argparse.ArgumentParser,
    *,
    minutes: int,
    quick_seconds: int,
    libraries: tuple[str, ...],
) -> NoReturn:
    """Read the command line, say how long it will take, measure, write `bench/results/<name>.json`.

    Args:
        name: Of the result file.
        measure: Measures and prints; takes the arguments, whose `quick` asks for small sizes, and
            returns what the result file says besides the machine.
        parser: From `benchmark_parser`.
        minutes: What all of it takes on two cores.
        quick_seconds: What `--quick` takes there.
        libraries: Whose versions belong to the result.
    """
    parser.epilog = f"It takes about {minutes} min on two cores (--quick: {quick_seconds} s)."
    arguments = parser.parse_args()

    def work() -> None:
        if arguments.quick:
            # Small work gains nothing from two threads; on a busy machine they wait for each other.
            os.environ.setdefault("OMP_NUM_THREADS", "1")
            torch.set_num_threads(1)
        print(
            f"{name}: takes about {minutes} min on two cores (--quick: {quick_seconds} s)",
            flush=True,
        )
        result = {**measure(arguments), "machine": machine(), "versions": versions(libraries)}
        if arguments.quick:
            print(f"{name}: small sizes, whose figures mean little; no result file was written")
        else:
            write_json(RESULTS / f"{name}.json", result)
            print(f"{name}: written to {RESULTS / f'{name}.json'}")

    run_guarded(work)


def benchmark_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of `--quick`, to which a benchmark may add arguments of its own.

    Args:
        description: The benchmark's docstring, shown by `--help`.
    """
    parser = command_parser(description)
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, one round, and no result file"
    )
    return parser
