"""What the page and the summary say about stages and texts that were not scored."""

import pytest

from eval.report.gaps import gaps, untrained_stages
from tests.eval.report.report_page import render

SCORED = {"count": 3}
FULL = {
    "captions": SCORED,
    "answers": SCORED,
    "pope": {"random": SCORED},
    "pretrain_only": {"captions": SCORED},
    "trained": {"pretrain": True, "finetune": True},
    "split": {"name": "karpathy", "captions": "test"},
}
EMPTY = {"count": 0}
ALL_LEFT_OUT = {"images": 3, "contaminated": 3, "left_out": 3}
STAGE_1 = (
    "Stage 1 was not trained, because there are no captions of split train: stage 2 started from "
    "random weights of the projector."
)
STAGE_2 = (
    "Stage 2 was not trained, because there are no conversations: all scores are of stage 1 alone."
)

BUDGET = (
    "The evaluation had 2.5 minutes (evaluate.minutes). In brackets stands the number of images "
    "behind scores and intervals: a random sample, the same in all conditions."
)


@pytest.mark.parametrize(
    ("changes", "sentences"),
    [
        ({}, []),
        ({"trained": {}}, []),
        ({"captions": EMPTY}, ["No captions were scored: split test has none."]),
        ({"answers": EMPTY}, ["No answers were scored: the evaluation data has none."]),
        ({"pope": {}}, ["No yes/no questions were scored: the evaluation data has none."]),
        (
            {
                "trained": {"pretrain": False, "finetune": True},
                "pretrain_only": {"captions": EMPTY},
            },
            [STAGE_1],
        ),
        (
            {
                "trained": {"pretrain": True, "finetune": False},
                "captions": EMPTY,
                "answers": EMPTY,
                "pope": {},
            },
            [STAGE_2],
        ),
        (
            {
                "trained": {"pretrain": True, "finetune": False},
                "pretrain_only": {"captions": EMPTY},
            },
            [STAGE_2, "No captions were scored: split test has none."],
        ),
        (
            {"captions": EMPTY, "contamination": {"captions": ALL_LEFT_OUT}},
            ["No captions were scored: all of their pictures are in the training data."],
        ),
        (
            {"trained": {"finetune": True}, "pretrain_only": {"captions": EMPTY}},
            ["Stage 1 alone was not evaluated (evaluate.stages)."],
        ),
        (
            {"trained": {"pretrain": True}, "captions": EMPTY, "answers": EMPTY, "pope": {}},
            ["Stage 2 was not evaluated (evaluate.stages)."],
        ),
        ({"budget": {"minutes": 2.5}}, [BUDGET]),
    ],
)
def test_each_gap_is_one_sentence_on_the_page(changes, sentences):
    scores = FULL | changes
    assert gaps(scores) == sentences
    page = render(scores=scores)
    assert len(page.of_class("empty")) >= len(sentences)
    assert set(sentences) <= set(page.texts)


@pytest.mark.parametrize("trained", [None, {}, {"pretrain": None}, {"other": False}])
def test_a_stage_is_trained_unless_the_scores_say_otherwise(trained):
    assert untrained_stages({"trained": trained}) == []


@pytest.mark.parametrize(
    ("untrained", "task"),
    [
        ((), "to caption pictures and to answer questions about them, from"),
        (("finetune",), "to caption pictures, from"),
        (("pretrain",), "to answer questions about pictures, from"),
    ],
)
def test_the_page_begins_with_what_was_trained(untrained, task):
    page = render(scores={"trained": dict.fromkeys(untrained, False)})
    assert any(task in text for text in page.texts)


def test_the_page_says_what_the_stages_learned_from():
    pages = {
        "Stage 1 learned from 1,350 captions of 270 pictures. Stage 2 learned from 80 "
        "conversations about 30 pictures.": {
            "pretrain": {"images": 270, "texts": 1350},
            "finetune": {"images": 30, "texts": 80},
        },
        "Stage 2 learned from 80 conversations about 30 pictures.": {
            "pretrain": {},
            "finetune": {"images": 30, "texts": 80},
        },
    }
    for said, trained_on in pages.items():
        assert said in render(scores={"trained_on": trained_on}).texts


def test_the_page_names_the_split():
    said = "Pictures are split by karpathy; scored captions are those of split test."
    assert said in render(scores=FULL).texts
    assert not any("split by" in text for text in render(scores={}).texts)
