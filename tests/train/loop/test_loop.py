import dataclasses
import itertools
import math
import os
import signal

import pytest
import torch

import train.loop.loop
import train.loop.setup
from tests.train.stage_server import without_speeds
from train.data.examples import Example
from train.data.prompts import caption_turns, conversation_turns
from train.loop.checkpoint import Checkpoints
from train.loop.history import peak_memory_gib
from train.loop.loop import train as run_loop
from train.settings import CPU_TOKENS, CheckpointSettings
from workspace.errors import StageError

COLORS = ("red", "blue", "green")
EXAMPLES = [
    Example(i, tuple(caption_turns(f"a {COLORS[n % 3]} {a}") for a in ("cat", "dog")))
    for n, i in enumerate(range(100, 110))
]
QUESTIONS = [Example(i, (conversation_turns([("where", "in the box")]),)) for i in (111, 112, 113)]
SAVING = {"every_steps": 1000, "every_minutes": 60.0, "keep": 100}


class Run:
    """Keeps the history that a run directory would write."""

    stage = "test"
    is_main = True
    remote = None

    def __init__(self, folder):
        self.checkpoints = folder
        self.rows, self.continued = [], None

    def write_history(self, rows):
        self.rows = [dict(row) for row in rows]

    def continue_after(self, step, steps):
        self.continued = step, steps

    @property
    def saved(self):
        paths = sorted(self.checkpoints.glob("*.safetensors"))
        return [int(path.stem.removeprefix("step-")) for path in paths]


@pytest.fixture
def make_run(tmp_path):
    folders = itertools.count()
    return lambda: Run(tmp_path / f"checkpoints {next(folders)}")


@pytest.fixture
def loop(make_run, tracker):
    """Train a setup; return metrics and the run."""

    def loop(setup, run=None, **saving):
        run = run or make_run()
        return run_loop(setup, CheckpointSettings(**SAVING | saving), run, tracker), run

    return loop


@pytest.fixture
def run_once(make_setup, make_model, settings, loop):
    """Train a fresh model, return what came out."""

    def run_once(seed=0, lora=0.2, kind="mlp", validation=QUESTIONS, batch_size=8, **changes):
        model = make_model(kind, lora=lora, seed=seed)
        setup = make_setup(
            EXAMPLES,
            validation=validation,
            seed=seed,
            model=model,
            batch_size=batch_size,
            settings=settings(**changes),
        )
        metrics, run = loop(setup)
        return metrics, run.rows, {n: p.detach() for n, p in model.trainable_parameters().items()}

    return run_once


def without_speed(rows):
    return [without_speeds(row) for row in rows]


def poison_at(setup, step, value):
    """Spoil a weight after an optimizer step; return the steps that are made."""
    made = []

    def spoil(*_):
        made.append(1)
        if len(made) == step:
            setup.model.projector.layers[2].bias.data.fill_(value)

    setup.optimizer.register_step_post_hook(spoil)
    return made


def test_a_small_run_learns(make_setup, make_model, settings, loop):
    chosen = settings(epochs=40, validate_every_steps=1000)
    model = make_model(lora=0.0)
    metrics, run = loop(make_setup(EXAMPLES[:3], learning_rate=3e-2, model=model, settings=chosen))
    losses = [row["loss"] for row in run.rows]
    assert losses[-1] < 0.5 * losses[0]
    assert metrics["loss"] == losses[-1]
    assert metrics["steps"] == len(losses) == 40


@pytest.mark.parametrize("kind", ["mlp", "resblock"])
def test_two_runs_of_one_seed_are_bitwise_equal_and_of_two_are_not(run_once, kind):
    torch.manual_seed(1)
    metrics, rows, weights = run_once(kind=kind)
    torch.manual_seed(2)
    again_metrics, again_rows, again = run_once(kind=kind)
    assert without_speed(rows) == without_speed(again_rows)
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert metrics["validation_loss"] == again_metrics["validation_loss"]
    _, other_rows, other = run_once(kind=kind, seed=1)
    assert without_speed(rows) != without_speed(other_rows)
    assert not any(torch.equal(weights[n], other[n]) for n in weights if "weight" in n)


def test_auto_on_a_cpu_is_the_run_of_its_number(run_once):
    metrics, rows, weights = run_once(micro_batch_tokens="auto")
    other_metrics, other_rows, other = run_once(micro_batch_tokens=CPU_TOKENS)
    assert metrics["micro_batch_tokens"] == other_metrics["micro_batch_tokens"] == CPU_TOKENS
    assert without_speed(rows) == without_speed(other_rows)
    assert all(torch.equal(weights[name], other[name]) for name in weights)


def test_a_resumed_run_goes_on_with_the_passes_it_began_with(
    make_setup, settings, loop, make_run, monkeypatch, capsys
):
    """Whatever fits by now."""
    made = make_setup(EXAMPLES, settings=settings(micro_batch_tokens="auto"))
    monkeypatch.setattr(train.loop.setup, "CPU_TOKENS", 96)
    run = make_run()
    poison_at(made, 2, math.nan)
    with pytest.raises(StageError, match="step 2"):
        loop(made, run, every_steps=1)
    monkeypatch.setattr(train.loop.setup, "CPU_TOKENS", 512)
    again = make_setup(EXAMPLES, settings=settings(micro_batch_tokens="auto"))
    metrics, _ = loop(again, run, every_steps=1)
    assert run.continued[0] == 1
    assert metrics["micro_batch_tokens"] == 96
    said = capsys.readouterr().err
    assert "test: micro_batch_tokens is 96: as before the interruption" in said


def test_a_full_memory_is_an_error_that_says_what_to_do(make_setup, loop, monkeypatch):
    def full(*arguments, **named):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")

    monkeypatch.setattr(train.loop.loop, "optimizer_step", full)
    with pytest.raises(StageError) as error:
        loop(make_setup(EXAMPLES))
    said = str(error.value)
    assert said.startswith("step 1: the GPU's memory is full: CUDA out of memory. Tried to")
    assert "\n" not in said
    assert "Set pretrain.gradient_checkpointing: true to go on from it" in said
    assert "start again with pretrain.micro_batch_tokens below 128." in said


def test_a_full_memory_in_validation_loses_no_step(
    make_setup, settings, make_run, loop, monkeypatch
):
    def full(*arguments, **named):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    made, run = make_setup(EXAMPLES, settings=settings(validate_every_steps=2)), make_run()
    monkeypatch.setattr(train.loop.loop, "validation_loss", full)
    with pytest.raises(torch.OutOfMemoryError):
        loop(made, run)
    monkeypatch.undo()
    loop(make_setup(EXAMPLES, settings=settings(validate_every_steps=2)), run)
    assert run.continued[0] == 2


def test_an_error_after_a_signal_is_an_interrupt(make_setup, loop, monkeypatch):
    """A compiler's process gets the signal too, and its failure is the step's."""

    def broken(*arguments, **named):
        os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("the compiler was interrupted")

    monkeypatch.setattr(train.loop.loop, "optimizer_step", broken)
    with pytest.raises(KeyboardInterrupt):
        loop(make_setup(EXAMPLES))


def test_generating_and_validating_do_not_change_what_is_learned(run_once):
    _, _, weights = run_once(validate_every_steps=1, samples=3)
    _, _, again = run_once(validate_every_steps=1000, samples=0, validation=())
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_the_cut_into_forward_passes_does_not_change_a_run(run_once):
    _, rows, weights = run_once(lora=0.0, micro_batch_tokens=1, row_tokens=1)
    for row_tokens, pass_tokens in ((30, 50), (60, 10_000)):
        _, other_rows, other = run_once(
            lora=0.0, micro_batch_tokens=pass_tokens, row_tokens=row_tokens
        )
        for row, other_row in zip(rows, other_rows, strict=True):
            assert row["loss"] == pytest.approx(other_row["loss"], rel=1e-3)
        for name in weights:
            difference = (weights[name] - other[name]).norm() / weights[name].norm()
            assert difference < 1e-2, name


def test_the_learning_rate_warms_up_and_falls_to_zero(run_once):
    _, rows, _ = run_once(epochs=4, warmup_share=0.25)
    rates = [row["learning_rate"] for row in rows]
    top = rates.index(max(rates))
    assert max(rates) == pytest.approx(1e-2)
    assert top == math.ceil(0.25 * len(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_rows_are_logged_and_validated_as_often_as_asked(run_once, tracker):
    _, rows, _ = run_once(epochs=3, log_every_steps=2, validate_every_steps=3)
    assert [row["step"] for row in rows] == [2, 3, 4, 6, 8, 9]
    assert [row["step"] for row in rows if "validation_loss" in row] == [3, 6, 9]
    assert [step for step, _ in tracker.samples] == [3, 6, 9]
    assert tracker.rows == [(row["step"], row) for row in rows]


def test_the_loss_of_a_row_is_the_mean_over_all_tokens_since_the_row_before(run_once):
    _, fine, _ = run_once(log_every_steps=1)
    _, coarse, _ = run_once(log_every_steps=1000, validate_every_steps=1000)
    assert len(fine) == 3
    assert len(coarse) == 1
    losses = [row["loss"] for row in fine]
    assert min(losses) < coarse[0]["loss"] < max(losses)


def test_a_run_without_validation_has_metrics_that_json_can_hold(run_once):
    metrics, rows, _ = run_once(validation=())
    assert "validation_loss" not in metrics
    assert all(math.isfinite(value) for value in metrics.values())
    assert not any("validation_loss" in row for row in rows)


def test_metrics_count_images_and_texts(run_once):
    metrics, rows, _ = run_once()
    assert (metrics["images"], metrics["texts"], metrics["steps"]) == (10, 20, 3)
    assert metrics["loss"] == rows[-1]["loss"]
    assert metrics["validation_loss"] == rows[-1]["validation_loss"]
    assert 0 <= metrics["data_wait_share"] <= 1
    assert 0 < metrics["peak_memory_gib"] <= peak_memory_gib() + 1e-3
    assert metrics["tokens_per_second"] > 0


def test_without_texts_it_says_where_to_look(make_setup, loop):
    with pytest.raises(
        StageError, match=r"test: no text to learn from: .*data.train.captions.*reports/index"
    ):
        loop(make_setup([]))


# What is not finite


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_images_and_checkpoint(
    make_setup, settings, make_run, loop, value
):
    setup = make_setup(EXAMPLES[:2], batch_size=2, settings=settings(epochs=3))
    made, run = poison_at(setup, 2, value), make_run()
    with pytest.raises(
        StageError,
        match=r"^step 3: the loss is (nan|inf).*Images of the step \(1\): 10[01]\. "
        r"Last checkpoint: none yet\. Lower the learning rate, or check the features with "
        rf"`python -m cache.verify {setup.store.root}`\.$",
    ):
        loop(setup, run)
    assert len(made) == 2, "no step is made on it"
    assert run.saved == []


def test_a_model_whose_first_logits_are_not_finite_is_refused_before_a_step(make_setup, loop):
    setup = make_setup(EXAMPLES)
    setup.model.projector.layers[2].bias.data.fill_(math.nan)
    with pytest.raises(StageError, match=r"^before the first step: logits of the first forward"):
        loop(setup)


def test_of_many_images_the_first_are_named(make_setup, settings, loop):
    setup = make_setup(EXAMPLES, batch_size=20, settings=settings(epochs=2))
    poison_at(setup, 1, math.nan)
    with pytest.raises(StageError, match=r"Images of the step \(10\): (\d+, ){5}\.\.\.\. Last"):
        loop(setup)


def test_the_last_checkpoint_before_a_loss_that_is_not_finite_is_named_and_is_fine(
    make_setup, settings, make_run, loop
):
    def setup():
        return make_setup(EXAMPLES, settings=settings(epochs=2))

    failing, run = setup(), make_run()
    poison_at(failing, 3, math.nan)
    path = run.checkpoints / "step-00000002.safetensors"
    with pytest.raises(StageError, match=rf"^step 4: .*Last checkpoint: {path}\. Lower"):
        loop(failing, run, every_steps=2)
    assert run.saved == [2]
    metrics, _ = loop(setup(), run, every_steps=2)
    assert run.continued == (2, 6)
    unbroken, whole = loop(setup())
    assert without_speed([metrics]) == without_speed([unbroken])
    assert without_speed(run.rows) == without_speed(whole.rows)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_never_saved(make_setup, settings, make_run, loop, value):
    setup, run = make_setup(EXAMPLES, settings=settings(epochs=2)), make_run()
    poison_at(setup, 4, value)
    path = run.checkpoints / "step-00000002.safetensors"
    with pytest.raises(
        StageError,
        match=rf"^step 4: the weights are not finite any more\. Last checkpoint: {path}\. Lower",
    ):
        loop(setup, run, every_steps=2)
    assert run.saved == [2]


def test_weights_that_are_not_finite_after_the_last_step_stop_the_run(make_setup, make_run, loop):
    """No loss would tell, where nothing is validated on."""
    setup, run = make_setup(EXAMPLES), make_run()
    poison_at(setup, 3, math.nan)
    with pytest.raises(StageError, match=r"^step 3: the weights are not finite"):
        loop(setup, run)
    assert run.saved == []


def test_a_validation_loss_that_is_not_finite_stops_the_run(make_setup, loop, monkeypatch):
    monkeypatch.setattr(train.loop.loop, "validation_loss", lambda setup: math.inf)
    setup = make_setup(EXAMPLES, validation=QUESTIONS)
    with pytest.raises(
        StageError,
        match=r"^step 3: the validation loss is inf\. Last checkpoint: .*/step-00000003",
    ):
        loop(setup)


# Checkpoints


@pytest.mark.parametrize(
    ("saving", "wanted"),
    [
        ({"every_steps": 1000}, [6]),
        ({"every_steps": 2}, [2, 4, 6]),
        ({"every_steps": 4}, [4, 6]),
        ({"every_minutes": 1e-9}, [1, 2, 3, 4, 5, 6]),
        ({"every_steps": 1, "keep": 2}, [5, 6]),
    ],
)
def test_checkpoints_come_as_often_as_asked_and_always_at_the_end(
    make_setup, settings, loop, saving, wanted
):
    _, run = loop(make_setup(EXAMPLES, settings=settings(epochs=2)), **saving)
    assert run.saved == wanted
    assert run.continued is None


def test_checkpoints_do_not_change_what_is_learned(make_setup, settings, loop):
    def weights(**saving):
        setup = make_setup(EXAMPLES, settings=settings(epochs=2))
        loop(setup, **saving)
        return [p.detach() for p in setup.model.trainable_parameters().values()]

    assert all(map(torch.equal, weights(), weights(every_steps=1)))


def test_from_the_last_checkpoint_only_the_end_is_made_again(make_setup, make_run, loop):
    run = make_run()
    first, _ = loop(make_setup(EXAMPLES), run)
    rows = run.rows
    setup = make_setup(EXAMPLES)
    made = poison_at(setup, -1, 0.0)
    again, _ = loop(setup, run)
    assert made == []
    assert run.continued == (3, 3)
    assert without_speed([again]) == without_speed([first])
    assert without_speed(run.rows) == without_speed(rows)


@pytest.mark.parametrize(
    "change",
    [
        lambda found: {"step": 4},
        lambda found: {"step": "3"},
        lambda found: {"progress": {}},
        lambda found: {"progress": found.progress | {"closed": {"other": 1}}},
        lambda found: {"progress": found.progress | {"micro_batch_tokens": "many"}},
        lambda found: {"progress": found.progress | {"micro_batch_tokens": 0}},
        lambda found: {"progress": found.progress | {"micro_batch_tokens": True}},
        lambda found: {"progress": found.progress | {"micro_batch_tokens": 10**20}},
        lambda found: {"tensors": {}},
    ],
)
def test_a_whole_checkpoint_that_is_not_of_the_run_is_refused_by_name(
    make_setup, make_run, loop, monkeypatch, change
):
    run = make_run()
    loop(make_setup(EXAMPLES), run)
    found = Checkpoints(run.checkpoints, 2).latest()
    other = dataclasses.replace(found, **change(found))
    monkeypatch.setattr(Checkpoints, "latest", lambda self: other)
    with pytest.raises(
        StageError, match=r"step-00000003\.safetensors: is intact but belongs to another run"
    ) as caught:
        loop(make_setup(EXAMPLES), run)
    assert "\n" not in str(caught.value)
