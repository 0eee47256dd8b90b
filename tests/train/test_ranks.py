"""A stage on two processes is the stage on one, but for the order of sums."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

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
from train.ranks import gather_of_ranks, sum_of_ranks
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
    shared = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": free_port()} | environment
    return [
        server.start(
            what, **{k: str(v) for k, v in shared.items()}, RANK=str(rank), LOCAL_RANK=str(rank)
        )
        for rank in range(number)
    ]


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


def test_torchrun_is_the_way_to_start_them(params, server):
    params(epochs=1)
    assert end_all(start_ranks(server, "pretrain")) == [0, 0]
    wanted = outcome("pretrain")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         "-m", "train.pretrain"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("pretrain: 3 steps")
    assert outcome("pretrain") == wanted
