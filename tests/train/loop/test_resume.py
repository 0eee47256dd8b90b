"""A stage that is stopped, in whatever way, and started again ends as if it had never been."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

import train.loop.history
import train.loop.interrupt
import train.loop.loop
import train.stages.captions
from tests.conftest import write_store
from tests.train.stage_server import outcome
from train.control import control
from train.finetune import finetune
from train.loop.checkpoint import Checkpoints
from train.model.projector import seeded_projector
from train.pretrain import pretrain
from train.run import RunDirectory

pytestmark = pytest.mark.slow("kills and resumes training runs")

STAGES = {"pretrain": pretrain, "finetune": finetune}
STEPS = 9
LOOP = {"epochs": 3, "log_every_steps": 3, "validate_every_steps": 4, "samples": 2}
LORA = {"r": 4, "alpha": 8, "dropout": 0.2}


@pytest.fixture(scope="session")
def outcomes():
    return {}


@pytest.fixture
def world(workspace):
    """A workspace in which both stages can run, and their settings."""
    workspace.write_stage_1()

    def params(
        quantize="none", every_steps=2, llm=workspace.phi_dir, seed=0, controls=(), **changes
    ):
        return workspace.params(
            seed=seed,
            controls=dict(controls),
            llm={"model": str(llm), "quantize": quantize, "dtype": "fp32"},
            pretrain=LOOP | changes,
            finetune=LOOP | {"lora": LORA} | changes,
            checkpoints={"every_steps": every_steps, "keep": 2},
        )

    workspace.resumable = params
    return workspace


@pytest.fixture
def unbroken(outcomes):
    """What a stage ends with when nothing stops it."""

    def run(stage, params):
        key = stage, params.text
        if key not in outcomes:
            STAGES[stage](params)
            outcomes[key] = outcome(stage)
            start = Path("runs/pretrain/projector.safetensors").read_bytes()
            shutil.rmtree(f"runs/{stage}")
            if stage == "finetune":
                assert Path("runs/pretrain/projector.safetensors").read_bytes() == start
        return outcomes[key]

    return run


def checkpoints(stage):
    paths = sorted(Path(".work/runs", stage).glob("*/checkpoints/step-*.safetensors"))
    return {int(path.stem.removeprefix("step-")): path for path in paths}


def left(stage):
    return {path.name for path in Path(".work/runs", stage).iterdir()}


def signal_at(monkeypatch, name, call, *, numbers=(signal.SIGTERM,), module=train.loop.loop):
    """Send signals to this process when a function is called for the n-th time."""
    real, calls = getattr(module, name), []

    def signalling(*arguments, **named):
        calls.append(1)
        if len(calls) == call:
            for number in numbers:
                signal.raise_signal(number)
        return real(*arguments, **named)

    monkeypatch.setattr(module, name, signalling)


@pytest.fixture
def stopped(world, monkeypatch):
    """Stop a stage in the middle of a step, by a signal."""

    def stop(stage, params, step=5):
        with monkeypatch.context() as patch:
            signal_at(patch, "optimizer_step", step)
            with pytest.raises(KeyboardInterrupt):
                STAGES[stage](params)
        assert max(checkpoints(stage)) == step

    return stop


@pytest.fixture
def steps_made(monkeypatch):
    """The numbers of the steps that are made."""
    made, real = [], train.loop.loop.optimizer_step

    def counting(*arguments, seed, **named):
        made.append(seed[1])
        return real(*arguments, seed=seed, **named)

    monkeypatch.setattr(train.loop.loop, "optimizer_step", counting)
    return made


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("stage", list(STAGES))
def test_a_stage_killed_at_random_moments_ends_as_one_that_never_was(
    world, server, unbroken, stage, quantize
):
    params = world.resumable(quantize)
    wanted = unbroken(stage, params)
    moments, said = random.Random(f"{stage} {quantize}"), ""
    for step in (2, 4, 8):
        command = server.start(stage)
        if command.until(lambda step=step: max(checkpoints(stage), default=0) >= step):
            time.sleep(moments.uniform(0, 0.1))
            command.kill()
        said += command.output
    code, output = server.start(stage).end()
    assert (code, output.splitlines()[-1].split(",")[0]) == (0, f"{stage}: 9 steps")
    assert "going on after step" in said
    assert outcome(stage) == wanted
    assert left(stage) == {".lock"}


class Disk:
    """What a kill would leave of some folders, before every operation on a file or a folder."""

    FOLDERS = (".work/runs", "runs", "reports")
    OPERATIONS = ("mkdir", "replace", "unlink", "rmdir", "fsync")

    def __init__(self, monkeypatch):
        self.states = []
        for name in self.OPERATIONS:
            monkeypatch.setattr(os, name, self._looking_before(getattr(os, name)))

    def _looking_before(self, operation):
        def look_and_do(*arguments, **named):
            state = self.read()
            if not self.states or state != self.states[-1]:
                self.states.append(state)
            return operation(*arguments, **named)

        return look_and_do

    def read(self):
        paths = [path for folder in self.FOLDERS for path in Path(folder).rglob("*")]
        return {path: path.read_bytes() if path.is_file() else None for path in paths}

    def write(self, state):
        for folder in self.FOLDERS:
            shutil.rmtree(folder, ignore_errors=True)
        for path, content in state.items():
            (path if content is None else path.parent).mkdir(parents=True, exist_ok=True)
            if content is not None:
                path.write_bytes(content)


@pytest.mark.parametrize(("stage", "whole"), [("pretrain", True), ("finetune", False)])
def test_a_stage_killed_at_any_operation_on_a_file_ends_as_one_that_never_was(
    world, stage, whole, steps_made
):
    """A run of three steps replaces an older one; of stage 2, only its end is looked at."""
    run = STAGES[stage]
    run(world.resumable(seed=1, epochs=1))
    older = outcome(stage)
    params = world.resumable(every_steps=1, epochs=1)
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch)
        run(params)
    wanted = outcome(stage)
    states = disk.states
    if not whole:
        finished = [f"step-{3:08}.safetensors" in {p.name for p in state} for state in states]
        states = states[finished.index(True) :]
    assert len(states) > 15
    goes_on, all_made = set(), False
    for state in states:
        disk.write(state)
        published = outcome(stage) if Path("runs", stage).exists() else None
        assert published in (older, wanted, None), "half a run is published"
        all_made |= 3 in checkpoints(stage)
        steps_made.clear()
        run(params)
        if all_made and published != wanted:
            assert not steps_made, "what was made is given up before it is published"
        goes_on.add(len(steps_made))
        assert outcome(stage) == wanted
        assert left(stage) == {".lock"}
    assert goes_on == ({0, 1, 2, 3} if whole else {0, 3})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_and_exits_with_130(world, server, unbroken, number):
    params = world.resumable(every_steps=1000, epochs=5, log_every_steps=1)
    wanted = unbroken("pretrain", params)
    command = server.start("pretrain")
    assert command.until(lambda: list(Path(".work/runs/pretrain").glob("*/files/history.csv")))
    command.signal(number)
    code, output = command.end()
    assert code == 130
    asked = f"{number.name}: stopping after this step; again to stop at once\n"
    # One that comes while a row is written or validated stops there, and needs not to say so.
    assert output.removeprefix("\n").removeprefix(asked) == (
        "error: interrupted; run the same command again\n"
    )
    (step,) = checkpoints("pretrain")
    (history,) = Path(".work/runs/pretrain").glob("*/files/history.csv")
    assert step - 1 <= len(history.read_text().splitlines()) - 1 <= step
    code, output = server.start("pretrain").end()
    assert code == 0
    assert output.startswith(f"pretrain: going on after step {step} of 15\n")
    assert outcome("pretrain") == wanted


POINTS = [
    (train.loop.loop, "optimizer_step", 1, 1),
    (train.loop.loop, "optimizer_step", 5, 5),
    (train.loop.loop, "validation_loss", 1, 4),
    (train.loop.loop, "validation_loss", 3, STEPS),
    (train.loop.loop, "samples", 1, 4),
    (RunDirectory, "write_history", 1, 3),
    (RunDirectory, "write_history", 4, 8),
    (Checkpoints, "save", 1, STEPS),
]
"""What is called, for which time, and at which step that is."""


@pytest.mark.parametrize(("owner", "name", "call", "step"), POINTS)
@pytest.mark.parametrize("stage", list(STAGES))
def test_a_signal_at_any_point_saves_that_step(
    world, unbroken, monkeypatch, capsys, stage, owner, name, call, step
):
    params = world.resumable(every_steps=1000)
    wanted = unbroken(stage, params)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        signal_at(patch, name, call, module=owner)
        with pytest.raises(KeyboardInterrupt):
            STAGES[stage](params)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert list(checkpoints(stage)) == [step]
    assert not Path("runs", stage, "history.csv").exists()
    capsys.readouterr()
    STAGES[stage](params)
    assert f"{stage}: going on after step {step} of {STEPS}\n" in capsys.readouterr().err
    assert outcome(stage) == wanted


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        (train.loop.loop, "optimizer_step", 5),
        (train.loop.loop, "samples", 1),
        (train.loop.history, "asdict", 5),
    ],
)
def test_a_second_signal_stops_at_once_and_the_run_still_ends_the_same(
    world, unbroken, monkeypatch, module, name, call
):
    params = world.resumable()
    wanted = unbroken("finetune", params)
    with monkeypatch.context() as patch:
        both = signal.SIGTERM, signal.SIGINT
        signal_at(patch, name, call, numbers=both, module=module)
        # Not the same request twice, however soon the second one comes.
        patch.setattr(train.loop.interrupt, "REPEAT_SECONDS", 0)
        with pytest.raises(KeyboardInterrupt):
            finetune(params)
    assert 5 not in checkpoints("finetune")
    finetune(params)
    assert outcome("finetune") == wanted


def test_a_control_that_is_stopped_ends_as_one_that_never_was(world, monkeypatch, capsys):
    def params():
        return world.resumable(every_steps=1000, controls={"trained_blind": True})

    control(params())
    wanted = outcome("control")
    shutil.rmtree("runs/control")
    with monkeypatch.context() as patch:
        signal_at(patch, "optimizer_step", 5)
        with pytest.raises(KeyboardInterrupt):
            control(params())
    assert list(checkpoints("control")) == [5]
    # The stage itself has checkpoints of its own.
    finetune(params())
    assert list(checkpoints("control")) == [5]
    capsys.readouterr()
    control(params())
    assert f"control: going on after step 5 of {STEPS}\n" in capsys.readouterr().err
    assert outcome("control") == wanted


def change_learning_rate(world):
    return world.resumable(learning_rate=2e-2)


def change_features(world):
    shutil.rmtree("data/features")
    write_store(Path("data/features"), seed=1)
    return world.resumable()


def change_captions(world):
    table = pq.read_table("data/index/captions.parquet")
    pq.write_table(table[1:], "data/index/captions.parquet")
    return world.resumable()


def change_language_model(world):
    weights = load_file("phi/model.safetensors")
    weights["lm_head.bias"] += 0.01
    save_file(weights, "phi/model.safetensors", {"format": "pt"})
    return world.resumable(llm="phi")


CHANGES = [
    (change_learning_rate, "pretrain.learning_rate 0.01 there, 0.02 here"),
    (change_features, "features_sha256 "),
    (change_captions, "captions.parquet_sha256 "),
    (change_language_model, "language_model "),
]


@pytest.mark.parametrize(("change", "named"), CHANGES)
def test_a_run_of_other_inputs_is_not_continued_until_they_are_back(
    world, unbroken, stopped, capsys, steps_made, change, named
):
    shutil.copytree(world.phi_dir, "phi")
    llm = "phi" if change is change_language_model else world.phi_dir
    params = world.resumable(llm=llm)
    wanted = unbroken("pretrain", params)
    for folder in ("data", "phi"):
        shutil.copytree(folder, f"kept/{folder}")
    stopped("pretrain", params)
    (old,) = {path.parent.parent for path in checkpoints("pretrain").values()}
    steps_made.clear()
    capsys.readouterr()
    pretrain(change(world))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(
        f"pretrain: starts afresh. The checkpoints in {old} are of another run: {named}"
    )
    assert said.count(" there, ") == 1, "nothing but this has changed"
    assert steps_made[0] == 1
    assert outcome("pretrain") != wanted
    assert left("pretrain") == {".lock", old.name}
    for folder in ("data", "phi"):
        shutil.rmtree(folder)
        shutil.copytree(f"kept/{folder}", folder)
    steps_made.clear()
    pretrain(world.resumable(llm=llm))
    assert capsys.readouterr().err == f"pretrain: going on after step 5 of {STEPS}\n"
    assert steps_made == [6, 7, 8, 9]
    assert outcome("pretrain") == wanted


def test_the_projector_that_stage_2_starts_from_is_one_of_its_inputs(world, stopped, capsys):
    stopped("finetune", world.resumable())
    seeded_projector("mlp", 8, 64, 4).save(Path("runs/pretrain/projector.safetensors"))
    finetune(world.resumable())
    said = capsys.readouterr().err
    assert "are of another run: start_projector " in said
    assert "going on" not in said


def test_how_often_is_saved_and_what_is_recorded_may_change(world, stopped, unbroken, capsys):
    wanted = unbroken("pretrain", world.resumable())
    stopped("pretrain", world.resumable())
    params = world.resumable(every_steps=1)
    pretrain(params)
    assert f"going on after step 5 of {STEPS}\n" in capsys.readouterr().err
    assert outcome("pretrain") == wanted | {"params": params.path.read_bytes()}


def test_a_damaged_checkpoint_is_named_and_the_one_before_continued(
    world, unbroken, stopped, capsys
):
    params = world.resumable()
    wanted = unbroken("finetune", params)
    stopped("finetune", params)
    newest = checkpoints("finetune")[5]
    newest.write_bytes(newest.read_bytes()[:-100])
    finetune(params)
    said = capsys.readouterr().err.splitlines()[-2:]
    assert said[0].startswith(f"{newest}: damaged (")
    assert said[0].endswith("); trying the one before")
    assert said[1] == f"finetune: going on after step 4 of {STEPS}"
    assert outcome("finetune") == wanted


def test_with_all_checkpoints_damaged_a_stage_starts_from_the_beginning(
    world, unbroken, stopped, capsys, steps_made
):
    params = world.resumable()
    wanted = unbroken("pretrain", params)
    stopped("pretrain", params)
    for path in checkpoints("pretrain").values():
        path.write_bytes(b"")
    steps_made.clear()
    capsys.readouterr()
    pretrain(params)
    said = capsys.readouterr().err
    assert said.count("damaged") == 2
    assert "going on" not in said
    assert steps_made == list(range(1, STEPS + 1))
    assert outcome("pretrain") == wanted


def test_a_second_command_at_the_same_time_is_refused_in_one_line(world, server, unbroken):
    params = world.resumable(epochs=5)
    wanted = unbroken("pretrain", params)
    first = server.start("pretrain")
    assert first.until(lambda: checkpoints("pretrain"))
    first.signal(signal.SIGSTOP)
    code, output = server.start("pretrain").end()
    assert (code, output.count("\n")) == (1, 1)
    assert output.startswith("error: .work/runs/pretrain: another process works in it.")
    first.signal(signal.SIGCONT)
    code, output = first.end()
    assert code == 0, output
    assert outcome("pretrain") == wanted


def test_the_settings_in_the_run_are_the_file_that_was_read(world, monkeypatch):
    """It is replaced while the language model loads."""
    params = world.resumable(epochs=1)
    before = b"# a comment\r\n" + params.path.read_bytes() + "# \u00e9".encode()
    params.path.write_bytes(before)
    read = type(params).read(params.path)
    load = train.stages.captions.load_language_model

    def replace_and_load(*arguments):
        world.resumable(epochs=2)
        return load(*arguments)

    monkeypatch.setattr(train.stages.captions, "load_language_model", replace_and_load)
    pretrain(read)
    assert outcome("pretrain")["params"] == before
    assert outcome("pretrain")["metrics"]["steps"] == 3
