import math

import pytest

from eval.report.cards import headline, judge, score_cards
from eval.report.scores import LABELS, bars_of
from tests.eval.report.report_page import LOW, render, section

SEEN = (0.9, 0.8, 1.0)
WINS = "Beats every control."


def test_a_better_score_with_a_separate_interval_beats_a_control():
    verdict = judge(section("CIDEr", SEEN, **LOW), "CIDEr")
    assert (verdict.state, verdict.text) == ("good", WINS)


@pytest.mark.parametrize("control", ["blind", "noise", "untrained"])
@pytest.mark.parametrize(
    ("measured", "reason"),
    [
        ((0.7, 0.6, 0.81), "the intervals overlap"),
        ((0.7, 0.6, 0.8), "the intervals overlap"),
        ((0.95, 0.85, 1.2), "the intervals overlap"),
        ((1.4, 1.3, 1.5), "which is better"),
    ],
)
def test_a_control_that_is_not_beaten_is_named(control, measured, reason):
    name = LABELS[control].sentence
    verdict = judge(section("CIDEr", SEEN, **(LOW | {control: measured})), "CIDEr")
    assert verdict.state == "bad"
    assert verdict.text.startswith(f"Does NOT beat the {name} ({reason}). Beats the ")
    assert verdict.text.count(name) == 1


def test_all_controls_that_are_not_beaten_are_named():
    same = dict.fromkeys(LOW, SEEN)
    assert judge(section("CIDEr", SEEN, **same), "CIDEr").text == (
        "Does NOT beat the wrong-image control (the intervals overlap), the noise control (the "
        "intervals overlap) or the untrained projector (the intervals overlap)."
    )


@pytest.mark.parametrize(
    ("loss", "state"),
    [((0.1, 0.0, 0.15), "good"), ((0.5, 0.15, 0.6), "bad"), ((9.0, 8.0, 9.5), "bad")],
)
def test_a_lower_loss_is_better(loss, state):
    high = {"blind": (1.0, 0.2, 1.1), "noise": (2.0, 1.0, 3.0), "untrained": (3.0, 2.0, 4.0)}
    assert judge(section("loss", loss, **high), "loss").state == state


@pytest.mark.parametrize("missing", [None, (0.1, None, None), (0.1, 0.0, math.nan)])
def test_a_missing_interval_leaves_the_verdict_open(missing):
    controls = {name: measured for name, measured in LOW.items() if name != "noise"}
    if missing is not None:
        controls["noise"] = missing
    verdict = judge(section("CIDEr", SEEN, **controls), "CIDEr")
    assert verdict.state == "open"
    assert verdict.text == (
        "Beats the wrong-image control and the untrained projector. "
        "No interval to compare with the noise control."
    )


def test_a_lost_control_counts_though_another_is_missing():
    verdict = judge(section("CIDEr", SEEN, blind=SEEN, noise=LOW["noise"]), "CIDEr")
    assert verdict.state == "bad"


@pytest.mark.parametrize("value", [None, math.nan, "much", True])
def test_a_score_that_is_no_number_cannot_be_judged(value):
    verdict = judge(section("CIDEr", (value, 0.8, 1.0), **LOW), "CIDEr")
    assert verdict.state == "open"
    assert "not measured" in verdict.text


def scores(**changes):
    return {
        "captions": section("CIDEr", SEEN, **LOW),
        "answers": section("token_f1", SEEN, **LOW),
        "pope": {"random": section("accuracy", SEEN, **LOW)},
        "pretrain_only": {"captions": section("CIDEr", SEEN, **LOW)},
    } | changes


def test_the_headline_counts_what_beats_all_controls():
    cards = score_cards(scores())
    assert len(cards) == 4
    assert headline(cards).text == "All 4 main scores beat all 3 controls."


def test_the_headline_names_the_scores_that_do_not():
    lost = section("token_f1", SEEN, **(LOW | {"noise": SEEN}))
    verdict = headline(score_cards(scores(answers=lost)))
    assert verdict.state == "bad"
    assert verdict.text == ("1 of 4 main scores do NOT beat every control (Answers: Token F1).")


def test_a_missing_interval_leaves_the_headline_open():
    verdict = headline(score_cards(scores(answers={"token_f1": 0.9, "blind": {"token_f1": 0.1}})))
    assert verdict.state == "open"
    assert verdict.text.startswith("1 of 4 main scores cannot be compared")
    assert headline([]) is None


def test_each_main_score_has_a_card_and_each_subset_one():
    answers = {"exact_match": 0.5, "token_f1": 0.6, "loss": 1.0, "count": 9, "short_count": 7}
    pope = {name: section("accuracy", SEEN) for name in ("random", "popular", "official random")}
    cards = score_cards(scores(answers=answers, pope=pope))
    assert [(card.title, card.metric.label, card.texts) for card in cards] == [
        ("Captions", "CIDEr", "100 texts"),
        ("Answers", "Exact match", "7 texts"),
        ("Answers", "Token F1", "9 texts"),
        ("Answers", "Loss", "9 texts"),
        ("Yes or no, random", "Accuracy", "100 texts"),
        ("Yes or no, popular", "Accuracy", "100 texts"),
        ("Yes or no, official random", "Accuracy", "100 texts"),
        ("Captions of stage 1 alone", "CIDEr", "100 texts"),
    ]


def test_exact_match_over_no_short_target_has_no_card_and_is_not_judged():
    nothing = section("exact_match", (0.0, 0.0, 0.0), **LOW) | {"short_count": 0}
    cards = score_cards(scores(answers=nothing | {"token_f1": 0.5}))
    assert [card.metric.label for card in cards if card.title == "Answers"] == ["Token F1"]
    assert judge(nothing, "exact_match").state == "open"
    assert {bar.measured.value for bar in bars_of(nothing, "exact_match")} == {None}
    short = nothing | {"short_count": 1}
    assert judge(short, "exact_match").state == "bad"


@pytest.mark.parametrize(("changes", "texts"), [({"short_count": 3}, "3 texts"), ({}, "9 texts")])
def test_exact_match_says_of_how_many_short_targets_where_that_is_known(changes, texts):
    (card,) = score_cards({"answers": {"exact_match": 0.5, "count": 9} | changes})
    assert card.texts == texts


def test_the_longest_bar_or_whisker_fills_the_row():
    seen, *controls = bars_of(section("CIDEr", (2.0, 1.0, 4.0), **LOW), "CIDEr")
    assert (seen.width, seen.low, seen.high) == (50, 25, 100)
    assert all(0 <= bar.low <= bar.width <= bar.high <= 10 for bar in controls)


def test_a_share_is_drawn_against_the_whole():
    seen, blind = bars_of(section("accuracy", (0.5, 0.4, 0.6), blind=(0.25, 0.2, 0.3)), "accuracy")
    assert (seen.width, seen.low, seen.high, blind.width) == (50, 40, 60, 25)
    assert seen.measured.interval == "40.0\u201360.0%"


def test_whiskers_are_drawn_where_intervals_were_measured():
    page = render(scores={"captions": section("CIDEr", SEEN, blind=LOW["blind"])})
    assert len(page.of_class("whisker")) == 2
    assert {"0.900", "0.800\u20131.000", "0.300", "0.200\u20130.400"} <= set(page.texts)
    page = render(scores={"captions": {"CIDEr": 0.9, "count": 1, "blind": {"CIDEr": 0.3}}})
    assert page.of_class("whisker") == []
    assert {"0.900", "0.300"} <= set(page.texts)


def test_a_control_that_was_not_asked_has_no_bar():
    bars = bars_of({"CIDEr": 0.9, "blind": {"CIDEr": 0.1}, "noise": None}, "CIDEr")
    assert [bar.label for bar in bars] == ["Model", "Wrong image"]


@pytest.mark.parametrize("value", [0.0, None, math.nan])
def test_a_missing_score_has_a_bar_of_no_length(value):
    assert [bar.width for bar in bars_of({"CIDEr": value}, "CIDEr")] == [0]
