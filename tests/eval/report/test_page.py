import base64
import hashlib
import re

import pytest

from eval.report.page import render_report
from tests.eval.report.report_page import EMPTY_PAGE, HOSTILE, LOW, Page, example, render, section

THUMBNAIL = "data:image/jpeg;base64,AA=="
SEEN = (0.9, 0.8, 1.0)


@pytest.fixture(scope="module")
def full_html():
    examples = [example(i, i / 40, targets=("a", "b")) for i in range(40)]
    examples += [example(i, i / 40, kind="answer", question=HOSTILE) for i in range(3)]
    examples += [example(i, i % 2, kind="pope") for i in range(3)]
    return render_report(
        scores={
            "captions": section("CIDEr", SEEN, count=1234, **LOW),
            "answers": {
                **section("token_f1", SEEN, **LOW),
                "by_type": {"what": section("token_f1", SEEN, **LOW)},
            },
            "pope": {"random": section("accuracy", SEEN, **LOW)},
            "pretrain_only": {"captions": section("CIDEr", SEEN, **LOW)},
            "contamination": {"captions": {"images": 9, "contaminated": 1, "left_out": 1}},
        },
        examples=examples,
        thumbnails=dict.fromkeys(range(1, 40, 2), THUMBNAIL),
        file_names={i: f"{i}.jpg" for i in range(39)},
        histories={
            "pretrain": [{"step": n, "loss": 3 - n / 10, "validation_loss": 3.0} for n in range(9)],
            "finetune": [],
        },
        provenance={
            "git_commit": "abc123",
            "index": {"images.parquet": "ff00"},
            "settings": {
                "llm": {"model": "microsoft/phi-2"},
                "encoder": {"model": "ViT-B-32"},
                "data": {"source": "coco"},
            },
        },
        contamination={"captions": [{"image_id": 5, "file_name": "5.jpg", "reason": "same file"}]},
        dates={"evaluate": "2026-03-02T10:00:00Z", "pretrain": "2026-03-01T08:00:00Z"},
        warning="",
    )


def test_features_of_others_are_named_by_their_store():
    settings = {"encoder": {"model": "external", "pretrained": "my_features"}}
    html = render_report(**EMPTY_PAGE | {"provenance": {"settings": settings}})
    assert "cached patch features of the store my_features." in html


@pytest.mark.parametrize("page", ["full", "empty"])
def test_the_page_fetches_nothing(page, full_html):
    html = full_html if page == "full" else render_report(**EMPTY_PAGE)
    parsed = Page(html)
    links = [a[key] for _, a in parsed.tags for key in ("src", "href", "srcset") if key in a]
    assert len(links) > 5
    assert all(str(link).startswith(("#", "data:")) for link in links)
    assert not re.search(r"https?://|@import|url\(", html)


@pytest.mark.parametrize("page", ["full", "empty"])
def test_nothing_runs_but_the_page_s_own_style_and_script(page, full_html):
    html = full_html if page == "full" else render_report(**EMPTY_PAGE)
    (policy,) = [a["content"] for a in Page(html).named("meta") if "http-equiv" in a]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data:"
    for tag in ("style", "script"):
        (body,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
    assert not re.search(r"<[^>]* (style|on\w+)=", re.sub(r'"[^"]*"', '""', html))


def test_links_within_the_page_have_a_place(full_html):
    page = Page(full_html)
    places = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    targets = [str(a["href"])[1:] for a in page.named("a")]
    assert len(targets) > 5
    assert places >= set(targets)


@pytest.mark.parametrize(
    "field", ["question", "prediction", "blind_prediction", "targets", "question_type"]
)
def test_hostile_texts_are_escaped(field):
    value = (HOSTILE, HOSTILE) if field == "targets" else HOSTILE
    page = render(examples=[example(1, 0.5, kind="answer", **{field: value})])
    assert " ".join(HOSTILE.split()) in page.texts
    assert page.named("img") == []
    assert len(page.named("script")) == 1


def test_hostile_names_are_escaped():
    part = section("accuracy", SEEN, **LOW)
    page = render(
        scores={"pope": {HOSTILE: part}, "answers": {"token_f1": 0.1, "by_type": {HOSTILE: part}}},
        provenance={HOSTILE: {HOSTILE: [HOSTILE]}, "settings": {"llm": {"model": HOSTILE}}},
        histories={f"{HOSTILE} empty": [], HOSTILE: [{"step": 1, "loss": 2.0}]},
    )
    assert page.texts.count(" ".join(HOSTILE.split())) >= 5
    assert page.named("img") == []
    assert len(page.named("script")) == 1


@pytest.mark.parametrize(
    "scores",
    [
        {},
        {"captions": {"count": 0}, "answers": {"count": 0, "loss": None}, "pope": {}},
        {"captions": None, "pretrain_only": {}, "pope": None, "contamination": None},
        {"captions": {}, "answers": {}, "pretrain_only": {"captions": None}},
        {
            "captions": {"count": 0, "blind": {"count": 0}},
            "answers": {"count": 0, "blind": {"count": 0}, "by_type": {}},
            "pope": {"random": {"count": 0, "blind": {"count": 0}}},
        },
    ],
)
def test_a_page_without_scores_says_so(scores):
    page = render(scores=scores)
    for kind in ("captions", "answers", "yes/no questions"):
        assert f"No {kind} were scored: the evaluation data has none." in page.texts
    assert {
        "Nothing was scored.",
        "No training history was found.",
        "No examples to show.",
        "No yes/no questions were asked.",
        "No answers were scored by type of question.",
    } <= set(page.texts)
    assert page.of_class("score") == []


def test_scores_without_intervals_and_with_one_control_have_their_place():
    page = render(scores={"captions": {"CIDEr": 0.5, "BLEU-1": None, "blind": {"CIDEr": 0.1}}})
    assert {"0.500", "0.100"} <= set(page.texts)
    assert page.texts[page.texts.index("BLEU-1") + 2] == "\u2013"


def test_all_scores_are_in_the_tables(full_html):
    texts = Page(full_html).texts
    assert {"0.900", "90.0%", "1,234", "Untrained projector"} <= set(texts)


def test_the_opening_names_what_was_trained_on_what(full_html):
    (sentence,) = [text for text in Page(full_html).texts if "patch features" in text]
    for name in ("microsoft/phi-2", "ViT-B-32", "coco"):
        assert name in sentence


def test_the_page_is_the_same_for_the_same_content():
    arguments = EMPTY_PAGE | {"examples": [example(i, 0.5) for i in range(100)]}
    assert render_report(**arguments) == render_report(**arguments)


@pytest.mark.parametrize("name", ["val2017/000000000139.jpg", HOSTILE])
@pytest.mark.parametrize("has_picture", [True, False])
def test_a_picture_is_named_by_its_number_and_its_file(name, has_picture):
    thumbnails = dict.fromkeys((7, 8), THUMBNAIL) if has_picture else {}
    page = render(
        examples=[example(7, 0.5), example(8, 0.5)],
        thumbnails=thumbnails,
        file_names={7: name, 9: "unseen.jpg"},
    )
    at = page.texts.index("Picture 7")
    assert page.texts[at + 1 : at + 5] == [", val", "score", "0.50", " ".join(name.split())]
    at = page.texts.index("Picture 8")
    assert page.texts[at + 1 : at + 5] == [", val", "score", "0.50", "Model"]
    assert "unseen.jpg" not in " ".join(page.texts)
    described = [f"Picture 7 ({name})", "Picture 8"] if has_picture else []
    assert sorted(a["alt"] for a in page.named("img")) == described


DATES = {
    "evaluate": "2026-03-02T10:00:00Z",
    "pretrain": "2026-03-01T08:00:00Z",
    "finetune": "2026-03-01T09:00:00Z",
}


@pytest.mark.parametrize("known", [(), ("evaluate",), ("evaluate", "finetune"), tuple(DATES)])
def test_known_dates_are_shown(known):
    page = render(dates={stage: DATES[stage] for stage in known})
    written = [DATES[stage] for stage in known]
    assert [a["datetime"] for a in page.named("time")] == written
    labels = {"evaluate": "Evaluated", "pretrain": "stage 1 trained", "finetune": "stage 2 trained"}
    head = " ".join(page.texts[: page.texts.index("Scores")])
    for stage, label in labels.items():
        assert (f"{label} {DATES[stage]}" in head) is (stage in known)


def test_a_warning_stands_before_every_score_and_verdict(full_html):
    for scores in ({}, {"captions": section("CIDEr", SEEN, **LOW)}):
        page = render(scores=scores, warning=HOSTILE)
        verdicts = page.of_class("verdict")
        assert verdicts[0]["class"].split() == ["verdict", "bad", "headline"]
        at = page.texts.index(" ".join(HOSTILE.split()))
        assert page.texts[at - 1] == "Scores and controls"
    assert "verdict bad headline" not in full_html


def test_missing_pictures_have_a_placeholder():
    missing = "The picture is not on this machine."
    assert missing in render(examples=[example(1, 0.5)]).texts
    page = render(examples=[example(1, 0.5)], thumbnails={1: THUMBNAIL, 2: THUMBNAIL})
    assert missing not in page.texts
    assert [a["src"] for a in page.named("img")] == [THUMBNAIL]


@pytest.mark.parametrize("thumbnail", ["https://example.com/a.jpg", "a.jpg", "javascript:x", ""])
def test_only_embedded_pictures_are_taken(thumbnail):
    with pytest.raises(ValueError, match="thumbnail of image 3 must be a data URI"):
        render(thumbnails={3: thumbnail})


def test_a_text_that_was_cut_is_marked():
    page = render(examples=[example(1, 0.5, stopped=False, num_tokens=48)])
    assert "cut off at 48 tokens" in page.texts
    assert "cut off at 48 tokens" not in render(examples=[example(1, 0.5, num_tokens=48)]).texts


def test_every_drawing_is_described_or_beside_its_numbers(full_html):
    page = Page(full_html)
    drawings = page.named("svg")
    described = [a for a in drawings if a.get("role") == "img"]
    assert len(described) == 4, "three kinds of texts, and one stage"
    assert all(a["aria-label"] for a in described)
    bars = [a for a in drawings if a.get("class") == "bar"]
    hidden = [a for _, a in page.tags if a.get("aria-hidden") == "true"]
    assert len(bars) >= 16
    assert len([a for a in hidden if a.get("class") == "drawn"]) == len(bars)


def test_both_stages_have_a_figure(full_html):
    page = Page(full_html)
    assert len(page.named("figure")) == 5
    assert {"loss (nats per token)", "optimizer steps", "No loss was logged."} <= set(page.texts)
