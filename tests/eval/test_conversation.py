"""What stands behind the page: a host, asked without a browser."""

import threading
from itertools import pairwise

import pytest

from eval.ask import answer
from eval.conversation import Host
from eval.trained import load_run
from eval.vision import Vision
from tests.eval.seeing import LIMITS, make_seeing_world
from tests.pipeline.conftest import draw_jpeg


@pytest.fixture(scope="module")
def seeing(tmp_path_factory, phi_dir):
    return make_seeing_world(tmp_path_factory.mktemp("seeing"), phi_dir)


@pytest.fixture(autouse=True)
def _in_folder(seeing, monkeypatch):
    monkeypatch.chdir(seeing.workspace.root)


@pytest.fixture(scope="module")
def trained(seeing):
    return load_run(seeing.workspace.root / "runs/finetune")


@pytest.fixture(scope="module")
def host(trained):
    return Host(trained, Vision(trained))


@pytest.fixture
def conversation(host, tmp_path):
    path = tmp_path / "1.jpg"
    path.write_bytes(draw_jpeg(1))
    return host.begin({"path": str(path)})[1]


def test_a_reply_grows_and_is_the_answer(host, seeing, conversation):
    seen = list(host.reply("where", conversation, 0, LIMITS["answer_tokens"]))
    texts = [messages[-1]["content"] for messages, _, _ in seen]
    pieces = answer(
        host.trained, seeing.store.gather([1])[0], "where", max_tokens=LIMITS["answer_tokens"]
    )
    text = "".join(pieces)
    assert len(set(texts)) > 3
    assert all(longer.startswith(shorter) for shorter, longer in pairwise(texts[1:]))
    assert texts[-1] == text
    assert [after.turns for _, _, after in seen] == [()] * (len(seen) - 1) + [(("where", text),)]


def test_a_temperature_draws_anew_each_time(host, conversation):
    drawn = [list(host.reply("where", conversation, 2.0, 30))[-1][0] for _ in range(4)]
    assert len({str(messages) for messages in drawn}) > 1


def streaming_threads():
    return [t for t in threading.enumerate() if t.name.startswith("stream")]


def test_a_reply_that_is_left_ends_the_thread_of_its_generation(host, conversation):
    replies = host.reply("where", conversation, 0, 200)
    for _ in range(3):
        next(replies)
    assert streaming_threads()
    replies.close()
    assert not streaming_threads()


def test_closing_ends_the_answer_that_is_being_made(trained, conversation):
    closing = Host(trained, None)
    replies = closing.reply("where", conversation, 0, 200)
    for _ in range(3):
        messages, _, _ = next(replies)
    closing.close()
    assert [shown for shown, _, _ in replies] == [messages]
    assert not streaming_threads()
