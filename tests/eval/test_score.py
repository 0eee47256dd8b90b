"""What `python -m eval.score` prints, with a stand-in for Java wherever one is needed."""

import json
import os
import shutil
import subprocess
import sys
import urllib.error
from pathlib import Path

import pytest
from pycocoevalcap.spice import spice

from cache.errors import SettingsError
from eval.metrics import score_captions
from eval.score import score
from eval.scoring.official import score_officially, tokenize
from eval.scoring.ptb_tokenizer import tokenize_caption
from workspace.errors import StageError

pytestmark = pytest.mark.slow("runs the official programs")

ROOT = Path(__file__).parents[2]

REFERENCES = {
    7: ["A brown dog runs over green grass", "The dog is running outside"],
    2: ["Two red boats lie on a quiet lake", "Boats on the water at dawn"],
    5: ["A man rides his old bicycle today", "Somebody pushes a bike"],
}
RESULTS = {2: "Two red boats on the water", 5: "a cat", 7: "a brown dog runs over green grass"}

JAVA = f"""#!{sys.executable}
# Stands in for Java. Its tokenizer ends a caption wherever the real one does, and its METEOR says 1
# where the caption is one of the references, else 0.
import sys
from pathlib import Path

if any("PTBTokenizer" in argument for argument in sys.argv):
    for line in Path(sys.argv[-1]).read_bytes().decode().splitlines():
        sys.stdout.buffer.write(line.lower().encode() + b"\\n")
elif any("meteor" in argument for argument in sys.argv):
    for line in sys.stdin:
        task, *rest = line.strip("\\n").split(" ||| ")
        if task == "SCORE":
            print(float(rest[-1] in rest[:-1]), flush=True)
        else:
            print(*rest, sum(map(float, rest)) / len(rest), sep="\\n", flush=True)
"""


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def captions_file(path, captions=REFERENCES):
    annotations = [
        {"id": number, "image_id": image_id, "caption": caption}
        for number, (image_id, caption) in enumerate(
            (image_id, caption) for image_id in captions for caption in captions[image_id]
        )
    ]
    # As in COCO's own files, captions of an image do not stand together.
    images = [{"id": image_id, "file_name": f"{image_id:012}.jpg"} for image_id in captions]
    return write(path, {"images": images, "annotations": annotations[::2] + annotations[1::2]})


def results_file(path, results=RESULTS):
    return write(path, [{"image_id": i, "caption": caption} for i, caption in results.items()])


@pytest.fixture
def captions(tmp_path):
    return captions_file(tmp_path / "captions.json")


@pytest.fixture
def results(tmp_path):
    return results_file(tmp_path / "results.json")


@pytest.fixture
def java(tmp_path, monkeypatch):
    """A stand-in for Java; nothing is fetched for SPICE."""
    program = tmp_path / "bin/java"
    program.parent.mkdir()
    program.write_text(JAVA)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)

    def fetch():
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(spice, "get_stanford_models", fetch)
    return program


def table(output):
    """The rows below the first line, by name."""
    return {line.split()[0]: line.split()[1:] for line in output.splitlines()[1:]}


def test_the_scores_are_those_of_the_metrics(capsys, captions, results):
    score(captions, results, official=False)
    output = capsys.readouterr().out
    assert output.startswith("3 captions against 6 by people\n")
    wanted = score_captions(REFERENCES, RESULTS)
    assert table(output) == {name: [f"{value:.6f}"] for name, value in wanted.items()}


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        ([2, 5], "missing 7, extra none"),
        ([2, 5, 7, 8, 9], "missing none, extra 8, 9"),
        ([], "missing 2, 5, 7"),
    ],
)
def test_results_for_other_images_are_named(tmp_path, captions, ids, named):
    results = results_file(tmp_path / "results.json", dict.fromkeys(ids, "a cat"))
    with pytest.raises(
        StageError, match=rf"results\.json does not fit .*captions\.json: .*{named}"
    ):
        score(captions, results, official=False)


def test_two_captions_of_an_image_are_refused(tmp_path, captions):
    entries = [{"image_id": i, "caption": "a cat"} for i in (2, 5, 7, 5)]
    results = write(tmp_path / "results.json", entries)
    with pytest.raises(StageError, match=r"results\.json: image 5 has two captions, wanted one"):
        score(captions, results, official=False)


ENTRY = {"image_id": 2, "caption": "a cat"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "no usable JSON"),
        (b"\xff\xfe", "no usable JSON in UTF-8"),
        (b'[{"image_id": NaN, "caption": "a"}]', "no usable JSON in UTF-8: NaN is no number"),
        (b"[" * 100_000, "no usable JSON"),
        (b"{}", "wanted COCO's format"),
        (b"[7]", r"\[0\]: wanted an object with a number 'image_id' and a text 'caption'"),
        (json.dumps([ENTRY, {"image_id": 5}]).encode(), r"\[1\]: wanted"),
        (json.dumps([ENTRY | {"image_id": "2"}]).encode(), r"\[0\]: wanted"),
        (json.dumps([ENTRY | {"image_id": True}]).encode(), r"\[0\]: wanted"),
        (json.dumps([ENTRY | {"caption": ["a"]}]).encode(), r"\[0\]: wanted"),
        (b'[{"image_id": 2, "caption": "\\ud800"}]', r"\[0\]: half a character"),
    ],
)
def test_a_file_in_another_layout_is_refused(tmp_path, captions, results, content, reason):
    results.write_bytes(content)
    with pytest.raises(StageError, match=rf"results\.json: {reason}"):
        score(captions, results, official=False)
    # The same of the captions, whose list stands under a key.
    wrapped = content.replace(b"[", b'{"annotations": [', 1) + b"}" * content.startswith(b"[")
    captions.write_bytes(wrapped)
    with pytest.raises(StageError, match=rf"captions\.json: (annotations)?{reason}"):
        score(captions, results, official=False)


def test_official_programs_stand_beside_ours(capsys, captions, results, java):
    with pytest.raises(StageError, match="cannot compute SPICE"):
        score(captions, results, official=True)
    rows = table(capsys.readouterr().out)
    assert rows.pop("ours") == ["official", "difference"]
    assert rows.pop("METEOR") == ["-", f"{1 / 3:.6f}", "-"]
    assert rows.pop("SPICE") == ["-", "-", "-"]
    # These captions have no punctuation, so that the stand-in's tokens are the real ones.
    for name, value in score_captions(REFERENCES, RESULTS).items():
        assert rows.pop(name) == [f"{value:.6f}", f"{value:.6f}", "+0.000000"]
    assert not rows


def test_why_there_is_no_spice_is_said_and_what_to_do(captions, results, java):
    wanted = (
        r"cannot compute SPICE\. SPICE: it needs Stanford CoreNLP, which cannot be fetched "
        r"\(<urlopen error no route to host>\)\. Put stanford-corenlp-3\.6\.0\.jar and .* into "
    )
    with pytest.raises(StageError, match=wanted):
        score(captions, results, official=True)


def test_a_spice_that_fails_is_said_to_have_failed(captions, results, java, monkeypatch):
    def fail(self, wanted, found):
        raise subprocess.CalledProcessError(7, "java")

    monkeypatch.setattr(spice, "get_stanford_models", lambda: None)
    monkeypatch.setattr(spice.Spice, "compute_score", fail)
    with pytest.raises(StageError, match=r"SPICE: its Java program ended with exit code 7"):
        score(captions, results, official=True)


def test_spice_is_of_the_same_images_as_the_rest(captions, results, java, monkeypatch, capsys):
    given = []

    def compute(self, wanted, found):
        given.append((wanted, found))
        return 0.25, []

    monkeypatch.setattr(spice, "get_stanford_models", lambda: None)
    monkeypatch.setattr(spice.Spice, "compute_score", compute)
    score(captions, results, official=True)
    assert table(capsys.readouterr().out)["SPICE"] == ["-", "0.250000", "-"]
    ((wanted, found),) = given
    assert found == {i: [RESULTS[i].lower()] for i in sorted(RESULTS)}
    assert {i: sorted(texts) for i, texts in wanted.items()} == {
        i: sorted(text.lower() for text in texts) for i, texts in REFERENCES.items()
    }


@pytest.mark.parametrize("space", list("\r\n\x0b\x0c\x1c\x85\u2028\u2029"))
def test_no_white_space_moves_captions_to_other_images(java, space):
    given = {1: [f"a{space}b", f"c{space}"], 2: [f"{space}d"], 3: ["", "e"]}
    assert tokenize(given) == {1: ["a b", "c"], 2: ["d"], 3: ["", "e"]}


def test_a_tokenizer_that_fails_gives_no_scores(captions, results, java):
    java.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(StageError, match="the official tokenizer returned 1 captions of 6"):
        score(captions, results, official=True)


def test_a_meteor_that_fails_is_said_to_be_missing(captions, results, java):
    java.write_text(JAVA.replace("for line in sys.stdin:", "for line in []:"))
    with pytest.raises(StageError, match=r"cannot compute METEOR, SPICE\. METEOR: "):
        score(captions, results, official=True)


def test_without_java_nothing_official_is_tried(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    wanted = (
        r"there is no `java` on PATH\. Install a Java runtime, 8 or newer .*default-jre-headless"
    )
    with pytest.raises(SettingsError, match=wanted):
        score(tmp_path / "none.json", tmp_path / "none.json", official=True)


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        (["captions.json", "results.json"], 0),
        (["captions.json", "nowhere.json"], 1),
        (["captions.json", "captions.json"], 1),
        (["captions.json", "results.json", "--official"], 2),
        (["captions.json"], 2),
    ],
)
def test_the_exit_code_says_how_it_ended(tmp_path, captions, results, arguments, exit_code):
    done = subprocess.run(
        [sys.executable, "-m", "eval.score", *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == exit_code
    assert bool(done.stdout) == (exit_code == 0)
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(shutil.which("java") is None, reason="there is no Java here")
def test_our_tokens_and_scores_are_those_of_the_java_programs(monkeypatch):
    monkeypatch.setattr(spice.Spice, "__init__", lambda self: None)
    monkeypatch.setattr(spice.Spice, "compute_score", lambda self, wanted, found: (0.0, []))
    references = {
        1: ["A man's dog isn't \u2014 \u201chappy\u201d!!!", "Dogs (two) & a café at 5\u00bd."],
        2: ["The U.S. flag, a 1,000-pound\u2026", "cannot\u2028wait; can't\rwait"],
        3: ["", "\U0001f600 #smile :) at it"],
    }
    candidates = {1: "a dog isn't happy", 2: "the flag can not wait", 3: ""}
    ours = score_captions(references, candidates)
    theirs = score_officially(references, candidates)
    assert not theirs.missing
    assert 0 < theirs.scores["METEOR"] < 1
    for name, value in ours.items():
        assert theirs.scores[name] == pytest.approx(value, abs=1e-9), name
    assert tokenize(references) == {
        i: [" ".join(tokenize_caption(text)) for text in texts] for i, texts in references.items()
    }
