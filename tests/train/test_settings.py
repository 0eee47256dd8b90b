import pytest

from cache.errors import SettingsError
from train.settings import (
    CheckpointSettings,
    FinetuneSettings,
    LlmSettings,
    PretrainSettings,
    ProjectorSettings,
)

POSITIVE = (
    "epochs",
    "learning_rate",
    "clip_norm",
    "texts_per_image",
    "micro_batch_tokens",
    "row_tokens",
    "max_text_tokens",
    "window_shards",
    "log_every_steps",
    "validate_every_steps",
)
NOT_NEGATIVE = ("weight_decay", "validation_images", "samples", "warmup_share")

STAGES = {"pretrain": PretrainSettings, "finetune": FinetuneSettings}

BAD = [
    *((name, value) for name in POSITIVE for value in (0, -1)),
    *((name, -1) for name in NOT_NEGATIVE),
    ("warmup_share", 1.0),
    ("epochs", float("nan")),
    ("epochs", float("inf")),
    ("learning_rate", float("nan")),
    ("weight_decay", float("nan")),
]


@pytest.mark.parametrize(("section", "cls"), STAGES.items())
def test_the_size_of_a_pass_may_be_found_automatically(workspace, section, cls):
    params = workspace.params(**{section: {"micro_batch_tokens": "auto"}})
    assert params.section(section, cls).micro_batch_tokens == "auto"
    params = workspace.params(**{section: {"micro_batch_tokens": "most"}})
    with pytest.raises(SettingsError, match=r"micro_batch_tokens is 'most'.*wanted int or auto"):
        params.section(section, cls)


@pytest.mark.parametrize(("name", "value"), [*BAD, ("batch_captions", 0)])
def test_a_bad_value_in_pretrain_is_named_with_file_and_section(workspace, name, value):
    params = workspace.params(pretrain={name: value})
    with pytest.raises(SettingsError, match=rf"params.yaml: pretrain.*{name} is") as error:
        params.section("pretrain", PretrainSettings)
    assert error.value.exit_code == 2


FINETUNE_BAD = [*BAD, ("batch_examples", 0), ("projector_learning_rate", -1.0)]


@pytest.mark.parametrize(("name", "value"), FINETUNE_BAD)
def test_a_bad_value_in_finetune_is_named_with_file_and_section(workspace, name, value):
    params = workspace.params(finetune={name: value})
    with pytest.raises(SettingsError, match=rf"params.yaml: finetune.*{name} is"):
        params.section("finetune", FinetuneSettings)


@pytest.mark.parametrize(
    ("name", "value"), [("r", 0), ("alpha", 0), ("dropout", 1.0), ("dropout", -0.1)]
)
def test_a_bad_value_of_lora_is_named(workspace, name, value):
    lora = {"r": 4, "alpha": 8, "dropout": 0.05} | {name: value}
    params = workspace.params(finetune={"lora": lora})
    with pytest.raises(SettingsError, match=rf"finetune.lora: {name} is"):
        params.section("finetune", FinetuneSettings)


@pytest.mark.parametrize("name", ["every_steps", "every_minutes", "keep"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_bad_value_of_checkpoints_is_named(workspace, name, value):
    params = workspace.params(checkpoints={name: value})
    with pytest.raises(SettingsError, match=rf"params.yaml: checkpoints: {name} is"):
        params.section("checkpoints", CheckpointSettings)


def test_minutes_between_checkpoints_may_be_a_fraction_but_must_be_a_number(workspace):
    params = workspace.params(checkpoints={"every_minutes": 0.5})
    assert params.section("checkpoints", CheckpointSettings).every_minutes == 0.5
    for value in (float("nan"), float("inf")):
        params = workspace.params(checkpoints={"every_minutes": value})
        with pytest.raises(SettingsError, match=r"checkpoints.every_minutes is"):
            params.section("checkpoints", CheckpointSettings)


@pytest.mark.parametrize(
    ("section", "cls", "name", "value"),
    [
        ("pretrain", PretrainSettings, "order", "random"),
        ("llm", LlmSettings, "quantize", "int8"),
        ("llm", LlmSettings, "dtype", "fp8"),
        ("projector", ProjectorSettings, "kind", "conv"),
    ],
)
def test_a_word_that_is_not_allowed_is_answered_with_those_that_are(
    workspace, section, cls, name, value
):
    params = workspace.params(**{section: {name: value}})
    with pytest.raises(SettingsError, match=rf"{section}.{name} is '{value}'.*wanted one of"):
        params.section(section, cls)


def test_what_the_workspace_writes_is_allowed(workspace):
    params = workspace.params()
    assert params.section("pretrain", PretrainSettings).batch_captions == 8
    assert params.section("finetune", FinetuneSettings).lora.alpha == 8
    assert params.section("checkpoints", CheckpointSettings).keep == 2


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("https://host/runs", "that can be written"),
        ("http://host/runs", "that can be written"),
        ("/mnt/shared", "that can be written"),
        ("", "that can be written"),
        ("nothing-like-it://runs", "cannot be read here"),
    ],
)
def test_checkpoints_go_to_a_url_that_can_be_written_to(workspace, url, why):
    with pytest.raises(SettingsError, match=rf"checkpoints.*{why}"):
        workspace.params(checkpoints={"to": url}).section("checkpoints", CheckpointSettings)


@pytest.mark.parametrize("to", [{}, {"to": None}, {"to": "file:///mnt/shared"}])
def test_without_a_url_checkpoints_stay_here(workspace, to):
    settings = workspace.params(checkpoints=to).section("checkpoints", CheckpointSettings)
    assert settings.to == to.get("to")
