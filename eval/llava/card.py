"""Writes the model card of an exported run: description, usage, scores, limits, provenance."""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from ruamel.yaml import YAML

from cache.errors import SettingsError
from cache.files.foreign import reading_foreign_file
from cache.spec import Spec
from eval.llava.hub_results import PublishedScore, model_index, published_scores
from eval.llava.text import TextPart
from eval.runs import FinishedRun, LoadedRun
from eval.score_warnings import random_tower_warning
from eval.scoring.budget import of_images
from eval.scoring.gains import judgement, read_gain, written
from eval.scoring.score_names import BLIND, MAIN_SCORES, has_no_short_targets
from eval.settings import EvaluateSettings, shown_setting
from pipeline.settings import TRANSFORMERS
from train.run import weights_of
from workspace.data_settings import DataSettings, Split
from workspace.errors import StageError
from workspace.json_files import read_json
from workspace.paths import REPORTS
from workspace.settings import Params

DATASETS = {"coco": ("COCO 2017", "LLaVA-Instruct-150K")}
"""Setting `data.source` to the public names of its data sets."""

SHOWN_SECTIONS = ("encoder", "llm", "projector", "pretrain", "finetune")
"""Sections of the settings that the card shows."""


def model_card(
    trained: LoadedRun,
    spec: Spec,
    text: TextPart,
    settings: EvaluateSettings,
    *,
    prompts_differ: bool,
) -> str:
    """Write the model card of a run.

    Args:
        trained: The run.
        spec: Spec of the features that the run was trained on.
        text: The language model's representation.
        settings: Its `caption_question` is the question of the card's example.
        prompts_differ: Whether a question has other tokens than in training.

    Returns:
        Markdown with a YAML header.
    """
    values = trained.params.values
    source = str(shown_setting(values, "data", "source") or "unknown")
    shown = {name: _without_folders(values[name]) for name in SHOWN_SECTIONS if name in values}
    folder = Path(__file__).parent
    report = read_score_report(trained)
    title = f"{shown['encoder']['model']} with {shown['llm']['model']}"
    index = model_index(title, report.published, source)
    environment = Environment(
        loader=FileSystemLoader(folder), undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    return environment.get_template("model_card.md.j2").render(
        header=to_yaml(_header(values, source, _families(spec, text)) | index).rstrip(),
        answers=trained.answers,
        encoder=shown["encoder"],
        llm=shown["llm"],
        datasets=DATASETS.get(source, ()),
        source=source,
        spec=spec,
        text=text,
        prompts_differ=prompts_differ,
        dtype=str(text.config.dtype).removeprefix("torch."),
        prompts=trained.prompt_format,
        question=settings.caption_question,
        scores=report,
        split_name=_split_name(trained.params),
        provenance=trained.provenance,
        warning=random_tower_warning(values),
        settings=to_yaml(shown).rstrip(),
    )


def _without_folders(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with existing paths of this machine cut to their last part."""
    return {
        name: Path(value).name if isinstance(value, str) and Path(value).exists() else value
        for name, value in values.items()
    }


@dataclass(frozen=True)
class ScoreReport:
    """The scores of a run, as texts."""

    rows: Sequence[tuple[str, str, str, str, str]] = ()
    """Section, name of the score, the score, the score with the wrong image, and the gain."""
    verdict: str = ""
    """Whether the model uses the picture; empty if that was not measured."""
    caption_split: str = ""
    """The split whose images were captioned; empty if it is not known."""
    published: Sequence[PublishedScore] = ()
    """The scores that papers print, times 100."""


def read_score_report(trained: FinishedRun) -> ScoreReport:
    """Read the scores of a run from the workspace's `reports/eval.json`.

    Returns:
        An empty report if there is none, or if it is of other weights.

    Raises:
        StageError: The report is damaged.
        OSError: The system cannot read the report.
    """
    report = trained.folder.resolve().parent.parent / REPORTS / "eval.json"
    if not report.is_file():
        return ScoreReport()

    def refuse(why: str) -> StageError:
        return StageError(f"{report}: no scores ({why}). Run the evaluate stage.")

    scores = read_json(report, refuse)
    stage = "finetune" if trained.answers else "pretrain"
    weights = weights_of(trained.folder)
    source = str(shown_setting(trained.params.values, "data", "source") or "unknown")
    with reading_foreign_file(refuse, report):
        if scores.get("weights_sha256", {}).get(stage) != weights:
            return ScoreReport()
        own_scores = scores if trained.answers else scores.get("pretrain_only", {})
        sections = _scored_sections(own_scores)
        split = scores.get("split", {}).get("captions")
        return ScoreReport(
            rows=[row for title, part in sections.items() for row in _score_rows(title, part)],
            verdict=_verdict(sections),
            caption_split=split if split in get_args(Split) else "",
            published=list(published_scores(own_scores, scores.get("split") or {}, source)),
        )


def _split_name(params: Params) -> str:
    """Return how the run's images were split; empty if its settings do not say it."""
    try:
        return params.section("data", DataSettings).split_name
    except SettingsError:
        return ""


def _scored_sections(scores: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the sections that have texts."""
    sections = {name: scores.get(name) for name in ("captions", "answers")}
    sections |= {f"POPE {name}": part for name, part in (scores.get("pope") or {}).items()}
    return {
        title: section
        for title, section in sections.items()
        if isinstance(section, Mapping) and section.get("count", 1)
    }


def _score_rows(title: str, section: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield the rows of a section, as `ScoreReport` holds them."""
    control = section.get(BLIND) or {}
    for key, value in section.items():
        if isinstance(value, float) and not has_no_short_targets(section, key):
            gain = read_gain(section, key)
            gain_text = written(gain) if gain else ""
            yield (
                title + of_images(section),
                key,
                _written(section, key),
                _written(control, key),
                gain_text,
            )


def _verdict(sections: Mapping[str, Mapping[str, Any]]) -> str:
    gains = {
        f"{title} {key}": gain
        for title, section in sections.items()
        for key in MAIN_SCORES
        if (gain := read_gain(section, key))
    }
    return f"The model {judgement(gains)}." if gains else ""


def _written(section: Mapping[str, Any], key: str) -> str:
    """Format a score, with its interval if it has one; empty without a score."""
    if not isinstance(section.get(key), int | float):
        return ""
    interval = (section.get("intervals") or {}).get(key)
    if not interval:
        return f"{section[key]:.3f}"
    return f"{section[key]:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


def _families(spec: Spec, text: TextPart) -> list[str]:
    """Return the names of the families of the language model and the vision tower."""
    tower = spec.model.removeprefix(TRANSFORMERS)
    return [text.config.model_type, "clip" if tower == spec.model else tower.rpartition("-")[0]]


def _header(values: Mapping[str, Any], source: str, families: list[str]) -> dict[str, Any]:
    header: dict[str, Any] = {
        "license": "other",
        "license_name": "those-of-its-parts",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["llava", *families, "patchcache"],
    }
    base = values["llm"]["model"]
    if not Path(base).exists():
        header["base_model"] = base
    if source == "coco":
        header["datasets"] = ["liuhaotian/LLaVA-Instruct-150K"]
        header["language"] = ["en"]
    return header


def to_yaml(values: Any) -> str:
    """Write a dictionary or a list of them as YAML."""
    text = io.StringIO()
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    writer.dump(values, text)
    return text.getvalue()
