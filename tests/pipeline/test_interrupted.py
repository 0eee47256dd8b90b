"""A signal to all processes of extract, as `timeout`, a batch system and `docker stop` send it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow("interrupts the stage at random moments")

ROOT = Path(__file__).parents[2]

TRIES = 9
"""A third of them of each kind of signal."""

SIGNALS = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
from cache.cli.command import run_guarded
from cache.cli.interrupts import INTERRUPTS
from workspace.settings import Params
from pipeline.encoding.encoder import Encoder
from pipeline.extract import extract

real = Encoder.submit
Encoder.submit = lambda self, x: (time.sleep(0.15), real(self, x))[1]

def stage(sender):
    os.write(sender, b"x")
    extract(Params.read(Path("params.yaml")))

random.seed(int(sys.argv[1]))
for number in range(int(sys.argv[2])):
    shutil.rmtree(".work", ignore_errors=True)
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), descriptor)
        run_guarded(lambda: stage(sender))
    os.read(receiver, 1)
    time.sleep(random.uniform(0, 1))
    for _ in range(1 + number % 2):
        os.killpg(child, INTERRUPTS[number % len(INTERRUPTS)])
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        # The stage has waited for its processes, so that not even a zombie is left to the system.
        os.killpg(child, 0)
        remain = True
    except ProcessLookupError:
        remain = False
    print(json.dumps([code, Path("stderr").read_text(), remain]), flush=True)
"""
"""Imports everything once, then runs the stage in a group of its own and stops each run at a random
moment, every other one by two signals."""


def test_a_signal_to_the_group_gives_one_line_at_any_moment(workspace, wanted):
    workspace.extract["workers"] = 2
    workspace.write()
    tried = subprocess.run(
        [sys.executable, "-c", SIGNALS, "0", str(TRIES)],
        cwd=workspace.root,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    runs = [json.loads(line) for line in tried.stdout.splitlines()]
    assert len(runs) == TRIES, tried.stderr
    line = "error: interrupted; run the same command again\n"
    assert runs == [[130, line, False]] * TRIES
    workspace.run(write=False)
    assert workspace.store_bytes() == wanted
