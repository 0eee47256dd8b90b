"""What `python -m eval.score` prints, with a stand-in for Java wherever one is needed."""

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
from pathlib import Path

import pytest
from pycocoevalcap.spice import spice

from cache.errors import SettingsError
from eval.metrics import caption_measures, score_captions
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
    """The rows of the table of official scores, by name."""
    lines = output.splitlines()
    start = next(n for n, line in enumerate(lines) if "official" in line)
    return {line.split()[0]: line.split()[1:] for line in lines[start:]}


def columns(output):
    """The cells of each system's row, by column, and the cells beneath it."""
    lines = output.splitlines()[1:]
    _, *names = [lines[0].strip().split()[0], *lines[0].split()[1:]]
    rows = {}
    for number, line in enumerate(lines):
        found = re.match(r"(\S.*?) +(\d+) +(\d.*)", line)
        if found and "[" not in line:
            beneath = re.findall(r"\[.*?\]", lines[number + 1])
            rows[found[1]] = {
                name: (float(value), ends)
                for name, value, ends in zip(names, found[3].split(), beneath, strict=True)
            }
    return rows


def test_the_scores_are_those_of_the_metrics_times_100(capsys, captions, results):
    score(captions, [str(results)], official=False)
    output = capsys.readouterr().out
    assert output.startswith("captions of 3 images, 6 by people. Scores are times 100")
    found = columns(output)["results"]
    wanted = score_captions(REFERENCES, RESULTS)
    assert found.keys() == wanted.keys() | {"words"}
    for name, value in wanted.items():
        assert found[name][0] == pytest.approx(100 * value, abs=0.005)
    assert found["words"][0] == pytest.approx((6 + 2 + 7) / 3, abs=0.005)


def test_the_brackets_are_the_intervals_of_the_measures(capsys, captions, results):
    score(captions, [str(results)], official=False)
    cells = columns(capsys.readouterr().out)["results"]
    for name, measure in caption_measures(REFERENCES, RESULTS).items():
        low, high = measure.interval([2, 5, 7], 0)
        assert cells[name][1] == f"[{100 * low:.1f}, {100 * high:.1f}]"


def test_ids_of_any_size_are_images_of_their_own(tmp_path, capsys):
    outputs = []
    for ids in [(1, 2, 3), (-1, 2**63, 2**63 + 1)]:
        texts = dict(zip(ids, REFERENCES.values(), strict=True))
        captions = captions_file(tmp_path / "captions.json", texts)
        said = dict(zip(ids, ["a cat", "two red boats on the lake", "a man"], strict=True))
        score(captions, [str(results_file(tmp_path / "results.json", said))], official=False)
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_further_systems_are_compared_with_the_first_text_by_text(tmp_path, capsys, captions):
    first = results_file(tmp_path / "first.json")
    second = results_file(tmp_path / "second.json", {i: c[0] for i, c in REFERENCES.items()})
    score(captions, [f"them={first}", str(second)], official=False)
    lines = capsys.readouterr().out.splitlines()
    (at,) = [n for n, line in enumerate(lines) if line.startswith("  less them ")]
    measures = [
        caption_measures(REFERENCES, texts)["BLEU-1"]
        for texts in (RESULTS, {i: c[0] for i, c in REFERENCES.items()})
    ]
    gain = measures[1].gain_over(measures[0], [2, 5, 7], 0)
    column = lines[1].split().index("BLEU-1") - 1
    assert lines[at].split()[2:][column] == f"{100 * gain.gain:+.2f}"
    low, high = gain.interval
    ends = re.findall(r"\[.*?\]", lines[at + 1])[column]
    assert ends == f"[{100 * low:+.1f}, {100 * high:+.1f}]"
    assert re.findall(r"p (?:< )?[\d.]+", lines[at + 2])[column] == gain.p_text


def test_images_without_a_caption_are_counted_and_named(tmp_path, capsys, captions, results):
    some = results_file(tmp_path / "some.json", {i: RESULTS[i] for i in (2, 7)})
    score(captions, [str(results), str(some)], official=False)
    output = capsys.readouterr().out
    assert "note: some: scored on 2 of 3 images; without a text: 5\n" in output
    assert "because results has texts for other images\n" in output
    assert "less" not in output
    wanted = score_captions({i: REFERENCES[i] for i in (2, 7)}, {i: RESULTS[i] for i in (2, 7)})
    assert columns(output)["some"]["CIDEr"][0] == pytest.approx(100 * wanted["CIDEr"], abs=0.005)


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        ([2, 5, 7, 8, 9], r"captions images that .*captions\.json has no captions of: 8, 9"),
        ([], r"captions none of the 3 images of .*captions\.json"),
    ],
)
def test_results_for_other_images_are_refused(tmp_path, captions, ids, named):
    results = results_file(tmp_path / "results.json", dict.fromkeys(ids, "a cat"))
    with pytest.raises(StageError, match=rf"results\.json: {named}"):
        score(captions, [str(results)], official=False)


def test_two_captions_of_an_image_are_refused(tmp_path, captions):
    entries = [{"image_id": i, "caption": "a cat"} for i in (2, 5, 7, 5)]
    results = write(tmp_path / "results.json", entries)
    with pytest.raises(StageError, match=r"results\.json: image 5 has two captions, wanted one"):
        score(captions, [str(results)], official=False)


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
        score(captions, [str(results)], official=False)
    # The same of the captions, whose list stands under a key.
    wrapped = content.replace(b"[", b'{"annotations": [', 1) + b"}" * content.startswith(b"[")
    captions.write_bytes(wrapped)
    with pytest.raises(StageError, match=rf"captions\.json: (annotations)?{reason}"):
        score(captions, [str(results)], official=False)


def test_official_programs_stand_beside_ours(capsys, captions, results, java):
    with pytest.raises(StageError, match="cannot compute SPICE"):
        score(captions, [str(results)], official=True)
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
        score(captions, [str(results)], official=True)


def test_a_spice_that_fails_is_said_to_have_failed(captions, results, java, monkeypatch):
    def fail(self, wanted, found):
        raise subprocess.CalledProcessError(7, "java")

    monkeypatch.setattr(spice, "get_stanford_models", lambda: None)
    monkeypatch.setattr(spice.Spice, "compute_score", fail)
    with pytest.raises(StageError, match=r"SPICE: its Java program ended with exit code 7"):
        score(captions, [str(results)], official=True)


def test_spice_is_of_the_same_images_as_the_rest(captions, results, java, monkeypatch, capsys):
    given = []

    def compute(self, wanted, found):
        given.append((wanted, found))
        return 0.25, []

    monkeypatch.setattr(spice, "get_stanford_models", lambda: None)
    monkeypatch.setattr(spice.Spice, "compute_score", compute)
    score(captions, [str(results)], official=True)
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
        score(captions, [str(results)], official=True)


def test_a_meteor_that_fails_is_said_to_be_missing(captions, results, java):
    java.write_text(JAVA.replace("for line in sys.stdin:", "for line in []:"))
    with pytest.raises(StageError, match=r"cannot compute METEOR, SPICE\. METEOR: "):
        score(captions, [str(results)], official=True)


def test_without_java_nothing_official_is_tried(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    wanted = (
        r"there is no `java` on PATH\. Install a Java runtime, 8 or newer .*default-jre-headless"
    )
    with pytest.raises(SettingsError, match=wanted):
        score(tmp_path / "none.json", ["none.json"], official=True)


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
