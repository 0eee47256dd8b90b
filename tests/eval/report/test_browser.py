"""The page in a browser: its requests, its filter, its readability."""

import base64
import io

import pytest
from PIL import Image
from playwright.sync_api import expect

from eval.report.gallery import choose_examples
from eval.report.page import render_report
from tests.browser import visited
from tests.eval.report.report_page import EMPTY_PAGE, HOSTILE, LOW, example, section

pytestmark = pytest.mark.slow("starts a browser")

WIDTHS = (390, 1280)
SEEN = (0.9, 0.8, 1.0)


def picture(red):
    data = io.BytesIO()
    Image.new("RGB", (60, 40), (red % 256, 90, 40)).save(data, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def all_kinds():
    examples = [example(i, i / 40, prediction=f"{i} red boxes") for i in range(40)]
    examples += [
        example(
            100 + i, i % 2, kind="answer", question=HOSTILE, targets=(HOSTILE, HOSTILE),
            prediction=f"{HOSTILE} unique{i}", blind_prediction=HOSTILE,
            question_type=HOSTILE if i % 3 else "what", stopped=i % 5 > 0,
        )
        for i in range(20)
    ]  # fmt: skip
    return examples + [example(200 + i, i % 2, kind="pope") for i in range(5)]


EXAMPLES = all_kinds()
NAMES = {e.image_id: f"a folder/file {e.image_id:012}.jpg" for e in EXAMPLES if e.image_id % 5}
"""Of most of the images."""
NAMES |= {201: HOSTILE.replace("7", "8"), 5: "long" * 60 + ".jpg"}
CHOSEN = {
    (e.kind, e.image_id): (group, e)
    for gallery in choose_examples(EXAMPLES).values()
    for group, examples in gallery.items()
    for e in examples
}


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    part = section("accuracy", SEEN, **LOW)
    lost = section("CIDEr", SEEN, **(LOW | {"noise": SEEN}))
    html = render_report(
        scores={
            "captions": lost,
            "answers": section("token_f1", SEEN, **LOW) | {"by_type": {HOSTILE: part}},
            "pope": {"random": part, HOSTILE: part | section("stop_rate", SEEN, **LOW)},
            "pretrain_only": {"captions": {"CIDEr": 0.5}},
            "contamination": {"captions": {"images": 99, "contaminated": 60, "left_out": 1}},
        },
        examples=EXAMPLES,
        thumbnails={e.image_id: picture(e.image_id) for e in EXAMPLES if e.image_id % 7},
        file_names=NAMES,
        histories={"pretrain": [{"step": n, "loss": 3 - n / 10} for n in range(9)], "finetune": []},
        provenance={HOSTILE: {HOSTILE: HOSTILE}, "settings": {"a": {"b": "x" * 200}}},
        contamination={
            "captions": [
                {"image_id": n, "file_name": HOSTILE, "reason": HOSTILE} for n in range(60)
            ]
        },
        dates=dict.fromkeys(("evaluate", "pretrain", "finetune"), "2026-03-01T08:00:00Z"),
        warning=HOSTILE,
    )
    path = tmp_path_factory.mktemp("page") / "index.html"
    path.write_text(html, encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def open_page(browser, address):
    """Open the page; at the end it must have made no requests and logged no errors."""
    opened = []

    def open_page(width=1280, **settings):
        manager = visited(browser, address, width=width, **settings)
        visit = manager.__enter__()
        opened.append((manager, visit))
        return visit.page

    yield open_page
    for manager, visit in opened:
        manager.__exit__(None, None, None)
        assert visit.complaints == []
        assert all(url == address or url.startswith("data:") for url in visit.requests)
        assert address in visit.requests


def shown(page):
    """Kind and image of the visible examples."""
    return {
        (
            card.get_attribute("data-kind"),
            int(card.locator(".head .text").first.inner_text().split()[1]),
        )
        for card in page.locator(".example:visible").all()
    }


def count(page):
    return page.locator("#examples [role=status]").inner_text()


def assert_shown(page, wanted):
    """The page shows exactly the chosen examples that `wanted(group, example)` holds for."""
    keys = {key for key, (group, e) in CHOSEN.items() if wanted(group, e)}
    assert shown(page) == keys
    assert count(page) == f"{len(keys)} of {len(CHOSEN)} shown"
    assert page.locator("#nothing").is_visible() is (not keys)
    kinds = {kind for kind, _ in keys}
    assert page.locator(".kind:visible").count() == len(kinds), "empty parts have no title"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_opens_without_errors_and_fits_its_width(open_page, width, scheme):
    page = open_page(width, color_scheme=scheme)
    for details in page.locator("details:visible").all():
        details.evaluate("element => { element.open = true; }")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("document.body.scrollWidth") <= width
    assert page.locator("img:visible").count() > 5
    loaded = "[...document.images].filter(i => i.offsetParent).every(i => i.naturalWidth === 60)"
    assert page.evaluate(loaded)


def test_the_first_of_each_group_are_shown_until_all_are_wanted(open_page):
    page = open_page()
    first = len(shown(page))
    assert count(page) == f"{first} of {len(CHOSEN)} shown"
    assert first < len(CHOSEN)
    more = page.locator(".more:visible")
    assert more.first.inner_text() == "Show all 20"
    more.first.press("Enter")
    assert more.first.get_attribute("aria-expanded") == "true"
    assert count(page) == f"{first + 14} of {len(CHOSEN)} shown"
    more.first.press("Space")
    assert len(shown(page)) == first


@pytest.mark.parametrize("width", WIDTHS)
def test_the_filter_shows_what_matches_and_no_more(open_page, width):
    page = open_page(width)
    for kind in ("caption", "answer", "pope"):
        page.get_by_label("Kind").select_option(kind)
        assert_shown(page, lambda group, e, kind=kind: e.kind == kind)
    page.get_by_label("Kind").select_option("")
    page.get_by_label("Split").select_option("holdout")
    assert_shown(page, lambda group, e: e.split == "holdout")
    page.get_by_label("Group").select_option("Worst")
    assert_shown(page, lambda group, e: e.split == "holdout" and group == "Worst")
    page.get_by_role("button", name="Reset").click()
    page.get_by_label("Question type").select_option(HOSTILE)
    assert_shown(page, lambda group, e: e.question_type == HOSTILE)


def test_scores_are_filtered_by_their_exact_value_with_both_ends(open_page):
    page = open_page()
    page.get_by_label("Score from").fill("0.25")
    assert_shown(page, lambda group, e: e.score >= 0.25)
    page.get_by_label("to", exact=True).fill("0.5")
    assert_shown(page, lambda group, e: 0.25 <= e.score <= 0.5)
    page.get_by_label("Score from").fill("0")
    page.get_by_label("to", exact=True).fill("0")
    assert_shown(page, lambda group, e: e.score == 0)


def test_all_words_must_occur_in_the_texts_of_an_example(open_page):
    page = open_page()
    words = page.get_by_label("Words")
    words.fill("RED 7")
    words.press("Enter")
    assert_shown(page, lambda group, e: e.kind == "caption" and "7" in f"{e.image_id}")
    words.fill("000000000033")
    assert_shown(page, lambda group, e: e.image_id == 33)
    words.fill("unique3")
    assert_shown(page, lambda group, e: e.prediction.endswith("unique3"))
    words.fill("a dog that is red")
    assert_shown(page, lambda group, e: e.kind != "answer")
    words.fill('" onfocus=window.hacked=1')
    assert_shown(page, lambda group, e: e.kind == "answer" or e.image_id == 201)


def test_a_filter_without_matches_can_be_reset(open_page):
    page = open_page()
    first = count(page)
    page.get_by_label("Words").fill("no such words")
    assert_shown(page, lambda group, e: False)
    page.get_by_role("button", name="Show all examples again").click()
    expect(page.locator("#nothing")).to_be_hidden()
    expect(page.locator("#examples [role=status]")).to_have_text(first)
    assert page.get_by_label("Words").input_value() == ""


def test_without_script_all_examples_are_shown_and_no_filter(open_page):
    page = open_page(java_script_enabled=False)
    assert shown(page) == set(CHOSEN)
    assert page.locator("form, .more, #nothing").locator("visible=true").count() == 0


def test_the_keyboard_reaches_filter_details_and_tables(open_page):
    page = open_page()
    reached = set()
    name = "(e => e.name || e.tagName + '.' + e.className)(document.activeElement)"
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate(name))
        seen = page.evaluate("(e => getComputedStyle(e).outlineStyle)(document.activeElement)")
        assert seen != "none", "the place of the keyboard can be seen"
    wanted = {"words", "kind", "group", "split", "type", "low", "high", "A.skip", "A.", "SUMMARY."}
    assert wanted <= reached
    page.locator(".example summary:visible").first.focus()
    page.keyboard.press("Enter")
    assert page.locator(".example details[open] li").first.is_visible()
    assert page.locator(".scroll").first.get_attribute("tabindex") == "0"


def test_hostile_words_are_shown_as_they_are_and_run_nothing(open_page):
    page = open_page()
    page.get_by_label("Kind").select_option("answer")
    card = page.locator(".example:visible").first
    texts = card.locator(".text").evaluate_all("all => all.map(e => e.textContent)")
    assert sum(text == HOSTILE for text in texts) == 4, "question, two targets, wrong image"
    assert any(text.startswith(f"{HOSTILE} unique") for text in texts)
    assert page.evaluate("window.hacked") is None
    assert page.locator("img[src=x]").count() == 0
    assert page.locator("script").count() == 1


HOLDERS = """[...document.querySelectorAll(".example *, th *, li *")].filter((e) =>
    [...e.childNodes].some((n) => n.nodeType === Node.TEXT_NODE && n.data.includes("\\u202e"))
).map((e) => [e.dir, getComputedStyle(e).unicodeBidi])"""


def test_words_from_right_to_left_do_not_turn_what_is_around_them(open_page):
    holders = open_page().evaluate(HOLDERS)
    assert len(holders) > 100
    assert {direction for direction, _ in holders} == {"auto"}
    assert {isolation for _, isolation in holders} <= {"isolate", "plaintext"}


def test_a_script_that_got_in_would_not_run(browser, address):
    with visited(browser, address) as visit:
        visit.page.evaluate(
            """() => {
                const image = document.createElement("div");
                image.innerHTML = "<img src=x onerror='window.hacked = 1'>";
                const script = document.createElement("script");
                script.textContent = "window.hacked = 1";
                document.body.append(image, script);
            }"""
        )
        visit.page.wait_for_timeout(200)
        assert visit.page.evaluate("window.hacked") is None
        assert any("Content Security Policy" in text for text in visit.complaints)


CONTRASTS = """() => {
    const channels = (color) => color.match(/[\\d.]+/g).map(Number);
    const light = (color) => {
        const linear = channels(color).slice(0, 3).map((value) => {
            const share = value / 255;
            return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
        });
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
    };
    const behind = (element) => {
        for (let e = element; e; e = e.parentElement) {
            const color = getComputedStyle(e).backgroundColor;
            const alpha = channels(color)[3];
            if (alpha === undefined || alpha === 1) return color;
        }
        return "rgb(255, 255, 255)";
    };
    const written = [...document.body.querySelectorAll("*")].filter((e) =>
        e.getClientRects().length && !["SCRIPT", "STYLE", "OPTION", "title"].includes(e.tagName) &&
        [...e.childNodes].some((n) => n.nodeType === Node.TEXT_NODE && n.data.trim()));
    return written.map((e) => {
        const color = getComputedStyle(e)[e instanceof SVGElement ? "fill" : "color"];
        const pair = [light(color), light(behind(e))].sort((a, b) => b - a);
        const name = `${e.tagName}.${e.getAttribute("class") || ""}`;
        return [(pair[0] + 0.05) / (pair[1] + 0.05), name];
    });
}"""


def test_all_text_has_contrast_in_light_and_dark(open_page):
    pages = {}
    for scheme in ("light", "dark"):
        page = open_page(color_scheme=scheme)
        found = page.evaluate(CONTRASTS)
        assert len(found) > 200
        assert [(ratio, name) for ratio, name in found if ratio < 4.5] == []
        pages[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert pages["light"] != pages["dark"]


def test_an_empty_page_opens_without_errors(browser, tmp_path):
    path = tmp_path / "index.html"
    path.write_text(render_report(**EMPTY_PAGE), encoding="utf-8")
    with visited(browser, path.as_uri(), width=390) as visit:
        assert visit.page.evaluate("document.documentElement.scrollWidth") == 390
        assert visit.complaints == []
