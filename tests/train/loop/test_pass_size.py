"""Laws of `micro_batch_tokens: auto`, with stand-ins for a GPU's memory."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import train.loop.pass_size
import train.loop.step
from train.data.examples import Example
from train.data.prompts import caption_turns
from train.loop.pass_size import (
    FREE_SHARE,
    OPTIMIZER_COPIES,
    SIZES,
    GpuMemory,
    _positions_of_a_step,
    largest_fitting,
    pass_of,
    with_pass_size,
)
from train.settings import CPU_TOKENS
from workspace.errors import StageError

GIB = 2**30
EXAMPLES = [
    Example(i, tuple(caption_turns(f"a {a} in the box") for a in ("cat", "dog" + " red" * (i % 5))))
    for i in range(100, 112)
]


class FakeMemory:
    """A GPU on which a pass takes a fixed part and a part for each position."""

    def __init__(self, *, fixed=2 * GIB, a_position=GIB // 1000, total=16 * GIB, fails_above=None):
        self._fixed, self._a_position, self._total = fixed, a_position, total
        self._fails_above = fails_above
        self.tried, self.released = [], 0

    def available(self):
        return self._total

    def peak(self, tokens):
        assert self.released == len(self.tried), "the pass before still takes memory"
        self.tried.append(tokens)
        taken = self._fixed + tokens * self._a_position
        if taken > self._total or (self._fails_above and tokens > self._fails_above):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return taken

    def release(self):
        self.released += 1


@pytest.fixture
def setup(make_setup, settings):
    def make(examples=EXAMPLES, batch_size=8, **changes):
        chosen = settings(**{"micro_batch_tokens": "auto"} | changes)
        return make_setup(examples, batch_size=batch_size, settings=chosen)

    return make


def test_the_positions_of_a_step_count_the_tokens_before_the_patches(setup, chat_prompts):
    for made in (setup(), replace(setup(), prompt_format=chat_prompts)):
        wanted = made.step_data(made.examples_of(made.plan()[0])).num_positions
        assert _positions_of_a_step(made) == wanted


@pytest.fixture
def large_steps(monkeypatch):
    """Steps that hold more positions than any pass."""
    monkeypatch.setattr(train.loop.pass_size, "_positions_of_a_step", lambda setup: 10**6)


def test_sizes_rise_by_a_quarter_of_an_octave_at_most():
    assert list(SIZES) == sorted(set(SIZES))
    assert (SIZES[0], SIZES[-1]) == (512, 32_768)
    assert all(size % 128 == 0 for size in SIZES)
    assert all(b <= 1.25 * a for a, b in itertools.pairwise(SIZES))


@pytest.mark.parametrize("total", [2, 3, 4, 6, 8, 12, 16, 24, 40, 80, 141])
@pytest.mark.parametrize("fixed", [0.5, 1.9, 6.0])
def test_the_largest_size_is_chosen_that_leaves_the_margin(total, fixed):
    memory = FakeMemory(fixed=fixed * GIB, total=total * GIB)
    fitting = [
        size
        for size in SIZES
        if fixed * GIB + size * (GIB // 1000) <= (1 - FREE_SHARE) * total * GIB
    ]
    assert largest_fitting(memory, SIZES) == max(fitting, default=0)
    assert memory.released == len(memory.tried)
    # Passes come from below: none is more than twice of what fits, and few are tried.
    assert max(memory.tried) <= max(2 * max(fitting, default=0), SIZES[0])
    assert len(memory.tried) <= 9


@pytest.mark.parametrize("limit", [1, 511, 512, 700, 5000, 32_767, 32_768, 10**6])
def test_a_pass_that_fails_is_caught_and_no_larger_one_is_chosen(limit):
    memory = FakeMemory(a_position=0, fails_above=limit)
    fitting = [size for size in SIZES if size <= limit]
    assert largest_fitting(memory, SIZES) == max(fitting, default=0)


def test_what_was_chosen_and_why_is_said(setup, capsys, large_steps):
    made = setup()
    found = with_pass_size(made, "pretrain", None, FakeMemory(a_position=GIB // 1000))
    assert found.pass_tokens == found.settings.micro_batch_tokens == 10_240
    assert found.model is made.model
    assert capsys.readouterr().err == (
        "pretrain: micro_batch_tokens is 10240: larger passes would not leave 15% of 16.0 GiB "
        "free\n"
    )
    with_pass_size(made, "pretrain", None, FakeMemory(total=1000 * GIB))
    assert "micro_batch_tokens is 32768: the most that is tried" in capsys.readouterr().err


def test_no_more_is_tried_than_a_step_holds(setup, capsys):
    made = setup(batch_size=10**6, texts_per_image=9)
    (step,) = made.plan()
    held = made.step_data(made.examples_of(step)).num_positions
    memory = FakeMemory(a_position=0)
    found = with_pass_size(made, "pretrain", None, memory)
    assert found.pass_tokens >= held
    assert memory.tried == [512]
    assert "micro_batch_tokens is 512: enough for a whole step" in capsys.readouterr().err


@pytest.mark.usefixtures("large_steps")
def test_a_model_that_leaves_no_room_is_refused_with_advice(setup):
    memory = FakeMemory(fixed=15.9 * GIB)
    with pytest.raises(StageError, match=r"pretrain.micro_batch_tokens: a pass of 512") as error:
        with_pass_size(setup(), "control", None, memory)
    assert "pretrain.gradient_checkpointing: true" in str(error.value)
    assert memory.tried == [512]


@pytest.mark.usefixtures("large_steps")
def test_all_processes_take_the_smallest_number(setup, monkeypatch, capsys):
    monkeypatch.setattr(
        train.loop.pass_size, "gather_of_ranks", lambda own: torch.cat([own, torch.tensor([1536])])
    )
    found = with_pass_size(setup(), "pretrain", None, FakeMemory())
    assert found.pass_tokens == 1536
    assert "1536: the most that fits every GPU" in capsys.readouterr().err


def test_a_number_is_left_as_it_is_and_tries_nothing(setup, capsys):
    made = setup(micro_batch_tokens=128)
    memory = FakeMemory()
    assert with_pass_size(made, "pretrain", 7, memory) is made
    assert memory.tried == []
    assert capsys.readouterr().err == ""


def test_a_resumed_run_tries_nothing(setup, capsys):
    memory = FakeMemory()
    assert with_pass_size(setup(), "pretrain", 2560, memory).pass_tokens == 2560
    assert memory.tried == []
    assert "2560: as before the interruption" in capsys.readouterr().err


def test_on_a_cpu_the_number_is_fixed(setup, capsys):
    made = setup()
    assert made.pass_tokens == CPU_TOKENS
    assert with_pass_size(made, "pretrain", None).settings.micro_batch_tokens == CPU_TOKENS
    assert f"micro_batch_tokens is {CPU_TOKENS}: fixed on a CPU" in capsys.readouterr().err


# The passes that are tried


@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("tokens", [1, 30, 100, 512, 3072])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_pass_is_filled_with_the_runs_own_images(
    setup, monkeypatch, tokens, num_processes, one_row
):
    made = setup(batch_size=4)
    made.model.packs_one_row = one_row
    processes = SimpleNamespace(num_processes=num_processes, process_index=0)
    for module in (train.loop.pass_size, train.loop.step):
        monkeypatch.setattr(module, "PartialState", lambda: processes)
    data = pass_of(made, tokens)
    first = made.examples_of(made.plan()[0])
    assert data.image_ids[:2] == [example.image_id for example in first][: len(data.image_ids)][:2]
    longest = max(made.step_data([example]).num_positions for example in EXAMPLES)
    if tokens >= 512:
        # The process with the most has nearly a whole pass.
        assert 0.85 * tokens < max(batch.token_ids.numel() for batch in data.batches) <= tokens
    assert len(data.image_ids) <= num_processes or data.num_positions <= num_processes * tokens
    assert data.num_positions > num_processes * (tokens - longest)


@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("num_processes", [2, 4, 8])
def test_every_process_tries_a_pass_however_long_the_images_are(
    setup, monkeypatch, num_processes, one_row
):
    made = setup(batch_size=4)
    made.model.packs_one_row = one_row
    for rank in range(num_processes):
        processes = SimpleNamespace(num_processes=num_processes, process_index=rank)
        for module in (train.loop.pass_size, train.loop.step):
            monkeypatch.setattr(module, "PartialState", lambda processes=processes: processes)
        assert len(pass_of(made, 1).batches) >= 1


class FakeCuda:
    """What `torch.cuda` says of a GPU of 8 GiB, of which this process may have a part."""

    def __init__(self, monkeypatch, *, free=5 * GIB, share=1.0, peak=3 * GIB):
        self.emptied = 0
        answers = {
            "mem_get_info": (free, 8 * GIB),
            "memory_reserved": GIB,
            "memory_allocated": GIB // 2,
            "max_memory_allocated": peak,
            "get_per_process_memory_fraction": share,
            "reset_peak_memory_stats": None,
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
        monkeypatch.setattr(torch.cuda, "empty_cache", self.empty)

    def empty(self):
        self.emptied += 1


def test_available_is_what_no_other_process_has_and_no_more_than_allowed(setup, monkeypatch):
    FakeCuda(monkeypatch)
    assert GpuMemory(setup()).available() == 6 * GIB
    FakeCuda(monkeypatch, share=0.5)
    assert GpuMemory(setup()).available() == 4 * GIB


def test_a_pass_is_made_forward_and_backward_and_its_memory_counted(setup, monkeypatch):
    cuda = FakeCuda(monkeypatch)
    made = setup(row_tokens=10_000)
    memory = GpuMemory(made)
    shapes = []
    made.model.language_model.model.register_forward_pre_hook(
        lambda module, arguments, options: shapes.append(tuple(options["inputs_embeds"].shape)),
        with_kwargs=True,
    )
    weights = list(made.model.trainable_parameters().values())
    before = [weight.detach().clone() for weight in weights]
    peak = memory.peak(300)
    ((rows, length, _),) = shapes
    assert 250 < rows * length <= 300
    optimizer = OPTIMIZER_COPIES * sum(weight.nbytes for weight in weights)
    assert peak == pytest.approx(GIB / 2 + 2.5 * GIB * 300 / (rows * length) + optimizer)
    assert all(weight.grad.abs().sum() > 0 for weight in weights)
    memory.release()
    assert cuda.emptied == 1
    assert all(weight.grad is None for weight in weights)
    assert all(torch.equal(*pair) for pair in zip(weights, before, strict=True))
    assert not made.optimizer.state
