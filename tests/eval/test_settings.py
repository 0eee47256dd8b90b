import dataclasses
import re

import pytest

from cache.errors import SettingsError
from eval.settings import EvaluateSettings

NUMBERS = [field.name for field in dataclasses.fields(EvaluateSettings) if field.type is int]


def test_there_are_numbers_to_check():
    assert len(NUMBERS) == 7


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_is_at_least_one(limits, name):
    assert getattr(limits(**{name: 1}), name) == 1
    for value in (0, -1):
        with pytest.raises(ValueError, match=f"{name} is {value}, wanted 1 or more"):
            limits(**{name: value})


def test_a_caption_needs_no_question(limits):
    assert limits(caption_question="").caption_question == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"questions": 0}, "params.yaml: evaluate: questions is 0, wanted 1 or more"),
        ({"questions": 2.0}, "params.yaml: evaluate.questions is 2.0 (float), wanted int"),
        ({"questions": True}, "params.yaml: evaluate.questions is True (bool), wanted int"),
        ({"caption_question": None}, "evaluate.caption_question is None (NoneType), wanted str"),
        ({"stages": []}, "evaluate: stages is empty, wanted pretrain, finetune or both"),
        ({"stages": ["other"]}, "evaluate.stages[0] is 'other' (str), wanted one of pretrain, fin"),
        ({"minutes": 0}, "evaluate: minutes is 0.0, wanted more than 0, or null"),
        ({"minutes": -1.5}, "evaluate: minutes is -1.5, wanted more than 0, or null"),
        ({"beams": 4}, "params.yaml: evaluate: unknown key beams. Allowed: caption_images, "),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_file(world, changes, words):
    with pytest.raises(SettingsError, match=re.escape(words)):
        world.params(evaluate=changes).section("evaluate", EvaluateSettings)
