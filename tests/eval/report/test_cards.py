import math

import pytest

from eval.report.cards import headline, judge, score_cards
from eval.report.scores import LABELS, bars_of
from tests.eval.report.report_page import LOW, gain, render, section

SEEN = (0.9, 0.8, 1.0)


def with_gain(*numbers, control="blind", **changes):
    """A section that wins, but for the gain over one control."""
    found = section("CIDEr", SEEN, **LOW)
    found["gains"][control] = {"CIDEr": gain(*numbers, **changes)}
    return found


def test_a_gain_over_the_wrong_image_is_use_of_the_picture():
    verdict = judge(section("CIDEr", SEEN, **LOW), "CIDEr")
    assert (verdict.state, verdict.text) == ("good", "Uses the picture.")


@pytest.mark.parametrize(
    "numbers",
    [(0.0, 0.0, 0.0), (0.2, -0.1, 0.5), (0.2, 0.0, 0.4), (-0.5, -0.6, -0.4)],
)
def test_a_model_without_a_gain_over_the_wrong_image_does_not_use_the_picture(numbers):
    verdict = judge(with_gain(*numbers), "CIDEr")
    assert (verdict.state, verdict.text) == (
        "bad",
        "Does not use the picture, as far as 100 images can show.",
    )


def test_so_few_images_that_p_cannot_be_small_show_no_use_of_the_picture():
    verdict = judge(with_gain(0.5, 0.4, 0.6, p=0.0625, images=5), "CIDEr")
    assert verdict.text == "Does not use the picture, as far as 5 images can show."


@pytest.mark.parametrize("control", ["noise", "untrained"])
def test_another_control_that_is_not_beaten_is_named(control):
    name = LABELS[control].sentence
    verdict = judge(with_gain(0.1, -0.1, 0.3, control=control), "CIDEr")
    assert (verdict.state, verdict.text) == (
        "good",
        f"Uses the picture, but shows no gain over the {name}.",
    )
    found = section("CIDEr", SEEN, blind=LOW["blind"], noise=SEEN, untrained=SEEN)
    assert judge(found, "CIDEr").text.endswith("the noise control or the untrained projector.")


def test_a_model_that_gains_nothing_over_one_trained_without_sight_has_learned_language():
    found = section("CIDEr", SEEN, trained_blind=(0.85, 0.7, 1.0), **LOW)
    verdict = judge(found, "CIDEr")
    assert (verdict.state, verdict.text) == (
        "bad",
        "Has learned language, not sight, as far as 100 images can show: no gain over the model "
        "trained without sight.",
    )
    won = section("CIDEr", SEEN, trained_blind=(0.4, 0.3, 0.5), **LOW)
    assert judge(won, "CIDEr").text == "Uses the picture."
    summary = headline(score_cards({"captions": won, "answers": found}))
    assert summary.state == "bad"
    assert summary.text.endswith("1 of 2 main scores gain over the model trained without sight.")
    assert headline(score_cards({"captions": won})).state == "good"


@pytest.mark.parametrize(
    "missing",
    [{}, {"gains": None}, {"gains": {"noise": {}}}, {"gains": {"blind": {"CIDEr": {"gain": 1.0}}}},
     {"gains": {"blind": {"CIDEr": gain(math.nan, 0.1, 0.2)}}}],
)  # fmt: skip
def test_a_missing_gain_leaves_the_verdict_open(missing):
    found = {k: v for k, v in section("CIDEr", SEEN, **LOW).items() if k != "gains"} | missing
    verdict = judge(found, "CIDEr")
    assert (verdict.state, verdict.text) == (
        "open",
        "The gain over the wrong image was not measured.",
    )


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


def test_the_headline_counts_the_gains_over_the_wrong_image():
    cards = score_cards(scores())
    assert len(cards) == 4
    said = "The model uses the picture: all 4 main scores gain over the wrong image."
    assert (headline(cards).state, headline(cards).text) == ("good", said)


def test_the_headline_names_the_scores_without_a_gain():
    lost = section("token_f1", SEEN, **(LOW | {"blind": SEEN}))
    verdict = headline(score_cards(scores(answers=lost)))
    assert verdict.state == "bad"
    assert verdict.text == (
        "The model uses the picture by 3 of 4 main scores, and shows no gain over the wrong image "
        "in Answers: Token F1."
    )


def test_a_model_that_ignores_the_picture_is_called_so_by_every_verdict_of_the_page():
    same = dict.fromkeys(LOW, SEEN)
    blind = {
        "captions": section("CIDEr", SEEN, **same),
        "answers": section("loss", SEEN, **same),
        "pope": {"random": section("accuracy", SEEN, **same)},
    }
    said = "The model does not use the picture: none of 3 main scores gains over the wrong image."
    page = render(scores=blind)
    verdicts = page.of_class("verdict")
    assert [a["class"].split() for a in verdicts] == [
        ["verdict", "headline", "bad"],
        *[["verdict", "bad"]] * 3,
    ]
    assert said in page.texts
    assert page.texts.count("Does not use the picture, as far as 100 images can show.") == 3
    assert not any(text.startswith("Uses") for text in page.texts)


def test_a_missing_gain_leaves_the_headline_open():
    verdict = headline(score_cards(scores(answers={"token_f1": 0.9, "blind": {"token_f1": 0.1}})))
    assert verdict.state == "open"
    assert verdict.text == "1 of 4 main scores have no gain over the wrong image to judge."
    assert headline([]) is None


@pytest.mark.parametrize(
    ("key", "changes", "ends", "limit"),
    [
        ("CIDEr", {}, "0.400 to 0.600",
         "With 1,234 images, a true gain of 0.050 shows in 4 of 5 cases."),
        ("accuracy", {}, "40.0 to 60.0 points",
         "With 1,234 images, a true gain of 5.0 points shows in 4 of 5 cases."),
        ("CIDEr", {"detectable": 0.0}, "0.400 to 0.600",
         "The difference is the same in all 1,234 images."),
        ("CIDEr", {"images": 5}, "0.400 to 0.600", "5 images cannot show any gain."),
        ("CIDEr", {"images": 1}, "0.400 to 0.600", "1 image cannot show any gain."),
    ],
)  # fmt: skip
def test_a_card_shows_the_gain_with_its_interval_and_what_could_be_shown(key, changes, ends, limit):
    part = section(key, SEEN, **LOW)
    part["gains"]["blind"][key] = gain(0.5, 0.4, 0.6, **{"images": 1234, **changes})
    page = render(scores={"captions" if key == "CIDEr" else "answers": part})
    at = page.texts.index("Gain over the wrong image")
    value = "+0.500" if key == "CIDEr" else "+50.0 points"
    assert page.texts[at + 1 : at + 3] == [value, f"{ends} (95 %), p < 0.002. {limit}"]


def test_a_card_without_a_gain_has_an_empty_place_for_it():
    page = render(scores={"captions": {"CIDEr": 0.9, "count": 1, "blind": {"CIDEr": 0.3}}})
    assert len(page.of_class("gain")) == 1
    assert "Gain over the wrong image" not in page.texts


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
