"""The served page in a browser; the server has its own process."""

import os
import re
import signal
import socket
import struct
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import expect

from cache.files.scratch import LOCK, PREFIX
from eval.chat.answering import stream_answer
from eval.runs import load_run, open_run
from tests.browser import visited
from tests.eval.picture_world import LIMITS, VAL, make_picture_world
from tests.pipeline.conftest import draw_jpeg

pytestmark = pytest.mark.slow("starts the served page and a browser")

ROOT = Path(__file__).parents[2]
SECONDS = 60
TOLERATED = ["Method not implemented."]
"""Warnings of Gradio's own scripts."""
LISTENING = "0A"
"""State of a socket in the kernel's tables."""


@pytest.fixture(scope="module")
def picture_world(tmp_path_factory, phi_dir):
    return make_picture_world(tmp_path_factory.mktemp("picture_world"), phi_dir)


@pytest.fixture(scope="module")
def root(picture_world):
    return picture_world.workspace.root


expect.set_options(timeout=SECONDS * 1000)


@pytest.fixture(autouse=True)
def _in_folder(root, monkeypatch):
    monkeypatch.chdir(root)


@pytest.fixture(scope="module")
def trained(root):
    return load_run(open_run(root / "runs/finetune"))


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def serving(root, *arguments, uploads):
    """Run the command behind a proxy that does not exist; yield process and address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "eval.serve", *map(str, arguments)],
        cwd=root,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(uploads)}
        | {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        said = process.stdout.readline()
        assert said.startswith("serve: "), said or process.stderr.read()
        yield process, said.removeprefix("serve: ").strip()
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def address(root, tmp_path_factory):
    arguments = ["--run", "runs/finetune", "--port", free_port()]
    uploads = tmp_path_factory.mktemp("uploads")
    with serving(root, *arguments, uploads=uploads) as (process, address):
        yield address
        process.terminate()
        out, errors = process.communicate(timeout=SECONDS)
    assert (process.returncode, out) == (0, "")
    assert "Traceback" not in errors
    assert list(uploads.iterdir()) == []


@pytest.fixture
def page(browser, address):
    """The page; it may request only this server, and may not log an error."""
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
def wanted(trained, picture_world):
    """The run's greedy answers to some questions about an image."""

    def wanted(image_id, *questions):
        turns = []
        for question in questions:
            pieces = stream_answer(
                trained, picture_world.store.gather([image_id])[0], question, turns=turns,
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


def test_a_conversation_can_be_cleared(page, pictures, wanted):
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
    page.get_by_role("button", name="More settings").click()
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


# What it refuses


def complaint(page):
    return page.get_by_test_id("toast-body").last


@pytest.mark.parametrize("size", [19, 300], ids=["text", "cut short"])
def test_an_unreadable_picture_is_refused_and_ends_the_conversation(page, pictures, tmp_path, size):
    choose(page, pictures[1])
    ask(page, "where")
    expect(said(page, "bot")).to_have_count(1)
    page.get_by_label("Remove Image").click()
    path = tmp_path / "<img src=x onerror=alert(1)>.png"
    path.write_bytes(b"no picture <b>at all"[:size] if size < 20 else draw_jpeg(2)[:size])
    page.set_input_files("input[type=file]", path)
    expect(complaint(page)).to_contain_text("not a readable picture: ")
    assert complaint(page).locator("b, img").count() == 0
    expect(page.get_by_label("Remove Image")).to_have_count(0)
    ask(page, "where")
    expect(complaint(page)).to_contain_text("Choose a picture first.")
    expect(page.get_by_label("Question")).to_have_value("where")
    expect(said(page, "bot")).to_have_count(0)


def test_a_question_too_long_for_the_model_is_refused_and_kept(page, pictures):
    choose(page, pictures[1])
    ask(page, "x" * 999)
    expect(complaint(page)).to_contain_text("Ask something shorter")
    expect(page.get_by_label("Question")).to_have_value("x" * 999)
    ask(page, "where")
    expect(said(page, "bot")).to_have_count(1)


def test_a_file_too_large_is_not_taken(page, address):
    file = {"name": "large.jpg", "mimeType": "image/jpeg", "buffer": bytes(11 * 2**20)}
    refused = page.request.post(f"{address}gradio_api/upload", multipart={"files": file})
    assert refused.status == 413
    small = file | {"buffer": bytes(9 * 2**20)}
    assert page.request.post(f"{address}gradio_api/upload", multipart={"files": small}).ok


def test_files_of_this_machine_are_not_handed_out(page, address, root):
    for path in (root / "params.yaml", "/etc/passwd", root / "runs/finetune/projector.safetensors"):
        assert page.request.get(f"{address}gradio_api/file={path}").status == 403


def test_the_api_documentation_is_empty(page, address):
    assert page.request.get(f"{address}gradio_api/info").json() == {
        "named_endpoints": {},
        "unnamed_endpoints": {},
    }


def test_only_this_machine_can_reach_it(address):
    port = int(address.rstrip("/").rsplit(":", 1)[1])
    assert listening_at(port) == ["127.0.0.1"]


def listening_at(port):
    """Addresses at which some process of this machine listens on a port."""
    found = []
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        path = Path("/proc/net") / table
        # Without IPv6 there is no tcp6.
        lines = path.read_text().splitlines()[1:] if path.exists() else []
        for _, local, _, state, *_ in map(str.split, lines):
            address, local_port = local.split(":")
            if (state, int(local_port, 16)) == (LISTENING, port):
                found.append(socket.inet_ntop(family, in_network_order(address)))
    return found


def in_network_order(address):
    """The kernel writes an address as numbers of 32 bits in the machine's own order."""
    words = struct.unpack(f">{len(address) // 8}I", bytes.fromhex(address))
    return struct.pack(f"={len(words)}I", *words)


def test_the_page_has_room_on_a_phone(browser, address):
    with visited(browser, address, width=390) as visit:
        expect(visit.page.get_by_role("button", name="Ask")).to_be_visible()
        assert visit.page.evaluate("document.documentElement.scrollWidth") == 390


# How it ends, and other runs


def test_a_run_of_stage_1_captions_and_ctrl_c_ends_it(
    browser, root, picture_world, pictures, tmp_path
):
    stage_1 = load_run(open_run(root / "runs/pretrain"))
    wanted = "".join(stream_answer(stage_1, picture_world.store.gather([1])[0], ""))
    arguments = ["--run", "runs/pretrain", "--port", free_port()]
    uploads = tmp_path / "uploads"
    # What a killed server left behind.
    (uploads / f"{PREFIX}killed/uploads").mkdir(parents=True)
    (uploads / f"{PREFIX}killed" / LOCK).touch()
    with (
        serving(root, *arguments, uploads=uploads) as (process, address),
        visited(browser, address) as visit,
    ):
        choose(visit.page, pictures[1])
        expect(visit.page.get_by_label("Question")).to_have_count(0)
        for count in (1, 2):
            visit.page.get_by_role("button", name="Caption").click()
            expect(said(visit.page, "bot")).to_have_text([wanted] * count)
        assert said(visit.page, "user").count() == 0
        # The page is still open.
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "")
    assert "error" not in errors
    assert "Traceback" not in errors
    assert list(uploads.iterdir()) == []


def test_a_taken_port_is_an_error_in_one_line(root):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        code, errors = failing(root, "--run", "runs/finetune", "--port", port)
    assert code == 1
    assert re.fullmatch(rf"error: cannot serve at 127\.0\.0\.1:{port}: .* --port\.", errors)


def test_another_tower_than_the_runs_is_refused_at_the_start(root, picture_world, tmp_path):
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", root / "runs/finetune", copy], check=True)
    (copy / "params.yaml").write_text(picture_world.params(encoder={"layer": -1}).text)
    picture_world.params()
    code, errors = failing(root, "--run", copy)
    assert code == 1
    assert "gives features of fingerprint" in errors


def failing(root, *arguments):
    """Call the command, and return its exit code and last line of errors."""
    done = subprocess.run(
        [sys.executable, "-m", "eval.serve", *map(str, arguments)],
        cwd=root, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=SECONDS,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr.splitlines()[-1]


def test_nothing_is_written_beside_the_code():
    """Gradio writes a stub file beside a module that has a component of its own."""
    assert list((ROOT / "eval").glob("*.py"))
    assert not list((ROOT / "eval").glob("*.pyi"))
