import pytest

from eval.scoring.question_types import OTHER, TYPES, question_type


@pytest.mark.parametrize(
    ("question", "wanted"),
    [
        ("Is there a cat?", "yes or no"),
        ("How many things are there in total?", "how many"),
        ("What color is the boat?", "what color"),
        ("What colour are they?", "what color"),
        ("What is the boat doing?", "what"),
        ("what's that", "what"),
        ("Where is it?", "where"),
        ("Why are they there?", "why"),
        ("How might it feel?", "how"),
        ("Which of them is red?", "which"),
        ("Who is it?", "who"),
        ("Describe the picture.", "describe"),
        ("Can you describe it?", "describe"),
        ("Can it fly?", "yes or no"),
        ("In the picture, what is red?", "what"),
        ("Based on the picture, what is the man, who wears a hat, doing?", "what"),
        ("Considering the snow, and the cold, it seems", OTHER),
        ("Issues?", OTHER),
        ("", OTHER),
        (",", OTHER),
    ],
)
def test_a_question_is_sorted_by_how_it_begins(question, wanted):
    assert question_type(question) == wanted


def test_other_is_none_of_the_types():
    assert OTHER not in TYPES
