import dataclasses
import math

import numpy as np
import pytest
import torch

from bench import step, student_loop, usual_loop
from bench.step import BY_LENGTH, CONTENDERS, FINETUNE, OURS, PRETRAIN, STUDENT, USUAL, WITH_CLIP
from bench.stores import SPEC
from bench.usual_loop import by_length, make_samples, shuffled
from tests.bench.models import TINY_LLAMA, TINY_PHI

pytestmark = pytest.mark.slow("trains with every loop of the benchmark")

IMAGES = 3


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    spec = dataclasses.replace(SPEC, patches=4, width=8)
    return step.make_features(tmp_path_factory.mktemp("features"), IMAGES, spec)


@pytest.fixture(
    scope="module",
    params=[(PRETRAIN, TINY_PHI), (FINETUNE, TINY_PHI), (PRETRAIN, TINY_LLAMA)],
    ids=lambda param: f"{param[0]}-{param[1].model_type}",
)
def stage(request, folder):
    made = step.make_stage(request.param[0], folder, request.param[1])
    for parameter in made.model.language_model.parameters():
        # Large enough that every position matters to every later logit.
        torch.nn.init.normal_(parameter, std=0.1)
    return made


def by_hand(stage):
    """Loss of every supervised token of plain sequences, one a text."""
    losses = []
    for sample in make_samples(stage.examples, stage.tokenizer):
        patches = stage.model.embed_patches(torch.from_numpy(stage.store.gather([sample.image_id])))
        ids = torch.tensor([sample.text.token_ids])
        embeds = torch.cat([patches, stage.model.embed_text(ids)], dim=1)
        logits = stage.model.language_model(inputs_embeds=embeds, use_cache=False).logits[0]
        all_losses = torch.nn.functional.cross_entropy(logits[3:-1], ids[0], reduction="none")
        losses.append(all_losses[torch.tensor(sample.text.is_target)].tolist())
    return losses


def test_all_contenders_but_the_student_have_the_mean_loss_of_plain_sequences(stage):
    stage.model.language_model.set_attn_implementation("sdpa")
    wanted = np.concatenate(by_hand(stage))
    for name in (OURS, USUAL, BY_LENGTH):
        contender = step.make_contender(name, stage)
        assert contender.tokens == len(wanted)
        assert contender.step() == pytest.approx(wanted.mean(), rel=1e-6), name


def test_the_gradients_of_what_is_compared_are_those_of_one_another(stage):
    contenders = {name: step.make_contender(name, stage) for name in (OURS, USUAL, BY_LENGTH)}
    for name in (USUAL, BY_LENGTH):
        assert 0 < step.difference(stage, contenders[OURS], contenders[name]) < 1e-5
    learning = sum(p.numel() for p in stage.model.parameters() if p.requires_grad)
    found = step.gradient(stage, contenders[OURS])
    assert len(found) == learning
    assert (learning > sum(p.numel() for p in stage.model.projector.parameters())) == (
        stage.name == FINETUNE
    )


def test_a_step_leaves_the_weights_as_they_are(stage):
    before = [p.clone() for p in stage.model.parameters()]
    for name in (OURS, USUAL):
        step.make_contender(name, stage).step()
    assert all(map(torch.equal, before, stage.model.parameters()))


def test_both_orders_hold_every_sample_once(stage):
    samples = make_samples(stage.examples, stage.tokenizer)
    assert len(samples) == sum(len(example.texts) for example in stage.examples)
    for order in (shuffled, by_length):
        ordered = order(samples)
        assert sorted(map(id, ordered)) == sorted(map(id, samples))
    lengths = [len(sample.text.token_ids) for sample in by_length(samples)]
    assert lengths == sorted(lengths)


def test_the_student_learns_every_token_of_a_caption_but_not_its_end(folder):
    stage = step.make_stage(PRETRAIN, folder, TINY_PHI)
    samples = make_samples(stage.examples, stage.tokenizer)
    stage.model.language_model.set_attn_implementation("sdpa")
    wanted = np.concatenate([losses[:-1] for losses in by_hand(stage)])

    def features(image_ids):
        return torch.from_numpy(stage.store.gather(np.array(image_ids))).float()

    language_model = stage.model.language_model
    found = student_loop.optimizer_step(
        stage.model.projector, language_model, samples, features, stage.optimizer
    )
    assert found == pytest.approx(wanted.mean(), rel=1e-6)


def test_clip_in_the_loop_gives_patches_of_the_shape_of_the_features(monkeypatch):
    monkeypatch.setattr(step, "PICTURES", 2)
    patches = step.clip_in_the_loop()([5, 0, 1])
    assert patches.shape == (3, SPEC.patches, SPEC.width)
    assert patches.dtype == torch.float32
    assert not patches.requires_grad
    # The image 5 is the second picture, like the image 1.
    torch.testing.assert_close(patches[0], patches[2])
    assert not torch.allclose(patches[0], patches[1])


def test_every_goal_is_about_a_contender_of_its_stage():
    stages = {
        name: {
            "median": {c: 12.0 if c == OURS else 1.0 for c in contenders},
            "gradient_difference": 2e-6,
            "wait_share": 0.03,
        }
        for name, contenders in CONTENDERS.items()
    }
    goals = step.goals_of(stages)
    assert goals[f"{PRETRAIN}: {OURS} / {USUAL}"] == {"wanted": ">= 4.0", "found": 12, "met": True}
    assert not goals[f"{PRETRAIN}: {OURS} / {STUDENT}"]["met"]
    assert goals[f"{PRETRAIN}: {OURS} / {WITH_CLIP}"]["met"]
    assert goals[f"{FINETUNE}: {OURS} / {USUAL}"]["met"]
    for name in CONTENDERS:
        assert goals[f"{name}: difference of the gradients, millionths"]["found"] == 2.0
        assert goals[f"{name}: waiting for data, % of the time"]["met"] is False


def test_several_steps_report_their_share_of_waiting(stage):
    loss, share = step.our_steps(stage, 3)
    assert math.isfinite(loss)
    assert 0 < share < 1


def test_labels_are_the_learned_tokens_and_nothing_else(stage):
    samples = make_samples(stage.examples, stage.tokenizer)
    texts = [sample.text for sample in samples]
    patches = torch.zeros(len(texts), 4, TINY_PHI.hidden_size)
    made = usual_loop.inputs(patches, stage.model.language_model, texts)
    for row, text in enumerate(texts):
        labels = made["labels"][row]
        learned = [
            t for t, is_learned in zip(text.token_ids, text.is_target, strict=True) if is_learned
        ]
        assert labels[labels != usual_loop.IGNORE_INDEX].tolist() == learned
        assert made["attention_mask"][row].sum() == 4 + len(text.token_ids)
