"""Every figure in tables and prose of README and docs/ is that of a result file."""

import json
import re
from decimal import Decimal
from functools import cache
from itertools import takewhile

import pytest

from tests.documents.pages import PAGES, ROOT, all_blocks

TEXT = "\n".join(page.read_text() for page in PAGES)
PROSE = " ".join(TEXT.split())

LOOPS = {
    "ours": "ours",
    "ours: an image's captions behind one copy of its patches": "ours",
    "usual loop": "usual loop",
    "usual loop: a padded sequence a caption, all logits, features cached": "usual loop",
    "usual loop, texts of like length together": "usual loop, by length",
    "the same with CLIP at every step": "usual loop, with CLIP",
    "naive loop: CLIP, then a pass a token without cache, no EOS": "student's loop",
}


@cache
def result(name):
    return json.loads((ROOT / f"bench/results/{name}.json").read_text())


def table(text, heading):
    """The rows of the table whose first line has these words, without the two lines of its head."""
    lines = takewhile(lambda line: line.startswith("|"), text[text.index(heading) :].splitlines())
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines][2:]


def agrees(shown, value):
    """Whether a number is another one, rounded to the last digit shown that is not a zero before
    a comma.
    """
    number = Decimal(shown.replace(",", ""))
    place = number.as_tuple().exponent if "." in shown else number.normalize().as_tuple().exponent
    return abs(number - Decimal(repr(value))) <= Decimal(10) ** place / 2


@pytest.mark.parametrize(
    ("shown", "value", "fits"),
    [
        ("116,000", 115673.0, True),
        ("116,000", 116700.0, False),
        ("8.0", 8.01, True),
        ("8.0", 8.06, False),
        ("40", 39.89, True),
        ("0.81", 0.82, False),
    ],
)
def test_a_figure_is_compared_as_it_is_rounded(shown, value, fits):
    assert agrees(shown, value) is fits


@pytest.mark.parametrize(
    ("heading", "stage"), [("| captions of COCO", "pretrain"), ("| conversations of L", "finetune")]
)
def test_the_tables_of_steps_are_those_of_the_result_file(heading, stage):
    found = result("step")[stage]
    rows = table(TEXT, heading)
    assert {LOOPS[row[0]] for row in rows} < found["median"].keys() | {None}
    for label, rate, ratio, gigabytes in rows:
        loop = LOOPS[label]
        assert agrees(rate, found["median"][loop]), label
        assert not ratio or agrees(ratio, found["ours is so many times as fast"][loop]), label
        memory = found["memory_mib"][loop]
        assert agrees(gigabytes, (memory["peak"] - memory["before"]) * 2**20 / 1e9), label


def test_the_table_of_speed_is_that_of_the_result_files():
    warm, step = result("read")["warm"]["median"], result("step")
    pairs = [
        (warm["FeatureStore.gather"], warm["h5py in a DataLoader, 0 workers"]),
        *((step["pretrain"]["median"]["ours"], step["pretrain"]["median"][loop])
          for loop in ("usual loop", "student's loop")),
        (step["finetune"]["median"]["ours"], step["finetune"]["median"]["usual loop"]),
    ]  # fmt: skip
    for (label, ours, usual, ratio), (fast, slow) in zip(
        table(TEXT, "| on two CPU cores "), pairs, strict=True
    ):
        assert agrees(ours, fast), label
        assert agrees(usual.split()[0], slow), label
        assert agrees(ratio, fast / slow), label


def printed(name):
    """The numbers that README shows behind a word, without p, among what `make demo` prints."""
    (block,) = (block for block in all_blocks("text") if block.text.startswith("extract:"))
    (line,) = (line for line in block.text.splitlines() if line.startswith(name))
    return re.findall(r"[\d.]+", line[len(name) :].split(", p ")[0])


def test_what_the_demo_prints_is_in_its_result_file():
    reports = result("demo")["reports"]
    scores = reports["eval"]
    wanted = {
        "extract:": [reports["extract"][key] for key in ("images", "shards", "shards_encoded")]
        + [reports["extract"]["images_per_second"], reports["extract"]["failed"]],
        "captions: CIDEr": with_gain(scores["captions"], "CIDEr"),
        "answers:  exact match": with_gain(scores["answers"], "exact_match"),
    }
    wanted |= {
        f"{stage}:": [reports[stage][key] for key in ("steps", "loss", "seconds")]
        for stage in ("pretrain", "finetune")
    }
    wanted |= {
        f"pope:     {subset} accuracy": with_gain(scores["pope"][subset], "accuracy")
        for subset in ("adversarial", "popular", "random")
    }
    wanted["pope:     mean F1"] = with_gain(scores["pope_mean"], "f1")
    for name, values in wanted.items():
        shown = printed(name)
        assert len(shown) == len(values), name
        assert all(map(agrees, shown, values)), f"{name} {shown}, in the file: {values}"


def with_gain(scores, key):
    gain = scores["gains"]["blind"][key]
    return [scores[key], scores["blind"][key], gain["gain"], *gain["interval"]]


def minutes_of_demo(name):
    return result(name)["seconds"]["total"] / 60


def goal(name, key):
    return result(name)["goals"][key]["found"]


FIGURES = {
    r"(\d+) minutes on 2 CPU cores with AVX-512": lambda: minutes_of_demo("demo"),
    r"take ([\d.]+) bytes of memory each": lambda: goal("scale", "bytes a row, after opening"),
    r"from the disk takes ([\d.]+) times as long as `cat`": lambda: goal(
        "verify", "cold: FeatureStore.verify / cat > /dev/null"
    ),
    r"`cat` \(([\d.]+) as a command": lambda: goal(
        "verify", "cold: python -m cache.verify / cat > /dev/null"
    ),
    r"and ([\d.]+) to 5 times from memory": lambda: goal(
        "verify", "warm: FeatureStore.verify / cat > /dev/null"
    ),
    r"4 to ([\d.]+) times from memory": lambda: goal(
        "verify", "warm: python -m cache.verify / cat > /dev/null"
    ),
    r"a batch of 256 has rows of ([\d.]+) shards": lambda: shards_in_a_batch("windowed, 16 shards"),
    r"shards, not of ([\d.]+)": lambda: shards_in_a_batch("global"),
    r"an epoch from this disk was ([\d.]+) times as fast": lambda: ratio(
        result("order")["cold"]["median"], "windowed, read ahead", "global"
    ),
    r"KV cache: ([\d.]+) times as fast as one by one without it": lambda: ratio(
        result("generate")["median"], "ours", "one by one, no cache"
    ),
    r"without it, ([\d.]+) times as fast as one by one with it": lambda: ratio(
        result("generate")["median"], "ours", "one by one"
    ),
}
"""Figures of README's prose to where they come from."""


def shards_in_a_batch(order):
    return result("order")["mixing"][order]["shards_in_a_batch"]


def ratio(median, left, right):
    return median[left] / median[right]


@pytest.mark.parametrize("pattern", FIGURES)
def test_a_figure_of_the_prose_is_in_a_result_file(pattern):
    (shown,) = re.findall(pattern, PROSE)
    assert agrees(shown, FIGURES[pattern]()), f"{shown}, in the file {FIGURES[pattern]()}"


def test_the_slower_demo_is_said_to_take_what_its_result_file_says():
    (shown,) = re.findall(r"(\d+) with AVX2 alone", PROSE)
    if (ROOT / "bench/results/demo_avx2.json").exists():
        assert agrees(shown, minutes_of_demo("demo_avx2"))


def test_a_million_rows_open_in_less_than_a_second():
    assert "A million rows open in under a second" in PROSE
    assert goal("scale", "seconds to open 1,000,000 rows") < 1


def test_gradients_differ_by_less_than_readme_says():
    (shown,) = re.findall(r"gradients differ by less than (\S+)", PROSE)
    found = (result("step")[stage]["gradient_difference"] for stage in ("pretrain", "finetune"))
    assert max(found) < float(shown)
