"""A stage on two processes is the stage on one, but for the order of sums."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train.run
from cache import FeatureStore
from tests.conftest import write_store
from tests.train.stage_server import ROOT, outcome
from train import ranks
from train.data.examples import Example
from train.data.prompt_formats import phi_format
from train.data.prompts import caption_turns
from train.loop.step import build_step, mean_loss, optimizer_step
from train.model.captioner import CaptionModel
from train.model.language_model import add_lora, load_language_model, load_tokenizer
from train.model.projector import seeded_projector
from train.ranks import NEW_STORE, gather_of_ranks, sum_of_ranks
from train.run import pick_device
from train.settings import LlmSettings, LoraSettings
from workspace.errors import StageError

pytestmark = pytest.mark.slow("trains in several processes")

FEW = {"epochs": 2, "log_every_steps": 1, "validate_every_steps": 4, "samples": 1}
STEPS = 6
CAPTIONS = ("a red cat", "the dog is on the box in the red box")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_ranks(server, what, number=2, **environment):
    """Start the processes that `torchrun --nproc-per-node` would."""
    return start_in(server, what, [Path.cwd()] * number, **environment)


def start_in(server, what, folders, **environment):
    """Start one process in each of some folders, as if each folder were on a machine of its own."""
    shared = {"WORLD_SIZE": len(folders), "LOCAL_WORLD_SIZE": len(folders)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()} | environment
    started = []
    for rank, folder in enumerate(folders):
        own = shared | {"RANK": rank, "LOCAL_RANK": rank}
        with contextlib.chdir(folder):
            started.append(server.start(what, **{k: str(v) for k, v in own.items()}))
    return started


def end_all(commands):
    for command in commands:
        command.end()
    return [command.code for command in commands]


@pytest.fixture
def params(workspace):
    """Settings under which a pass of each process holds a few rows."""
    workspace.write_stage_1()

    def params(**changes):
        return workspace.params(
            pretrain=FEW | changes,
            finetune=FEW | {"lora": {"r": 4, "alpha": 8, "dropout": 0.0}} | changes,
            checkpoints={"every_steps": 2},
        )

    return params


def save_gradients():
    """Run in each process: write the gradients of one step, in float64, and its loss."""
    device = pick_device()
    asked = json.loads(Path("asked.json").read_text())
    llm = LlmSettings(model=asked["phi"], quantize="none", dtype="fp32")
    language_model = load_language_model(llm, device)
    add_lora(language_model, LoraSettings(r=4, alpha=8, dropout=0.0), 0)
    model = CaptionModel(seeded_projector("mlp", 8, 64, 0), language_model).double()
    for name, parameter in model.trainable_parameters().items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    examples = [
        Example(i, tuple(map(caption_turns, CAPTIONS[: 1 + i % 2]))) for i in asked["images"]
    ]
    data = build_step(
        examples,
        phi_format(load_tokenizer(llm)),
        FeatureStore(Path("features")),
        pass_tokens=60,
        row_tokens=30,
        max_text_tokens=99,
        device=device,
    )
    loss = mean_loss(model, data)
    optimizer = torch.optim.SGD(model.trainable_parameters().values(), lr=1.0)
    loss_sum = optimizer_step(model, optimizer, data, clip_norm=1e9, seed=(0, 1))
    found = {name: parameter.grad for name, parameter in model.trainable_parameters().items()}
    found["mean loss"] = torch.tensor(loss, dtype=torch.float64)
    found["loss sum"] = torch.tensor(loss_sum, dtype=torch.float64)
    found["passes"] = torch.tensor(len(data.batches))
    save_file(found, f"gradients of {os.environ.get('RANK', 'one')}.safetensors")


@pytest.mark.parametrize(("images", "passes"), [(range(100, 111), None), ([101], (1, 0))])
def test_gradients_and_losses_are_those_of_one_process(
    server, tmp_path, monkeypatch, phi_dir, images, passes
):
    """Also where one of them has nothing to do."""
    monkeypatch.chdir(tmp_path)
    write_store(Path("features"))
    Path("asked.json").write_text(json.dumps({"phi": str(phi_dir), "images": list(images)}))
    save = f"{__name__}:save_gradients"
    alone = server.start(save)
    assert alone.end() == (0, "")
    for number in (2, 3):
        ranks = start_ranks(server, save, number)
        assert end_all(ranks) == [0] * number, ranks[0].output
        wanted = load_file("gradients of one.safetensors")
        assert wanted.pop("passes") > 0
        found = [load_file(f"gradients of {rank}.safetensors") for rank in range(number)]
        made = [int(one.pop("passes")) for one in found]
        if passes:
            assert made == [*passes, 0][:number]
        else:
            assert min(made) > 0
        for one in found:
            assert one.keys() == wanted.keys()
            for name, gradient in wanted.items():
                assert gradient.dtype == torch.float64
                assert gradient.any()
                assert (one[name] - gradient).norm() <= 1e-10 * gradient.norm(), name
            assert all(torch.equal(one[name], found[0][name]) for name in wanted)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_stage_on_two_processes_has_the_history_of_one(server, params, stage):
    params()
    assert server.start(stage).end()[0] == 0
    one = outcome(stage)
    ranks = start_ranks(server, stage)
    assert end_all(ranks) == [0, 0], [rank.output for rank in ranks]
    said = [rank.output for rank in ranks]
    assert said[0].startswith(f"{stage}: {STEPS} steps")
    assert said[1] == "", "one process speaks"
    two = outcome(stage)
    assert [row["step"] for row in two["history"]] == [str(n) for n in range(1, STEPS + 1)]
    for ours, theirs in zip(two["history"], one["history"], strict=True):
        assert ours["learning_rate"] == theirs["learning_rate"]
        for name in ("loss", "validation_loss"):
            assert bool(ours[name]) == bool(theirs[name])
            if ours[name]:
                assert abs(float(ours[name]) - float(theirs[name])) <= 1e-5
    same = "steps", "images", "texts", "texts_cut"
    assert [two["metrics"][name] for name in same] == [one["metrics"][name] for name in same]
    assert json.loads(Path("runs", stage, "provenance.json").read_text())["processes"] == 2
    assert {path.name for path in Path(".work/runs", stage).iterdir()} == {".lock"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_two_processes_that_are_stopped_go_on_together(server, params, number):
    """SIGTERM to one of them stops both after the same step; a kill takes both."""
    params(epochs=20, log_every_steps=1000, validate_every_steps=1000)
    assert end_all(start_ranks(server, "finetune")) == [0, 0]
    wanted = outcome("finetune")
    shutil.rmtree("runs/finetune")
    ranks = start_ranks(server, "finetune")
    folder = Path(".work/runs/finetune")
    assert ranks[0].until(lambda: list(folder.glob("*/checkpoints/step-*")))
    asked = ranks[1:] if number == signal.SIGTERM else ranks
    for rank in asked:
        rank.signal(number)
    codes = end_all(ranks)
    assert codes == ([130, 130] if number == signal.SIGTERM else [-9, -9]), ranks[1].output
    assert not Path("runs/finetune").exists()
    newest = max(folder.glob("*/checkpoints/step-*"))
    ranks = start_ranks(server, "finetune")
    assert end_all(ranks) == [0, 0], ranks[0].output
    step = int(newest.stem.removeprefix("step-"))
    assert ranks[0].output.startswith(f"finetune: going on after step {step} of 60\n")
    assert outcome("finetune") == wanted


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (torch.distributed.DistNetworkError("Broken pipe"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer"), True),
        (RuntimeError("Gloo connectFullMesh failed with connection refused"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
    ],
)
@pytest.mark.parametrize("name", ["reduce", "gather"])
def test_an_error_of_the_process_itself_is_not_called_a_lost_process(
    monkeypatch, name, error, is_lost
):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(ranks, name, fail)
    exchange = {"reduce": sum_of_ranks, "gather": gather_of_ranks}[name]
    with pytest.raises(StageError if is_lost else type(error)) as caught:
        exchange(torch.ones(1))
    assert str(error) in str(caught.value)
    assert ("another process of the run has ended" in str(caught.value)) == is_lost


def test_restarts_that_would_hang_are_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(StageError, match=rf"^torchrun --max-restarts 3: .* Set {NEW_STORE}=1"):
        pick_device()
    for name, value in (("USE_AGENT_STORE", "False"), ("MAX_RESTARTS", "0")):
        with monkeypatch.context() as patch:
            patch.setenv(f"TORCHELASTIC_{name}", value)
            assert pick_device().type == "cpu"


def test_processes_that_cannot_form_their_group_end_with_a_line(monkeypatch):
    def fail(**named):
        raise torch.distributed.DistNetworkError("The client socket has timed out after 1000ms")

    monkeypatch.setattr(train.run, "PartialState", fail)
    with pytest.raises(StageError, match=r"or cannot be reached .*has timed out"):
        pick_device()


@pytest.fixture
def machines(params, workspace, tmp_path):
    """Two folders with the same inputs, as of two machines that share none."""
    params(epochs=20, log_every_steps=1000, validate_every_steps=1000)
    other = tmp_path / "other machine"
    shutil.copytree(workspace.root, other, ignore=lambda *_: [other.name])
    return [workspace.root, other]


def test_machines_without_a_shared_folder_go_on_from_the_checkpoint_of_the_first(server, machines):
    assert end_all(start_ranks(server, "finetune")) == [0, 0]
    wanted = outcome("finetune")
    shutil.rmtree("runs/finetune")
    ranks = start_in(server, "finetune", machines)
    folder = Path(".work/runs/finetune")
    assert ranks[0].until(lambda: list(folder.glob("*/checkpoints/step-*")))
    for rank in ranks:
        rank.signal(signal.SIGKILL)
    end_all(ranks)
    ranks = start_in(server, "finetune", machines)
    assert end_all(ranks) == [0, 0], [rank.output for rank in ranks]
    assert ranks[0].output.startswith("finetune: going on after step ")
    assert outcome("finetune") == wanted
    assert not (machines[1] / "runs/finetune").exists()
    assert not (machines[1] / ".work/runs").exists()


def test_machines_with_different_inputs_are_refused_by_every_process(server, machines):
    settings = machines[1] / "params.yaml"
    text = settings.read_text()
    settings.write_text(text.replace('"seed": 0', '"seed": 1'))
    assert settings.read_text() != text
    ranks = start_in(server, "finetune", machines)
    assert end_all(ranks) == [1, 1]
    for rank in ranks:
        assert rank.output.startswith(
            "error: the processes of the run have different inputs: seed is 0 in process 0 ("
        )
        assert ", but 1 in process 1 (" in rank.output
        assert rank.output.count("\n") == 1


def test_a_second_job_is_refused_and_the_reason_is_said_once(server, params):
    params(epochs=5)
    first = server.start("pretrain")
    assert first.until(lambda: list(Path(".work/runs/pretrain").glob("*/checkpoints/step-*")))
    first.signal(signal.SIGSTOP)
    ranks = start_ranks(server, "pretrain")
    assert end_all(ranks) == [1, 1]
    first.signal(signal.SIGCONT)
    assert first.end()[0] == 0
    assert ranks[0].output.startswith("error: .work/runs/pretrain: another process works in it.")
    assert ranks[1].output.startswith("error: another process of the run has ended")
    assert "Traceback" not in ranks[1].output


def children_of(pid):
    """Return the processes that torchrun has started, by their rank."""
    found = {}
    for place in Path("/proc").iterdir():
        if place.name.isdecimal():
            with contextlib.suppress(OSError):
                parent = int(place.joinpath("stat").read_text().rpartition(")")[2].split()[1])
                environment = place.joinpath("environ").read_bytes().split(b"\0")
                ranks = [e.partition(b"=")[2] for e in environment if e.startswith(b"RANK=")]
                if parent == pid and ranks:
                    found[int(ranks[0])] = int(place.name)
    return found


@pytest.fixture
def torchrun():
    """Start a stage on two processes with torchrun's own command."""
    started = []

    def start(*options):
        command = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d"]
        command += [f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--nproc-per-node=2", *options]
        started.append(
            subprocess.Popen(
                [*command, "-m", "train.pretrain"],
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", NEW_STORE: "1"},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=60)


def test_torchrun_starts_killed_processes_again_and_the_run_ends_the_same(params, server, torchrun):
    """First the second process is killed, then the main one, each after a new checkpoint."""
    params(epochs=20, log_every_steps=1000, validate_every_steps=1000)
    assert end_all(start_ranks(server, "pretrain")) == [0, 0]
    wanted = outcome("pretrain")
    shutil.rmtree("runs/pretrain")
    command = torchrun("--max-restarts=2")
    folder = Path(".work/runs/pretrain")

    def newest():
        return max((path.name for path in folder.glob("*/checkpoints/step-*")), default="")

    end = time.monotonic() + 300
    for rank in (1, 0):
        before = newest()
        while newest() == before:
            assert command.poll() is None, command.communicate()
            assert time.monotonic() < end
            time.sleep(0.01)
        os.kill(children_of(command.pid)[rank], signal.SIGKILL)
    output, errors = command.communicate(timeout=300)
    assert command.returncode == 0, errors
    assert output.startswith("pretrain: 60 steps")
    for number in (1, 2):
        assert f"pretrain: restart {number} of all processes by torchrun\n" in errors
    assert errors.count("pretrain: going on after step ") == 2
    assert "Traceback" not in errors
    assert outcome("pretrain") == wanted
    assert json.loads(Path("runs/pretrain/provenance.json").read_text())["restarts"] == 2
    assert {path.name for path in folder.iterdir()} == {".lock"}
