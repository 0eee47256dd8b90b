"""Renders `reports/index.html`: one page that needs no network and no other file.

Owns what the page shows; how it looks is in `report.html.j2`, which escapes every text.
"""

import base64
import io
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
from PIL import Image, ImageOps

from eval.loss_chart import loss_chart
from eval.report_scores import score_cards, score_tables, section_of

_GROUP_SIZE = 6
_JPEG_QUALITY = 82
_STAGE_TITLES = {
    "pretrain": "Stage 1: projector",
    "finetune": "Stage 2: projector and language model",
}


@dataclass(frozen=True, kw_only=True)
class Example:
    """One text of the model beside what was wanted."""

    image_id: int
    kind: Literal["caption", "answer"]
    question: str
    """Empty for a caption."""
    targets: tuple[str, ...]
    prediction: str
    blind_prediction: str
    """The text for the same question with the features of another image."""
    score: float
    thumbnail: str | None
    """Data URI of the picture, or None where the pictures are not at hand."""

    def __post_init__(self) -> None:
        """Refuse a picture that the page would have to fetch."""
        if self.thumbnail is not None and not self.thumbnail.startswith("data:image/"):
            raise ValueError(
                f"the thumbnail of image {self.image_id} must be a data URI of an image, found "
                f"{self.thumbnail[:40]!r}."
            )


Gallery = dict[str, list[Example]]


def thumbnail_uri(image_bytes: bytes, side: int = 192) -> str:
    """Shrink a picture for the page.

    Args:
        image_bytes: A picture file of any format that Pillow reads.
        side: Largest width and height of the result, in pixels.

    Returns:
        Data URI of a JPEG, without the metadata of the picture.

    Raises:
        OSError: The bytes are no picture, or a cut one.
    """
    with Image.open(io.BytesIO(image_bytes)) as image:
        # Upright, as the encoder saw it.
        picture = ImageOps.exif_transpose(image).convert("RGB")
    picture.thumbnail((side, side))
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode("ascii")


def choose_examples(examples: Sequence[Example]) -> dict[str, Gallery]:
    """Choose what the galleries show: the best, the worst and some at random.

    No example is shown twice. Choosing again among the chosen gives the same, so a caller may
    choose first and make thumbnails of the chosen only.

    Returns:
        For each kind of example, its groups in the order of the page; empty groups are left out.
    """
    kinds = ("caption", "answer")
    return {kind: _gallery([e for e in examples if e.kind == kind]) for kind in kinds}


def render_report(
    *,
    scores: Mapping[str, Any],
    examples: Sequence[Example],
    histories: Mapping[str, Sequence[Mapping[str, object]]],
    provenance: Mapping[str, Any],
) -> str:
    """Render the page.

    Args:
        scores: Content of `reports/eval.json`; any section may be absent, any value None.
        examples: All examples or those of `choose_examples`.
        histories: For each stage, the rows of its `history.csv`.
        provenance: Whatever says where the scores come from, nested at will. The names in
            `settings.llm.model`, `settings.encoder.model` and `settings.data.source` go into the
            opening sentence.

    Returns:
        HTML text, the same for the same arguments.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        sentence=_sentence(provenance.get("settings") or {}),
        cards=score_cards(scores),
        tables=score_tables(scores),
        unscored=[name for name in ("captions", "answers") if not section_of(scores, name)],
        galleries=choose_examples(examples),
        charts={
            _STAGE_TITLES.get(stage, stage): loss_chart(histories[stage]) for stage in histories
        },
        provenance=_facts(provenance),
    )


def _gallery(examples: Sequence[Example]) -> Gallery:
    ranked = sorted(examples, key=lambda e: (-e.score, e.image_id, e.question))
    half = (len(ranked) + 1) // 2
    best = ranked[: min(_GROUP_SIZE, half)]
    worst = ranked[max(len(ranked) - _GROUP_SIZE, half) :][::-1]
    middle = ranked[len(best) : len(ranked) - len(worst)]
    some = random.Random(0).sample(middle, min(_GROUP_SIZE, len(middle)))
    some.sort(key=lambda e: (e.image_id, e.question))
    groups = {"Worst": worst, "Best": best, "Some at random": some}
    return {name: group for name, group in groups.items() if group}


def _sentence(settings: Mapping[str, Any]) -> str:
    llm, encoder, source = (
        (settings.get(section) or {}).get(key)
        for section, key in (("llm", "model"), ("encoder", "model"), ("data", "source"))
    )
    return (
        f"{llm or 'A language model'} learned to describe pictures and to answer questions about "
        f"them from cached patch features of {encoder or 'a vision encoder'}, trained on "
        f"{f'the {source} data' if source else 'image and text pairs'}."
    )


def _facts(values: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Lay nested facts out as named groups of dotted keys and texts."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            groups[key] = list(_flat(value))
        else:
            groups.setdefault("run", []).append((key, _text(value)))
    return groups


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    facts: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            facts += _flat(value, f"{prefix}{key}.")
        else:
            facts.append((f"{prefix}{key}", _text(value)))
    return facts


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return "not known" if value is None else str(value)
