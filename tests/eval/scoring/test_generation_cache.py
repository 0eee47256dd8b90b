import json

import pytest

from eval.scoring.generation_cache import FOLDER, cached
from train.model.generate import Generation

TEXTS = [Generation("a red cat", 3, True), Generation("half \ud800", 2, False)]
CACHE_KEY = {"model": "m", "questions": ["", "What"]}


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def path():
    """The file of the texts, which are kept."""
    assert cached(CACHE_KEY, lambda: list(TEXTS)) == TEXTS
    (found,) = FOLDER.iterdir()
    return found


def test_texts_are_made_once(path):
    assert cached(CACHE_KEY, lambda: pytest.fail("made again")) == TEXTS


def changed(path, change):
    content = json.loads(path.read_bytes())
    change(content)
    return json.dumps(content).encode()


DAMAGE = {
    "cut": lambda path: path.read_bytes()[:-9],
    "empty": lambda path: b"",
    "no text": lambda path: b"\xff\xfe",
    "deep": lambda path: b"[" * 10**5,
    "huge number": lambda path: b"9" * 10**5,
    "no number": lambda path: b"NaN",
    "a list": lambda path: b"[]",
    "a bare list of texts": lambda path: changed(path, lambda c: c).replace(b"sha256", b"other"),
    "another text": lambda path: changed(path, lambda c: c["texts"][0].update(text="a dog")),
    "another key": lambda path: changed(path, lambda c: c["texts"][0].update(tpyo=1)),
    "no texts": lambda path: changed(path, lambda c: c.update(texts=None)),
    "one text less": lambda path: changed(path, lambda c: c["texts"].pop()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_texts_are_named_and_made_again(path, damage, capsys):
    path.write_bytes(DAMAGE[damage](path))
    assert cached(CACHE_KEY, lambda: list(TEXTS)) == TEXTS
    said = capsys.readouterr().err
    assert said.startswith(f"{path}: damaged (")
    assert said.endswith("); making the texts again\n")
    assert said.count("\n") == 1
    assert cached(CACHE_KEY, lambda: pytest.fail("made again")) == TEXTS


def test_texts_of_other_questions_are_not_believed(path, capsys):
    content = json.loads(path.read_bytes())
    cached(CACHE_KEY | {"questions": [""]}, lambda: TEXTS[:1])
    (other,) = set(FOLDER.iterdir()) - {path}
    other.write_text(json.dumps(content))
    assert cached(CACHE_KEY | {"questions": [""]}, lambda: TEXTS[:1]) == TEXTS[:1]
    assert "wanted 1 texts, found 2" in capsys.readouterr().err


def test_a_failing_disk_is_no_damage(path, monkeypatch):
    def failing(*arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(type(path), "read_bytes", failing)
    with pytest.raises(OSError, match="Input/output error"):
        cached(CACHE_KEY, lambda: pytest.fail("made again"))
