import itertools
import math

import pytest
import torch
from torch import nn

from cache.errors import StageError
from train.data import Example
from train.history import peak_memory_gib
from train.loop import Task, optimizer_step, samples, train, validation_loss
from train.prompts import caption_text, conversation_text
from train.step import build_step, mean_loss

COLORS = ("red", "blue", "green")
EXAMPLES = [
    Example(i, tuple(caption_text(f"a {COLORS[n % 3]} {a}") for a in ("cat", "dog")))
    for n, i in enumerate(range(100, 110))
]
QUESTIONS = [Example(i, (conversation_text([("where", "in the box")]),)) for i in (111, 112, 113)]
SPEEDS = ("tokens_per_second", "images_per_second", "data_wait_share", "peak_memory_gib")


class Run:
    """Keeps the history that a run directory would write."""

    stage = "test"

    def write_history(self, rows):
        self.rows = [dict(row) for row in rows]


@pytest.fixture
def run_once(make_task, make_model, settings, tracker):
    """Train a fresh model, return what came out."""

    def run_once(seed=0, lora=0.2, kind="mlp", validation=QUESTIONS, **changes):
        model = make_model(kind, lora=lora, seed=seed)
        task = make_task(EXAMPLES, validation=validation, seed=seed, model=model)
        run = Run()
        metrics = train(task, settings(**changes), run, tracker)
        weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        return metrics, run.rows, weights

    return run_once


def without_speed(rows):
    return [{name: value for name, value in row.items() if name not in SPEEDS} for row in rows]


def test_a_small_run_learns(make_task, make_model, settings, tracker):
    task, run = make_task(EXAMPLES[:3], learning_rate=3e-2, model=make_model(lora=0.0)), Run()
    metrics = train(task, settings(epochs=40, validate_every_steps=1000), run, tracker)
    losses = [row["loss"] for row in run.rows]
    assert losses[-1] < 0.5 * losses[0]
    assert metrics["loss"] == losses[-1]
    assert metrics["steps"] == len(losses) == 30


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


def test_generating_and_validating_do_not_change_what_is_learned(run_once):
    _, _, weights = run_once(validate_every_steps=1, samples=3)
    _, _, again = run_once(validate_every_steps=1000, samples=0, validation=())
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_the_cut_into_forward_passes_does_not_change_a_run(run_once):
    _, rows, weights = run_once(lora=0.0, micro_batch_tokens=1)
    for max_tokens in (50, 10_000):
        _, other_rows, other = run_once(lora=0.0, micro_batch_tokens=max_tokens)
        for row, other_row in zip(rows, other_rows, strict=True):
            assert row["loss"] == pytest.approx(other_row["loss"], rel=1e-3)
        for name in weights:
            difference = (weights[name] - other[name]).norm() / weights[name].norm()
            assert difference < 1e-2, name


def step_data(task, settings, examples, **changes):
    chosen = settings(**changes)
    return build_step(
        examples,
        task.tokenizer,
        task.store,
        max_tokens=chosen.micro_batch_tokens,
        max_text_tokens=chosen.max_text_tokens,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
def test_the_gradient_is_that_of_the_token_mean_over_the_whole_step(
    make_task, settings, max_tokens
):
    """Texts of different length: a mean of means would be another number."""
    examples = [EXAMPLES[0], Example(105, (caption_text("the dog is on the red box"),))]
    task = make_task(examples)
    whole = step_data(task, settings, examples, micro_batch_tokens=10_000)
    patches, batch = whole.parts[0]
    logits = task.model.logits(patches, batch)
    nn.functional.cross_entropy(logits, batch.targets, reduction="mean").backward()
    wanted = [p.grad.clone() for p in task.model.projector.parameters()]
    data = step_data(task, settings, examples, micro_batch_tokens=max_tokens)
    loss_sum = optimizer_step(task, data, 1e9, 1)
    task_mean = nn.functional.cross_entropy(logits, batch.targets).item()
    assert loss_sum / data.num_learned == pytest.approx(task_mean, rel=1e-5)
    for parameter, gradient in zip(task.model.projector.parameters(), wanted, strict=True):
        assert (parameter.grad - gradient).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize("clip_norm", [1e-4, 0.1, 1e9])
def test_gradients_are_clipped_over_all_groups_together(
    make_model, tokenizer, store, settings, clip_norm
):
    def stepped(clip):
        model = make_model(lora=0.0)
        groups = [
            {"params": list(model.projector.parameters()), "lr": 1.0},
            {"params": [p for p in model.language_model.parameters() if p.requires_grad]},
        ]
        task = Task(
            model=model, tokenizer=tokenizer, store=store, train=EXAMPLES, validation=[],
            batch_size=8, optimizer=torch.optim.SGD(groups, lr=1.0), seed=0,
        )  # fmt: skip
        parameters = [p for group in groups for p in group["params"]]
        before = torch.cat([p.detach().flatten().clone() for p in parameters])
        optimizer_step(task, step_data(task, settings, EXAMPLES[:2]), clip, 1)
        return before - torch.cat([p.detach().flatten() for p in parameters])

    free, clipped = stepped(1e12), stepped(clip_norm)
    wanted = free * min(1, clip_norm / free.norm().item())
    assert (clipped - wanted).norm() < 1e-3 * wanted.norm() + 1e-5
    assert (clip_norm < free.norm()) == (clip_norm < 1e9), "the sweep clips and does not clip"


def test_gradients_do_not_pile_up_over_steps(make_task, settings):
    task = make_task(EXAMPLES, learning_rate=0.0)
    data = step_data(task, settings, EXAMPLES[:2])
    optimizer_step(task, data, 1e9, 1)
    first = [p.grad.clone() for p in task.model.projector.parameters()]
    optimizer_step(task, data, 1e9, 2)
    second = [p.grad for p in task.model.projector.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_images(
    make_task, settings, tracker, value
):
    task = make_task(EXAMPLES[:2], batch_size=2)
    weights = task.model.projector.layers[2].bias
    poison = settings(epochs=3)
    calls = []

    def break_it(*_):
        calls.append(1)
        if len(calls) == 2:
            weights.data.fill_(value)

    task.optimizer.register_step_post_hook(break_it)
    with pytest.raises(
        StageError, match=r"step 3: the loss is (nan|inf).*Images of the step \(1\): 10[01]\. "
    ):
        train(task, poison, Run(), tracker)
    assert len(calls) == 2, "no step is made on it"


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_are_lost(
    make_task, settings
):
    task = make_task(EXAMPLES)
    data = step_data(task, settings, EXAMPLES[:2])
    first = task.model.projector.layers[0].weight
    first.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(StageError, match=r"step 7: .*gradient.*\(2\): 100, 101\. "):
        optimizer_step(task, data, 1.0, 7)
    assert all(p.isfinite().all() for p in task.model.projector.parameters())


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
    last = rows[-1]["step"]
    assert last == 8
    assert [row["step"] for row in rows] == [2, 3, 4, 6, 8]
    assert [row["step"] for row in rows if "validation_loss" in row] == [3, 6, 8]
    assert [step for step, _ in tracker.samples] == [3, 6, 8]
    assert tracker.rows == [(row["step"], row) for row in rows]


def test_the_loss_of_a_row_is_the_mean_over_all_tokens_since_the_row_before(run_once):
    _, fine, _ = run_once(log_every_steps=1)
    _, coarse, _ = run_once(log_every_steps=1000, validate_every_steps=1000)
    assert len(fine) == 3
    assert len(coarse) == 1
    losses = [row["loss"] for row in fine]
    assert min(losses) < coarse[0]["loss"] < max(losses)


def test_validation_is_the_mean_loss_of_the_first_images(make_task, settings):
    task = make_task(EXAMPLES, validation=QUESTIONS)
    found = validation_loss(task, settings(validation_images=2))
    assert found == mean_loss(task.model, step_data(task, settings, QUESTIONS[:2]))
    assert validation_loss(task, settings(validation_images=0)) is None


def test_samples_ask_the_first_question_and_show_the_right_answer(make_task, settings):
    task = make_task(EXAMPLES, validation=[*QUESTIONS[:1], EXAMPLES[0], *QUESTIONS[1:]])
    made = samples(task, settings(samples=2))
    prompt = "Instruct: where\nOutput:"
    assert [(i, wanted) for i, wanted, _ in made] == [
        (111, f"{prompt} in the box"),
        (100, "a red cat"),
    ]
    assert made[0][2].startswith(prompt)
    assert samples(task, settings(samples=0)) == []


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


def test_the_windowed_order_trains_on_every_example_and_stays_in_its_window(
    make_task, settings, tracker, monkeypatch
):
    task = make_task(EXAMPLES, batch_size=1)
    shards = dict(
        zip(task.store.image_ids, task.store.shards_of(task.store.image_ids), strict=True)
    )
    assert len(set(shards.values())) > 1
    seen, asked = [], []
    real = optimizer_step
    monkeypatch.setattr(
        "train.loop.optimizer_step",
        lambda task, data, *rest: seen.extend(data.image_ids) or real(task, data, *rest),
    )
    monkeypatch.setattr(type(task.store), "read_ahead", lambda store, shards: asked.extend(shards))
    train(task, settings(epochs=1, order="windowed", window_shards=1), Run(), tracker)
    assert sorted(seen) == [example.image_id for example in EXAMPLES]
    visited = [shards[image_id] for image_id in seen]
    changes = sum(a != b for a, b in itertools.pairwise(visited))
    assert changes == len(set(visited)) - 1
    assert asked == list(dict.fromkeys(visited))
