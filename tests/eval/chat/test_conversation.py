"""The page's event handlers, called without a browser."""

import threading
from itertools import pairwise
from types import SimpleNamespace

import pytest

from eval.chat.answering import stream_answer
from eval.chat.conversation import ChatHandlers
from eval.chat.encoder import RunEncoder
from eval.runs import load_run, open_run
from eval.server.pictures import PagePictures
from eval.server.sessions import session_of
from tests.eval.picture_world import LIMITS, make_picture_world
from tests.pipeline.conftest import draw_jpeg


@pytest.fixture(scope="module")
def picture_world(tmp_path_factory, phi_dir):
    return make_picture_world(tmp_path_factory.mktemp("picture_world"), phi_dir)


@pytest.fixture(autouse=True)
def _in_folder(picture_world, monkeypatch):
    monkeypatch.chdir(picture_world.workspace.root)


@pytest.fixture(scope="module")
def trained(picture_world):
    return load_run(open_run(picture_world.workspace.root / "runs/finetune"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return PagePictures(tmp_path_factory.mktemp("serve") / "uploads")


@pytest.fixture(scope="module")
def handlers(trained, pictures):
    return ChatHandlers(trained, RunEncoder(trained), pictures)


MINE = SimpleNamespace(session_hash=session_of("me", "s"))
OTHER = SimpleNamespace(session_hash=session_of("another", "s"))


@pytest.fixture
def conversation(handlers, pictures):
    path = pictures.add_upload("1.jpg", draw_jpeg(1), "me")
    return handlers.choose_picture({"path": path}, MINE)[1]


def test_a_reply_grows_into_the_answer(handlers, picture_world, conversation):
    seen = list(handlers.reply("where", conversation, 0, LIMITS["answer_tokens"]))
    texts = [messages[-1]["content"] for messages, _, _ in seen]
    pieces = stream_answer(
        handlers.trained,
        picture_world.store.gather([1])[0],
        "where",
        max_tokens=LIMITS["answer_tokens"],
    )
    text = "".join(pieces)
    assert len(set(texts)) > 3
    assert all(longer.startswith(shorter) for shorter, longer in pairwise(texts[1:]))
    assert texts[-1] == text
    assert [after.turns for _, _, after in seen] == [()] * (len(seen) - 1) + [(("where", text),)]


def test_sampled_replies_differ(handlers, conversation):
    drawn = [list(handlers.reply("where", conversation, 2.0, 30))[-1][0] for _ in range(4)]
    assert len({str(messages) for messages in drawn}) > 1


def streaming_threads():
    return [t for t in threading.enumerate() if t.name.startswith("stream")]


def test_closing_a_reply_ends_its_generation_thread(handlers, conversation):
    replies = handlers.reply("where", conversation, 0, 200)
    for _ in range(3):
        next(replies)
    assert streaming_threads()
    replies.close()
    assert not streaming_threads()


def test_closing_the_handlers_ends_the_current_answer(trained, conversation):
    closing = ChatHandlers(trained, None, None)
    replies = closing.reply("where", conversation, 0, 200)
    for _ in range(3):
        messages, _, _ = next(replies)
    closing.close()
    assert [shown for shown, _, _ in replies] == [messages]
    assert not streaming_threads()


@pytest.fixture
def warnings(monkeypatch):
    """Warnings that the page shows."""
    shown = []
    monkeypatch.setattr("eval.chat.conversation.gr.Warning", lambda text, **_: shown.append(text))
    return shown


def test_another_visitors_picture_is_like_a_missing_one(handlers, pictures, warnings, tmp_path):
    theirs = pictures.add_upload("1.jpg", draw_jpeg(1), "me")
    outside = tmp_path / "1.jpg"
    outside.write_bytes(draw_jpeg(1))
    for path in (theirs, str(outside), str(tmp_path), str(tmp_path / "missing.jpg"), ""):
        assert handlers.choose_picture({"path": path}, OTHER) == (None, None, [])
    assert len(warnings) == 5
    assert len(set(warnings)) == 1
    assert handlers.choose_picture({"path": theirs}, MINE)[1] is not None


def test_the_error_of_an_upload_names_the_file_without_its_path(handlers, pictures, warnings):
    path = pictures.add_upload("C:\\photos\\mine.jpg", draw_jpeg(1)[:300], "me")
    assert handlers.choose_picture({"path": path}, MINE) == (None, None, [])
    assert warnings[0].startswith("mine.jpg: not a readable picture: ")
    assert "/" not in warnings[0]
