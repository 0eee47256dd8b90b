import base64
import dataclasses
import io
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from PIL import Image

from eval.loss_chart import BOTTOM, LEFT, RIGHT, TOP, loss_chart
from eval.report import Example, choose_examples, render_report, thumbnail_uri

HOSTILE = "</script><img src=x onerror=alert(1)> \" ' & {{ 7 * 7 }}"
LOSES = "Does NOT beat the blind control: it has learned nothing from the pictures."
WINS = "Beats the blind control."
CANNOT_JUDGE = "Cannot be judged"
EMPTY_PAGE: dict[str, Any] = {"scores": {}, "examples": [], "histories": {}, "provenance": {}}


class Page(HTMLParser):
    VOID = ("meta", "link", "img", "line", "circle", "polyline")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style" and data.strip():
            self.texts.append(" ".join(data.split()))

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def picture(mode: str = "RGB", size: tuple[int, int] = (400, 100)) -> bytes:
    data = io.BytesIO()
    Image.new(mode, size, 128 if mode == "L" else (200, 30, 30)).save(data, "PNG")
    return data.getvalue()


def example(image_id: int, score: float, **changes: Any) -> Example:
    kind = changes.pop("kind", "caption")
    fields = {
        "question": "" if kind == "caption" else "What is it?",
        "targets": ("a red dog", "a dog that is red"),
        "prediction": f"prediction {image_id}",
        "blind_prediction": "a blue boat",
        "thumbnail": None,
    }
    return Example(image_id=image_id, kind=kind, score=score, **(fields | changes))


def captions(cider: float | None, blind: float | None) -> dict[str, Any]:
    return {"CIDEr": cider, "stop_rate": 0.5, "count": 1234, "blind": {"CIDEr": blind}}


def render(**changes: Any) -> Page:
    return Page(render_report(**(EMPTY_PAGE | changes)))


@pytest.fixture(scope="module")
def full_html() -> str:
    thumbnail = thumbnail_uri(picture())
    examples = [example(i, i / 40, thumbnail=thumbnail if i % 2 else None) for i in range(40)]
    examples += [example(i, i / 40, kind="answer", question=HOSTILE) for i in range(3)]
    return render_report(
        scores={
            "captions": captions(0.9, 0.1),
            "answers": {"loss": 2.0, "token_f1": 0.25, "blind": {"loss": 1.0, "token_f1": 0.1}},
            "pretrain_only": {"captions": captions(0.5, 0.1)},
        },
        examples=examples,
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
    )


@pytest.mark.parametrize("page", ["full", "empty"])
def test_the_page_fetches_nothing(page: str, full_html: str) -> None:
    html = full_html if page == "full" else render_report(**EMPTY_PAGE)
    parsed = Page(html)
    links = [a[key] for _, a in parsed.tags for key in ("src", "href", "srcset") if key in a]
    assert len(links) > 5
    assert all(str(link).startswith(("#", "data:")) for link in links)
    assert not re.search(r"https?://|@import|url\(", html)
    assert not parsed.named("script")
    assert parsed.open == []


def test_links_within_the_page_have_a_place(full_html: str) -> None:
    page = Page(full_html)
    places = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    targets = [str(a["href"])[1:] for a in page.named("a")]
    assert len(targets) > 5
    assert places >= set(targets)


@pytest.mark.parametrize("field", ["question", "prediction", "blind_prediction", "targets"])
def test_hostile_words_stay_words(field: str) -> None:
    value = (HOSTILE, HOSTILE) if field == "targets" else HOSTILE
    page = render(examples=[example(1, 0.5, kind="answer", **{field: value})])
    assert HOSTILE in page.texts
    assert not page.named("img")
    assert not page.named("script")


def test_hostile_provenance_and_stage_names_stay_words() -> None:
    page = render(
        provenance={HOSTILE: {HOSTILE: [HOSTILE]}, "settings": {"llm": {"model": HOSTILE}}},
        histories={f"{HOSTILE} empty": [], HOSTILE: [{"step": 1, "loss": 2.0}]},
    )
    assert page.texts.count(HOSTILE) >= 3
    assert not page.named("img")


@pytest.mark.parametrize(
    ("score", "blind", "verdict"),
    [
        (0.9, 0.1, WINS),
        (0.1, 0.0, WINS),
        (0.9, 0.9, LOSES),
        (0.905, 0.9, LOSES),
        (0.1, 0.9, LOSES),
        (0.0, 0.0, LOSES),
        (0.9, None, CANNOT_JUDGE),
        (None, 0.9, CANNOT_JUDGE),
        (math.nan, 0.9, CANNOT_JUDGE),
    ],
)
def test_the_verdict_is_about_the_blind_control(
    score: float | None, blind: float | None, verdict: str
) -> None:
    page = render(scores={"captions": captions(score, blind)})
    verdicts = [text for text in page.texts if text.startswith((WINS, LOSES, CANNOT_JUDGE))]
    assert len(verdicts) == 1
    assert verdicts[0].startswith(verdict)


@pytest.mark.parametrize(("loss", "blind", "verdict"), [(1.0, 2.0, WINS), (2.0, 1.0, LOSES)])
def test_a_lower_loss_is_better(loss: float, blind: float, verdict: str) -> None:
    assert verdict in render(scores={"answers": {"loss": loss, "blind": {"loss": blind}}}).texts


@pytest.mark.parametrize(
    "scores",
    [
        {},
        {"captions": {"count": 0}, "answers": {"count": 0, "loss": None}},
        {"captions": None, "pretrain_only": {}},
        {"captions": {}, "answers": {}, "pretrain_only": {"captions": None}},
    ],
)
def test_a_page_without_scores_says_so(scores: dict[str, Any]) -> None:
    page = render(scores=scores)
    assert "No captions were scored: the evaluation data holds none." in page.texts
    assert "No answers were scored: the evaluation data holds none." in page.texts
    assert "Nothing was scored." in page.texts
    assert "No training history was found." in page.texts


def test_values_that_were_not_measured_are_dashes() -> None:
    page = render(scores={"captions": {"CIDEr": 0.5, "BLEU-1": None, "blind": None}})
    assert page.texts[page.texts.index("BLEU-1") + 2] == "\u2013"


def test_all_scores_are_in_the_tables(full_html: str) -> None:
    texts = Page(full_html).texts
    assert {"0.900", "0.500", "50.0%", "1,234", "2.000", "25.0%"} <= set(texts)
    assert {"Both stages, blind", "Stage 1 alone"} <= set(texts)


def test_the_opening_names_what_was_trained_on_what(full_html: str) -> None:
    (sentence,) = [text for text in Page(full_html).texts if "learned to describe" in text]
    for name in ("microsoft/phi-2", "ViT-B-32", "coco"):
        assert name in sentence


def test_worst_and_best_come_first_and_nothing_twice(full_html: str) -> None:
    shown = [text for text in Page(full_html).texts if text.startswith("prediction")][:18]
    numbers = [int(text.split()[1]) for text in shown]
    assert numbers[:12] == [0, 1, 2, 3, 4, 5, 39, 38, 37, 36, 35, 34]
    assert len(set(numbers)) == 18


@pytest.mark.parametrize("count", [0, 1, 2, 3, 11, 12, 13, 18, 19, 100])
def test_choosing_examples_again_changes_nothing(count: int) -> None:
    gallery = choose_examples([example(i, (i * 7 % 13) / 13) for i in range(count)])["caption"]
    chosen = [e for group in gallery.values() for e in group]
    assert len({e.image_id for e in chosen}) == len(chosen) == min(count, 18)
    assert choose_examples(chosen)["caption"] == gallery


def test_the_page_is_the_same_for_the_same_content() -> None:
    arguments = EMPTY_PAGE | {"examples": [example(i, 0.5) for i in range(30)]}
    assert render_report(**arguments) == render_report(**arguments)


def test_pictures_that_are_not_here_are_named_as_such() -> None:
    page = render(examples=[example(1, 0.5)])
    assert "The picture is not on this machine." in page.texts


@pytest.mark.parametrize("thumbnail", ["https://example.com/a.jpg", "a.jpg", "javascript:x", ""])
def test_only_embedded_pictures_are_taken(thumbnail: str) -> None:
    with pytest.raises(ValueError, match="thumbnail of image 3 must be a data URI"):
        example(3, 0.5, thumbnail=thumbnail)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
def test_a_thumbnail_is_a_small_jpeg_of_the_same_shape(mode: str) -> None:
    data = io.BytesIO()
    Image.new("RGB", (400, 100), (200, 30, 30)).convert(mode).save(
        data, "TIFF" if mode == "CMYK" else "PNG"
    )
    head, _, body = thumbnail_uri(data.getvalue(), side=64).partition(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(body))) as image:
        assert (image.format, image.size, image.mode) == ("JPEG", (64, 16), "RGB")


@pytest.mark.parametrize("data", [b"", b"no picture", picture()[:60]])
def test_bytes_that_are_no_picture_are_an_error(data: bytes) -> None:
    with pytest.raises(OSError):  # noqa: PT011
        thumbnail_uri(data)


def test_loss_lines_keep_within_the_axes_and_fall_with_the_loss() -> None:
    rows = [{"step": n, "loss": 5 / (n + 1), "validation_loss": ""} for n in range(1001)]
    rows[-1] |= {"validation_loss": 0.5}
    chart = loss_chart(rows)
    assert chart is not None
    assert len(chart.train) <= 400
    assert len(chart.validation) == 1
    xs, ys = zip(*chart.train, strict=True)
    assert list(xs) == sorted(xs)
    assert list(ys) == sorted(ys)
    assert LEFT <= min(xs) < max(xs) <= RIGHT
    assert TOP <= min(ys) < max(ys) <= BOTTOM
    assert [tick.label for tick in chart.x_ticks] == ["0", "200", "400", "600", "800", "1,000"]
    assert "0.005 at step 1,000" in chart.summary


@pytest.mark.parametrize("loss", [0.0, 2.5, 1e-9, 1e9])
def test_a_single_step_is_a_point_within_the_axes(loss: float) -> None:
    chart = loss_chart([{"step": 1, "loss": loss}])
    assert chart is not None
    ((x, y),) = chart.train
    assert LEFT <= x <= RIGHT
    assert TOP <= y <= BOTTOM


def test_rows_without_a_finite_loss_are_no_chart() -> None:
    assert loss_chart([{"step": 1, "loss": math.nan}, {"step": 2, "loss": None}, {}]) is None


def test_both_stages_have_a_figure(full_html: str) -> None:
    page = Page(full_html)
    assert len(page.named("figure")) == 2
    assert {"loss (nats per token)", "optimizer steps", "No loss was logged."} <= set(page.texts)


def test_an_example_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        example(1, 0.5).score = 1.0  # type: ignore[misc]
