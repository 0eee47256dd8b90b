"""Where the seconds before a training stage's first optimizer step go: the part of `bench.startup`
that looks into the stage.

    python -m bench.first_step <stage> <start>

Runs a stage in the working directory up to the end of its first step, and prints one JSON object:
the seconds of each phase. The start is `time.monotonic()` of when this process was started.
"""

import contextlib
import importlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from cache.cli.command import command_parser, run_guarded

PHASES = {
    "tables": {
        "FeatureStore",
        "read_caption_examples",
        "read_conversation_examples",
        "held_out_images",
        "with_features",
    },
    "model": {
        "load_tokenizer",
        "load_language_model",
        "load_projector",
        "seeded_projector",
        "add_lora",
        "language_model_fingerprint",
    },
    "run": {"identity", "provenance", "RunDirectory"},
    "tracker": {"Tracker"},
    "plan": {"plan_steps"},
}
"""What a stage calls in each phase; not every stage calls all of them."""

MODULES = ("train.{stage}", "train.loop.setup")
"""Where it does."""


class Stopwatch:
    """The seconds of each phase, from the start of the process."""

    def __init__(self, started: float) -> None:
        self._last = self._started = started
        self.seconds: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """Count what passed since the last lap for a phase."""
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now
        self.seconds["total"] = now - self._started

    def watch(self, module: ModuleType, name: str, phase: str) -> None:
        """Count the seconds in a function of a module for a phase, those before it for none."""
        work = getattr(module, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            self.lap("other")
            try:
                return work(*arguments, **named)
            finally:
                self.lap(phase)

        setattr(module, name, timed)


def watch_phases(watch: Stopwatch, stage: str) -> None:
    """Watch all phases of a stage; each has one function at least."""
    for phase, names in PHASES.items():
        found = [
            (module, name)
            for module in (importlib.import_module(m.format(stage=stage)) for m in MODULES)
            for name in names & vars(module).keys()
        ]
        assert found, f"{stage} has nothing of phase {phase}: {', '.join(names)}"
        for module, name in found:
            watch.watch(module, name, phase)


@contextlib.contextmanager
def ending_with_first_step(watch: Stopwatch) -> Iterator[None]:
    """Leave the stage when its first optimizer step is done."""
    loop: Any = importlib.import_module("train.loop.loop")
    make_step = loop.optimizer_step

    def first_step(*arguments: Any, **named: Any) -> None:
        make_step(*arguments, **named)
        watch.lap("first step")
        raise SystemExit

    loop.optimizer_step = first_step
    with contextlib.suppress(SystemExit):
        yield


def run(stage: str, started: float) -> None:
    """Run a stage up to its first step and print the seconds."""
    watch = Stopwatch(started)
    settings = importlib.import_module("workspace.settings")
    module = importlib.import_module(f"train.{stage}")
    watch.lap("import")
    watch_phases(watch, stage)
    with ending_with_first_step(watch):
        getattr(module, stage)(settings.Params.read(Path("params.yaml")))
    print(json.dumps(watch.seconds))


def main() -> None:
    """Read the command line and run."""
    parser = command_parser(__doc__)
    parser.add_argument("stage", choices=("pretrain", "finetune"))
    parser.add_argument("start", type=float)
    arguments = parser.parse_args()
    run_guarded(lambda: run(arguments.stage, arguments.start))


if __name__ == "__main__":
    main()
