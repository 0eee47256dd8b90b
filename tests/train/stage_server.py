"""Runs the training stages as commands in processes of their own, which tests stop and kill, and
says with what they ended.

To import torch takes seconds, so one process does it once (`python -m tests.train.stage_server`)
and forks for every command. It forks before anything is computed: torch allows no other order.
"""

import csv
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]
STAGES = ("pretrain", "finetune")
SPEEDS = {"tokens_per_second", "images_per_second", "data_wait_share", "peak_memory_gib", "seconds"}
SECONDS = 120
"""After so long, a command hangs."""


def outcome(stage):
    """Everything that a stage has published, but for what depends on the clock."""
    run = Path("runs", stage)
    with (run / "history.csv").open(newline="") as file:
        rows = [without_speeds(row) for row in csv.DictReader(file)]
    metrics = without_speeds(json.loads((run / "metrics.json").read_text()))
    return {path.name: path.read_bytes() for path in run.rglob("*.safetensors")} | {
        "history": rows,
        "metrics": metrics,
        "params": (run / "params.yaml").read_bytes(),
    }


def without_speeds(row):
    return {name: value for name, value in row.items() if name not in SPEEDS}


class StageServer:
    """The process that forks; ended on leaving the `with`, with every command that goes on."""

    def __enter__(self):
        self._commands = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_):
        for command in self._commands:
            if not command.is_done():
                command.kill()
        self._process.kill()
        self._process.communicate()

    def start(self, what, **environment):
        """Start a stage in the current folder, or a function of tests, named `module:function`."""
        output = Path.cwd() / f"output of {time.monotonic_ns()}"
        asked = {"what": what, "folder": str(Path.cwd()), "output": str(output)}
        command = Command(self._ask(asked | {"environment": environment}), output, self._ask)
        self._commands.append(command)
        return command

    def _ask(self, question):
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


class Command:
    """One command that was started."""

    def __init__(self, pid, output, ask):
        self._pid, self._output, self._ask = pid, output, ask
        self.code = None

    @property
    def output(self):
        """What it has printed, errors included."""
        return self._output.read_text()

    def signal(self, number):
        os.kill(self._pid, number)

    def is_done(self):
        """Say whether it has ended; its exit code is known then, of a kill the negative signal."""
        if self.code is None:
            self.code = self._ask({"wait": self._pid})
        return self.code is not None

    def until(self, condition):
        """Wait until a condition holds, and say so; or until the command has ended."""
        end = time.monotonic() + SECONDS
        while not self.is_done():
            if condition():
                return True
            assert time.monotonic() < end, f"hangs: {self.kill() or self.output}"
            time.sleep(0.01)
        return False

    def kill(self):
        """Kill it as the system does when memory is short."""
        self.signal(signal.SIGKILL)
        self.until(lambda: False)

    def end(self):
        """Wait for its end; return exit code and output."""
        self.until(lambda: False)
        return self.code, self.output


def _serve():
    for module in ("captions", "conversations"):
        importlib.import_module(f"train.stages.{module}")
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            pid, status = os.waitpid(asked["wait"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork() or _run(**asked)
        print(json.dumps(answer), flush=True)


def _run(what, folder, output, environment):
    """Do what was asked for in this process, which was made for it; never returns."""
    code = 1
    try:
        os.chdir(folder)
        os.environ.update(environment)
        sys.argv = [what]
        opened = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for descriptor, target in ((os.open(os.devnull, os.O_RDONLY), 0), (opened, 1), (opened, 2)):
            os.dup2(descriptor, target)
        code = _do(what)
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _do(what):
    from workspace.stage import run_stage

    if what in STAGES:
        # As `python -m train.<stage>` does.
        run_stage(getattr(importlib.import_module(f"train.{what}"), what), "")
    module, function = what.split(":")
    getattr(importlib.import_module(module), function)()
    return 0


if __name__ == "__main__":
    _serve()
