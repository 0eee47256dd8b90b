"""The page in a browser, served by a process of its own; and what stands behind it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import expect

from eval.ask import answer
from eval.showcase import validation_pictures
from eval.trained import load_run
from tests.browser import visited
from tests.eval.seeing import LIMITS, VAL, make_seeing_world
from tests.pipeline.conftest import draw_jpeg

ROOT = Path(__file__).parents[2]
SECONDS = 60
TOLERATED = ["Method not implemented."]
"""What Gradio's own scripts warn of."""


@pytest.fixture(scope="module")
def seeing(tmp_path_factory, phi_dir):
    return make_seeing_world(tmp_path_factory.mktemp("seeing"), phi_dir)


@pytest.fixture(scope="module")
def root(seeing):
    return seeing.workspace.root


expect.set_options(timeout=SECONDS * 1000)


@pytest.fixture(autouse=True)
def _in_folder(root, monkeypatch):
    monkeypatch.chdir(root)


@pytest.fixture(scope="module")
def trained(root):
    return load_run(root / "runs/finetune")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def serving(root, *arguments):
    """Serve as the command does, with a proxy that nobody may ask; yield process and address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "eval.serve", *map(str, arguments)],
        cwd=root,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(root)}
        | {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        said = process.stdout.readline()
        assert said.startswith("serve: "), process.stderr.read() if not said else said
        yield process, said.removeprefix("serve: ").strip()
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def address(root):
    with serving(root, "--run", "runs/finetune", "--port", free_port()) as (_, address):
        yield address


@pytest.fixture
def page(browser, address):
    """The page; at the end, it has asked this server alone and complained of nothing."""
    with visited(browser, address) as visit:
        visit.page.set_default_timeout(SECONDS * 1000)
        yield visit.page
        assert visit.requests
        assert [url for url in visit.requests if not url.startswith((address, "blob:"))] == []
        assert [text for text in visit.complaints if text not in TOLERATED] == []


def choose(page, path):
    """Upload a picture, and wait until it is shown."""
    page.set_input_files("input[type=file]", path)
    expect(page.get_by_label("Remove Image")).to_be_visible()


def ask(page, question):
    page.get_by_label("Question").fill(question)
    page.get_by_role("button", name="Ask").click()


def said(page, role):
    return page.get_by_test_id(role)


@pytest.fixture
def pictures(tmp_path):
    """Files of some pictures, by number."""
    paths = {number: tmp_path / f"{number}.jpg" for number in (1, 2, 3)}
    for number, path in paths.items():
        path.write_bytes(draw_jpeg(number))
    return paths


@pytest.fixture
def wanted(trained, seeing):
    """What the run says of an image in a conversation, greedily."""

    def wanted(image_id, *questions):
        turns = []
        for question in questions:
            pieces = answer(
                trained, seeing.store.gather([image_id])[0], question, turns=turns,
                max_tokens=LIMITS["answer_tokens"],
            )  # fmt: skip
            turns.append((question, "".join(pieces)))
        return [text for _, text in turns]

    return wanted


def test_a_picture_is_uploaded_and_asked_about_in_turns(page, pictures, wanted):
    choose(page, pictures[1])
    questions = ["where", "how many", "What is on the dog"]
    for question in questions:
        texts = wanted(1, *questions[: questions.index(question) + 1])
        ask(page, question)
        expect(said(page, "bot")).to_have_text(texts)
        expect(page.get_by_label("Question")).to_have_value("")
    expect(said(page, "user")).to_have_text(questions)
    assert texts[-1] != wanted(1, questions[-1])[0], "the turns before matter"


def test_a_new_picture_begins_a_new_conversation(page, pictures, wanted):
    choose(page, pictures[1])
    ask(page, "where")
    expect(said(page, "bot")).to_have_text(wanted(1, "where"))
    page.get_by_label("Remove Image").click()
    expect(said(page, "bot")).to_have_count(0)
    choose(page, pictures[2])
    ask(page, "how many")
    expect(said(page, "bot")).to_have_text(wanted(2, "how many"))


def test_what_was_said_can_be_forgotten(page, pictures, wanted):
    choose(page, pictures[1])
    ask(page, "where")
    expect(said(page, "bot")).to_have_text(wanted(1, "where"))
    page.get_by_label("Clear", exact=True).click()
    expect(said(page, "bot")).to_have_count(0)
    ask(page, "how many")
    expect(said(page, "bot")).to_have_text(wanted(1, "how many"))


def test_without_a_question_it_captions(page, pictures, wanted):
    choose(page, pictures[3])
    page.get_by_role("button", name="Ask").click()
    question = LIMITS["caption_question"]
    expect(said(page, "bot")).to_have_text(wanted(3, question))
    expect(said(page, "user")).to_have_text([question])


def test_the_validation_pictures_can_be_clicked(page, wanted):
    thumbnails = page.locator(".gallery img")
    expect(thumbnails).to_have_count(len(VAL))
    thumbnails.first.click()
    expect(page.get_by_label("Remove Image")).to_be_visible()
    ask(page, "where")
    expect(said(page, "bot")).to_have_text(wanted(VAL[0], "where"))


def test_the_answer_arrives_word_by_word(page, pictures, wanted):
    choose(page, pictures[1])
    page.get_by_role("button", name="More").click()
    page.get_by_label(re.compile("number input.*Longest answer")).fill("200")
    page.keyboard.press("Tab")
    page.evaluate(
        """() => {
            window.seen = new Set();
            const watch = () => {
                const all = document.querySelectorAll("[data-testid=bot]");
                if (all.length) window.seen.add(all[all.length - 1].innerText);
                requestAnimationFrame(watch);
            };
            watch();
        }"""
    )
    ask(page, "where")
    (start,) = wanted(1, "where")
    expect(said(page, "bot")).to_have_text(re.compile(rf"{start}.{{300}}"))
    lengths = sorted(len(text) for text in page.evaluate("[...window.seen]"))
    assert len(lengths) > 3, "it was seen while it grew"
