"""Renders `reports/index.html`: one page that needs no network and no other file.

The templates escape every text. A content security policy allows the page's own style and script,
by their hashes, and nothing else.
"""

import base64
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from eval.report.cards import headline, score_cards
from eval.report.charts import HEIGHT, LEFT, RIGHT, WIDTH, length_charts, loss_chart, stop_rates
from eval.report.gallery import KIND_TITLES, GalleryText, choose_examples, filter_options
from eval.report.gaps import gaps, untrained_stages
from eval.report.scores import Section, section_of
from eval.report.tables import (
    SECTION_TITLES,
    contamination_table,
    pope_table,
    score_tables,
    still_scored,
    type_table,
)
from eval.report.without_sight import without_sight
from eval.scoring.score_names import as_number
from eval.settings import shown_setting
from pipeline.settings import EXTERNAL

MAX_CONTAMINATED = 50
"""Contaminated images that are listed for each kind of text; the rest are counted."""

MAX_LISTED = 100
"""Questions of a kind that are listed as answered without looking; the rest are counted."""

_TEMPLATES = Path(__file__).with_name("templates")
_EVENTS = {
    "evaluate": "Evaluated",
    "pretrain": "stage 1 trained",
    "finetune": "stage 2 trained",
}
"""Pipeline stage to the event at its end, in the order of the page."""
_STAGE_TITLES = {
    "pretrain": "Stage 1: projector",
    "finetune": "Stage 2: projector and language model",
}


def render_report(
    *,
    scores: Section,
    examples: Sequence[GalleryText],
    thumbnails: Mapping[int, str],
    file_names: Mapping[int, str],
    histories: Mapping[str, Sequence[Mapping[str, object]]],
    provenance: Mapping[str, Any],
    contamination: Mapping[str, Sequence[Mapping[str, Any]]],
    dates: Mapping[str, str],
    warning: str,
) -> str:
    """Render the page.

    Args:
        scores: Content of `reports/eval.json`; any section may be absent, any value None.
        examples: All texts of the model; `choose_examples` picks those that are shown.
        thumbnails: Image id to a data URI of its picture; an image may be absent.
        file_names: Image id to the name of its file; an image may be absent.
        histories: Training stage to the rows of its `history.csv`; an untrained one is absent.
        provenance: Origin of the scores, nested at will. The opening sentence names
            `settings.llm.model`, `settings.encoder.model` and `settings.data.source`.
        contamination: Content of `reports/contamination.json`.
        dates: Pipeline stage to the time of its end, ISO 8601 in UTC; a stage may be absent.
        warning: Text to show before all scores, or empty.

    Returns:
        HTML text, the same for the same arguments.

    Raises:
        ValueError: A thumbnail is not a data URI, so the page would have to fetch it.
    """
    for image_id, uri in thumbnails.items():
        if not uri.startswith("data:image/"):
            raise ValueError(
                f"the thumbnail of image {image_id} must be a data URI of an image, found "
                f"{uri[:40]!r}."
            )
    style, script = (
        Markup((_TEMPLATES / name).read_text(encoding="utf-8"))
        for name in ("style.css", "script.js")
    )
    cards = score_cards(scores)
    galleries = choose_examples(examples)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        style=style,
        script=script,
        policy=_policy(style, script),
        frame={"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT},
        sentence=_sentence(provenance.get("settings") or {}, untrained_stages(scores)),
        data=_data_sentences(scores),
        dates=[(_EVENTS[stage], dates[stage]) for stage in _EVENTS if stage in dates],
        warning=warning,
        headline=headline(cards),
        cards=cards,
        gaps=gaps(scores),
        without_sight=without_sight(examples),
        max_listed=MAX_LISTED,
        kinds=KIND_TITLES,
        galleries=galleries,
        options=filter_options(galleries),
        thumbnails=thumbnails,
        file_names=file_names,
        charts={_STAGE_TITLES.get(name, name): loss_chart(histories[name]) for name in histories},
        lengths=length_charts(examples),
        stop_rates=stop_rates(scores),
        types=type_table(scores),
        pope=pope_table(scores),
        contamination=contamination_table(scores),
        still_scored=still_scored(scores),
        contaminated={SECTION_TITLES.get(k, k): images for k, images in contamination.items()},
        max_contaminated=MAX_CONTAMINATED,
        tables=score_tables(scores),
        provenance=_facts(provenance),
    )


def _policy(style: str, script: str) -> str:
    """Return a content security policy that allows this style, this script and data URIs."""

    def source(text: str) -> str:
        digest = hashlib.sha256(text.encode()).digest()
        return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"

    return (
        f"default-src 'none'; img-src data:; style-src {source(style)}; "
        f"script-src {source(script)}; base-uri 'none'; form-action 'none'"
    )


def _data_sentences(scores: Section) -> str:
    """Say what the stages learned from, and which images the captions are scored on."""
    sentences = []
    for stage, kind, number in (
        ("pretrain", "captions of", 1),
        ("finetune", "conversations about", 2),
    ):
        found = section_of(scores, "trained_on", stage)
        texts, images = (as_number(found.get(name)) for name in ("texts", "images"))
        if texts and images:
            sentences.append(
                f"Stage {number} learned from {texts:,.0f} {kind} {images:,.0f} pictures."
            )
    split = section_of(scores, "split")
    has_captions = section_of(scores, "captions") or section_of(scores, "pretrain_only", "captions")
    if split and has_captions:
        sentences.append(
            f"Pictures are split by {split.get('name')}; scored captions are those of split "
            f"{split.get('captions')}."
        )
    return " ".join(sentences)


def _sentence(settings: Mapping[str, Any], untrained: Collection[str]) -> str:
    llm, encoder, source = (
        shown_setting(settings, section, key)
        for section, key in (("llm", "model"), ("encoder", "model"), ("data", "source"))
    )
    data = f"the {source} data" if source else "image and text pairs"
    if encoder == EXTERNAL:
        encoder = f"the store {shown_setting(settings, 'encoder', 'pretrained')}"
    task = "to caption pictures and to answer questions about them"
    if "finetune" in untrained:
        task = "to caption pictures"
    elif "pretrain" in untrained:
        task = "to answer questions about pictures"
    return (
        f"{llm or 'A language model'} was trained on {data} {task}, from cached patch features of "
        f"{encoder or 'a vision encoder'}."
    )


def _facts(values: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Lay nested facts out as groups of dotted keys and texts; loose facts go into group run."""
    loose = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
    nested = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    return {key: list(_flat(group)) for key, group in ({"run": loose} | nested).items() if group}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{key}", ", ".join(map(str, value))
        else:
            yield f"{prefix}{key}", "not known" if value is None else str(value)
