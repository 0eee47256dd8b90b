"""Writes the scores of a run as the Hugging Face Hub reads them.

The model card's metadata holds them as `model-index` (huggingface/hub-docs, modelcard.md). The Hub
also shows files in `.eval_results/`, but only of data sets that it lists as benchmarks, under task
ids that the data set defines (huggingface/hub-docs, docs/hub/eval-results.md). Nothing here knows
whether such a data set holds the images that were scored, so the user names it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.repocard_data import eval_results_to_model_index

from cache.errors import SettingsError
from eval.scoring.score_names import DECODING, as_number, has_no_short_targets
from workspace.data_settings import Split, SplitName

TASK = "image-text-to-text"
FOLDER = ".eval_results"

PUBLISHED = {
    ("captions", "CIDEr"): ("cider", "CIDEr x 100"),
    ("captions", "BLEU-4"): ("bleu", "BLEU-4 x 100"),
    ("captions", "ROUGE-L"): ("rouge", "ROUGE-L x 100"),
    ("pope_mean", "accuracy"): ("accuracy", "POPE, mean accuracy x 100"),
    ("pope_mean", "f1"): ("f1", "POPE, mean F1 x 100"),
    ("answers", "exact_match"): ("exact_match", "exact match x 100"),
}
"""Section and key in `reports/eval.json` to the type and name of the metric on the Hub."""

DATA = {"coco": {"captions": "COCO 2017 captions", "answers": "LLaVA-Instruct-150K, held out"}}
"""Setting `data.source` and section to the name of public data."""

OWN_DATA = {
    "captions": "captions",
    "answers": "held-out questions",
    "pope_mean": "yes-no questions of POPE's kind",
}


@dataclass(frozen=True, kw_only=True)
class PublishedScore:
    """A score that was measured, times 100 as papers print it."""

    section: str
    key: str
    value: float
    count: int
    """Texts that count in the score."""
    data: str
    split: str
    """How images are split, and for captions the split that was scored; empty if unknown."""
    subsets: Sequence[str] = ()
    """Of yes-no questions."""

    @property
    def name(self) -> str:
        """The name by which a user calls the score, like `captions.CIDEr`."""
        return f"{self.section}.{self.key}"

    @property
    def note(self) -> str:
        """What was measured, in words."""
        subsets = f" of {', '.join(self.subsets)}" if self.subsets else ""
        split = f", {self.split}" if self.split else ""
        title = PUBLISHED[self.section, self.key][1]
        return f"{title}{subsets}: {self.data}{split}, {self.count} texts, {DECODING} decoding"


def published_scores(
    scores: Mapping[str, Any], split: Mapping[str, Any], source: str
) -> Iterator[PublishedScore]:
    """Yield the scores of a run that papers print.

    Args:
        scores: Sections of `reports/eval.json` of the run's model.
        split: Its section `split`.
        source: Setting `data.source`.
    """
    known = {"name": get_args(SplitName), "captions": get_args(Split)}
    names = [split[key] for key, texts in known.items() if split.get(key) in texts]
    for section, key in PUBLISHED:
        part = scores.get(section)
        if not isinstance(part, Mapping) or has_no_short_targets(part, key):
            continue
        value = as_number(part.get(key))
        count = part.get("short_count" if key == "exact_match" else "count")
        if value is None or not isinstance(count, int) or not count:
            continue
        own_data = f"{OWN_DATA[section]} of data source {source}"
        yield PublishedScore(
            section=section,
            key=key,
            value=round(100 * value, 2),
            count=count,
            data=DATA.get(source, {}).get(section, own_data),
            split=", split ".join(names if section == "captions" else names[:1]),
            subsets=tuple(map(str, part.get("subsets") or ())),
        )


def model_index(name: str, scores: Sequence[PublishedScore], source: str) -> dict[str, Any]:
    """Return key `model-index` of the card's metadata, or nothing without scores."""
    results = []
    for score in scores:
        metric_type, metric_name = PUBLISHED[score.section, score.key]
        subsets = {"subsets": list(score.subsets)} if score.subsets else {}
        results.append(
            EvalResult(
                task_type=TASK,
                dataset_type=source,
                dataset_name=score.data,
                dataset_config=score.section,
                dataset_split=score.split or None,
                metric_type=metric_type,
                metric_name=metric_name,
                metric_value=score.value,
                metric_args={"num_texts": score.count, "decoding": DECODING} | subsets,
            )
        )
    return {"model-index": eval_results_to_model_index(name, results)} if results else {}


def benchmark_files(
    benchmarks: Sequence[str], scores: Sequence[PublishedScore], date: str
) -> dict[str, list[dict[str, Any]]]:
    """Return the files of `.eval_results/` for the benchmarks that a user names.

    Args:
        benchmarks: SCORE=OWNER/DATASET:TASK, like captions.CIDEr=me/coco-captions:karpathy.
        scores: The run's scores.
        date: When the run was finished, as ISO 8601; empty if it is not known.

    Returns:
        Name of a file to its content.

    Raises:
        SettingsError: An argument has another form, or the score was not measured.
    """
    measured = {score.name: score for score in scores}
    files: dict[str, list[dict[str, Any]]] = {}
    for benchmark in benchmarks:
        name, _, place = benchmark.partition("=")
        dataset, _, task = place.rpartition(":")
        if dataset.count("/") != 1 or not all((*dataset.split("/"), task)) or "/" in task:
            raise SettingsError(
                f"--benchmark {benchmark}: wanted SCORE=OWNER/DATASET:TASK, with the id of a "
                f"benchmark on the Hub and a task of its eval.yaml."
            )
        if name not in measured:
            raise SettingsError(
                f"--benchmark {benchmark}: {name} was not measured with these weights. Measured: "
                f"{', '.join(measured) or 'nothing'}. Run the evaluate stage."
            )
        score = measured[name]
        entry = EvalResultEntry(
            dataset_id=dataset, task_id=task, value=score.value, date=date or None, notes=score.note
        )
        file = f"{dataset.replace('/', '_')}_{task}.yaml"
        files.setdefault(file, []).extend(eval_result_entries_to_yaml([entry]))
    return files
