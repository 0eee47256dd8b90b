"""Shared by the tests of the report: a parser of the page, examples, scores."""

import math
from html.parser import HTMLParser

from eval.report.gallery import GalleryText
from eval.report.page import render_report

HOSTILE = (
    "</script></textarea><img src=x onerror=window.hacked=1><script>window.hacked=1</script> "
    "\" onfocus=window.hacked=1 autofocus ' & {{ 7 * 7 }} --> ]]> \\u0022 \u2028 \u202e\u05d0"
)

EMPTY_PAGE = {
    "scores": {},
    "examples": [],
    "thumbnails": {},
    "file_names": {},
    "histories": {},
    "provenance": {},
    "dates": {},
    "warning": "",
    "contamination": {},
}


class Page(HTMLParser):
    """Tags and texts of a page; fails if the tags do not nest."""

    VOID = ("meta", "link", "img", "input")

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script") and data.strip():
            self.texts.append(" ".join(data.split()))

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def of_class(self, name):
        return [a for _, a in self.tags if name in (a.get("class") or "").split()]


def example(image_id, score, **changes):
    kind = changes.get("kind", "caption")
    fields = {
        "kind": kind,
        "split": "holdout" if kind == "answer" else "val",
        "question": "" if kind == "caption" else "What is it?",
        "question_type": {"caption": "", "answer": "what", "pope": "random"}[kind],
        "targets": ("a red dog", "a dog that is red"),
        "prediction": f"prediction {image_id}",
        "blind_prediction": "a blue boat",
        "num_tokens": 3,
        "stopped": True,
    }
    return GalleryText(image_id=image_id, score=score, **(fields | changes))


def render(**changes):
    return Page(render_report(**(EMPTY_PAGE | changes)))


def gain(value, low, high, *, p=None, detectable=0.05, images=100):
    """A gain, with a p value that fits its interval if none is given."""
    p = (1.0 if low <= 0 <= high else 2 / 1001) if p is None else p
    fields = {"gain": value, "interval": [low, high], "p": p}
    return fields | {"detectable": detectable, "images": images}


def section(key, seen, *, count=100, **controls):
    """A section with one score: value, low and high end for the model and each control.

    The gain over a control has an interval above 0 where the two intervals lie apart.
    """

    def view(measured):
        value, low, high = measured
        return {key: value, "intervals": {key: [low, high]}, "count": count}

    gains = {}
    for name, measured in controls.items():
        ends = (*seen, *measured)
        if all(isinstance(end, float) and math.isfinite(end) for end in ends):
            best, worst = (measured, seen) if key == "loss" else (seen, measured)
            differences = (best[0] - worst[0], best[1] - worst[2], best[2] - worst[1])
            gains[name] = {key: gain(*differences)}
    sections = {name: view(measured) for name, measured in controls.items()}
    return view(seen) | sections | {"gains": gains}


LOW = {"blind": (0.3, 0.2, 0.4), "noise": (0.2, 0.1, 0.3), "untrained": (0.1, 0.0, 0.2)}
"""Controls that a score of 0.9 with an interval from 0.8 beats."""
