import dataclasses
import warnings
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bench.gpu_parts import training
from bench.gpu_parts.models import make_language_model
from bench.gpu_parts.packed_loop import HEADS
from bench.gpu_parts.training import Chip, Loop, Steps
from bench.step import FINETUNE, PRETRAIN, make_features
from bench.stores import SPEC
from bench.texts import make_tokenizer
from cache import FeatureStore
from tests.bench.models import TINY_PHI
from train.settings import LoraSettings

pytestmark = pytest.mark.slow("trains with every loop")

IMAGES, RANK = 6, 2
CHIP = Chip(measured=2e9, data_sheet=None)


@pytest.fixture(scope="module", params=[PRETRAIN, FINETUNE])
def stage(request, tmp_path_factory):
    torch.set_num_threads(1)
    spec = dataclasses.replace(SPEC, patches=4, width=8)
    store = FeatureStore(make_features(tmp_path_factory.mktemp("features"), 4, spec))
    base = make_language_model(
        TINY_PHI, quantize=False, dtype=torch.float32, device=torch.device("cpu")
    )
    for parameter in base.parameters():
        # Large enough that every position matters to every later logit.
        nn.init.normal_(parameter, std=0.1)
    lora = LoraSettings(r=RANK, alpha=4, dropout=0.3)
    return training.make_stage(request.param, base, make_tokenizer(), store, lora, IMAGES)


def loops_of(stage):
    return {
        "usual": training.usual_loop_of(stage, 3),
        **{head: training.packed_loop_of(stage, 300, head) for head in list(HEADS)[:2]},
    }


def test_all_loops_have_the_gradients_of_ours(stage):
    ours = training.our_loop(stage, 300)
    for name, loop in loops_of(stage).items():
        assert 0 < training.difference(stage, ours, loop) < 1e-5, name


def test_comparing_gradients_leaves_loras_dropout_as_it_is(stage):
    training.difference(stage, training.our_loop(stage, 300), training.usual_loop_of(stage, 3))
    shares = {m.p for m in stage.model.modules() if isinstance(m, nn.Dropout) and m.training}
    assert shares == ({0.3} if stage.name == FINETUNE else set())


def test_another_loss_is_told_from_ours(stage):
    ours, usual = training.our_loop(stage, 300), training.usual_loop_of(stage, 3)
    other = dataclasses.replace(usual, prepare=lambda examples: usual.prepare(examples)[1:])
    assert training.difference(stage, ours, other) > 0.05


def test_a_row_tells_rates_of_the_timed_steps_alone(stage, monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(training.time, "perf_counter", lambda: float(next(now)))
    made = []
    loop = Loop(
        lambda: None, lambda examples: examples, lambda data: made.append(data) or 0.5, True
    )

    class Ahead:
        waited = last_wait = 0.0

        def __init__(self, prepare, items):
            self.items = list(map(prepare, items))

        def __iter__(self):
            for _ in self.items:
                self.last_wait = 0.25
                self.waited += 0.25
                yield _

    monkeypatch.setattr(training, "Prefetcher", Ahead)
    row = training.measure_loop(stage, loop, 2, Steps(warmup=2, timed=3), 0, CHIP)
    # One more step counts the host's waits.
    assert len(made) == 6
    assert [e.image_id for e in made[1]] != [e.image_id for e in made[0]]
    # The first timed step counts from when its data was waited for.
    assert row["seconds"] == [1.25, 1.0, 1.0]
    assert row["wait_share"] == round(0.75 / 3.25, 4)
    timed = [example for step in made[2:5] for example in step]
    work = training.work_of(stage, timed, shares_patches=True)
    assert row["texts_per_second"] == round(work.texts / 3.25, 1)
    assert row["positions_per_second"] == round(work.positions / 3.25)
    assert row["supervised_tokens_per_second"] == round(work.targets / 3.25)
    flops = training.step_flops(work, TINY_PHI, 8, 0)
    assert row["share_of_bf16"] == row["share_of_measured_bf16"] == round(flops / 3.25 / 2e9, 4)
    assert row["loss"] == 0.5
    assert row["compilations"] == 0
    assert row["host_waits"] is None
    assert "peak_gib" not in row


def test_a_real_row_of_every_loop_is_measured(stage):
    rank = RANK if stage.name == FINETUNE else 0
    for loop in (training.our_loop(stage, 300), *loops_of(stage).values()):
        row = training.measure_loop(stage, loop, 2, Steps(warmup=1, timed=1), rank, CHIP)
        assert row["loss"] > 1
        assert row["texts_per_second"] > 0
        assert row["share_of_bf16"] > 0


def test_steps_take_other_images_and_begin_again(stage):
    steps = list(islice(training.examples_of_steps(stage, 4), 3))
    assert steps[0] == stage.examples[:4]
    assert steps[1] == stage.examples[4:] + stage.examples[:2]
    assert steps[2] == stage.examples[2:]
    assert {e.image_id for e in stage.examples} == {0, 1, 2, 3}, "those of the store"


def test_images_nearly_fill_passes(stage):
    images = training.images_of_passes(stage, 2, 3000)
    mean = training.work_of(stage, stage.examples, shares_patches=True).positions / IMAGES
    assert 0.8 * 6000 < images * mean <= 6000
    assert training.images_of_passes(stage, 1, 1) == 1


def test_an_estimate_grows_with_the_work(stage):
    ours, usual = training.our_loop(stage, 300), training.usual_loop_of(stage, 3)

    def estimate(loop, images, timed=4):
        steps = Steps(warmup=1, timed=timed)
        return training.estimate_seconds(stage, loop, images, steps, RANK, CHIP)

    few, many = (estimate(ours, images) - 4 for images in (IMAGES, 10 * IMAGES))
    assert many == pytest.approx(10 * few)
    assert estimate(ours, IMAGES, timed=10) - 4 == pytest.approx(2 * few)
    # One sequence a text repeats the patches.
    assert estimate(usual, IMAGES) > estimate(ours, IMAGES)


def test_waits_of_the_host_are_counted(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def work():
        assert modes == ["warn"]
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    assert training.host_waits(work, SimpleNamespace(type="cuda")) == 3
    assert modes == ["warn", 0]


def test_memory_is_that_of_one_model_and_its_steps(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    # Another model has 10 GiB.
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 12 * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 17 * 2**30)
    weights = SimpleNamespace(nbytes=2 * 2**30, device=SimpleNamespace(type="cuda"))
    model = SimpleNamespace(parameters=lambda: iter([weights]))
    with training.peak_gpu_memory(model) as memory:
        assert memory == {}
    assert memory == {"peak_gib": 7.0, "weights_gib": 2.0}
