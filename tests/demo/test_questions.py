import random
import re
from collections import Counter

import pytest

from demo.captions import STYLES
from demo.questions import ASKERS, CAPTION_REQUEST, ask
from demo.scenes import COLOURS, NOUNS, scene_at
from demo.words import COLUMNS, NUMBERS, ROWS, plural

SCENES = [scene_at(1, "test", index) for index in range(300)]
SINGULAR = {noun: noun for noun in NOUNS} | {plural(noun): noun for noun in NOUNS}


def turns():
    return [
        (scene, question, answer)
        for index, scene in enumerate(SCENES)
        for question, answer in ask(scene, random.Random(index), 6)
    ]


def kind_of(scene, noun):
    found = [kind for kind in scene.kinds if kind.noun == SINGULAR[noun]]
    return found[0] if found else None


def answer_from_scene(scene, question):
    """Answer by reading the question anew, without the code that asked it."""
    if match := re.fullmatch(r"What color (?:is|are) the (\w+)\?", question):
        return kind_of(scene, match[1]).colour
    if match := re.fullmatch(r"How many (\w+) (?:are there|can you see)\?", question):
        return NUMBERS[kind_of(scene, match[1]).count]
    if question == "How many things are there in total?":
        return NUMBERS[sum(len(kind.places) for kind in scene.kinds)]
    if match := re.fullmatch(r"Is there an? (\w+) in the picture\?", question):
        return "yes" if kind_of(scene, match[1]) else "no"
    if match := re.fullmatch(r"Is there an? (\w+) (\w+)\?", question):
        kind = kind_of(scene, match[2])
        return "yes" if kind and kind.colour == match[1] else "no"
    if match := re.fullmatch(
        r"Is the (\w+) on the left, in the middle or on the right\?", question
    ):
        (place,) = kind_of(scene, match[1]).places
        return COLUMNS[place.column]
    if match := re.fullmatch(
        r"Is the (\w+) at the top, in the middle or at the bottom\?", question
    ):
        (place,) = kind_of(scene, match[1]).places
        return ROWS[place.row]
    if match := re.fullmatch(r"(?:Is|Are) the (\w+) small or large\?", question):
        return kind_of(scene, match[1]).size
    if question in ("What is in the background?", "What is behind the things?"):
        return scene.background
    if match := re.fullmatch(r"What (is|are) the (\w+) things?\?", question):
        (kind,) = [kind for kind in scene.kinds if kind.colour == match[2]]
        return f"a {kind.noun}" if match[1] == "is" else plural(kind.noun)
    raise AssertionError(f"a question of no known form: {question}")


def test_every_answer_follows_from_its_scene():
    checked = 0
    for scene, question, answer in turns():
        if question != CAPTION_REQUEST:
            assert answer_from_scene(scene, question) == answer, question
            checked += 1
    assert checked > 1000


def test_yes_and_no_are_balanced():
    answers = Counter(answer for _, _, answer in turns() if answer in ("yes", "no"))
    share = answers["yes"] / answers.total()
    assert 0.4 < share < 0.6


def test_no_colour_and_no_number_is_the_likely_answer():
    answers = Counter(answer for _, _, answer in turns())
    colours = [answers[colour] for colour in COLOURS]
    assert max(colours) < 2 * min(colours)
    numbers = [answers[number] for number in ("one", "two", "three")]
    assert max(numbers) < 2.5 * min(numbers)


def test_a_conversation_never_repeats_a_question():
    for index, scene in enumerate(SCENES):
        questions = [question for question, _ in ask(scene, random.Random(index), 6)]
        assert len(questions) == len(set(questions))


def test_every_kind_of_question_is_asked():
    assert len(ASKERS) == 11
    asked = {
        re.sub(r"\b(" + "|".join([*SINGULAR, *COLOURS]) + r")\b", "_", q) for _, q, _ in turns()
    }
    assert len(asked) >= len(ASKERS)


@pytest.mark.parametrize("manner", STYLES)
def test_a_caption_names_only_things_of_the_scene(manner):
    for index, scene in enumerate(SCENES):
        words = re.findall(r"\w+", manner(scene, random.Random(index)).lower())
        nouns = {SINGULAR[word] for word in words if word in SINGULAR}
        assert nouns == {kind.noun for kind in scene.kinds}
        colours = {word for word in words if word in COLOURS}
        assert colours <= {kind.colour for kind in scene.kinds}
