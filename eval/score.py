"""Command: scores captions in COCO's results format against captions by people.

python -m eval.score CAPTIONS RESULTS
python -m eval.score CAPTIONS RESULTS --official

CAPTIONS has the format of COCO's captions_val2017.json. RESULTS is a list of objects with image_id
and caption, like reports/captions_results.json, about the same images. --official also runs the
official Java programs (PTB tokenizer, METEOR, SPICE) and prints their scores beside ours; SPICE
downloads Stanford CoreNLP at first use. If a score cannot be computed, the exit code is 1.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from cache.cli.command import command_parser, run_guarded
from cache.files.atomic import check_ordinary
from cache.files.foreign import parse_json, reading_foreign_file
from eval.metrics import score_captions
from eval.scoring.official import OfficialScores, check_java, score_officially
from eval.text_table import print_table
from workspace.errors import StageError

NO_SCORE = "-"


def score(captions: Path, results: Path, *, official: bool) -> None:
    """Print the scores of a results file.

    Args:
        captions: File with the captions by people.
        results: File with one caption for each of the same images.
        official: Whether to run the official Java programs too.

    Raises:
        SettingsError: There is no Java for the official programs.
        StageError: A file cannot be used, the files are about different images, or an official
            score could not be computed.
    """
    if official:
        check_java()
    references, candidates = read_captions(captions), read_results(results)
    try:
        ours = score_captions(references, candidates)
    except ValueError as error:
        raise StageError(f"{results} does not fit {captions}: {error}") from None
    theirs = score_officially(references, candidates) if official else None
    count = sum(map(len, references.values()))
    print(f"{len(candidates)} captions against {count} by people")
    print_table(table_rows(ours, theirs))
    if theirs is not None and theirs.missing:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in theirs.missing.items())
        raise StageError(f"cannot compute {', '.join(theirs.missing)}. {reasons}.")


def table_rows(
    ours: dict[str, float], theirs: OfficialScores | None
) -> list[tuple[str, str, str, str]]:
    """Return the rows of the table, with the official scores if there are any."""
    if theirs is None:
        return [(name, f"{value:.6f}", "", "") for name, value in ours.items()]
    rows = [("", "ours", "official", "difference")]
    for name in [*ours, *(n for n in (*theirs.scores, *theirs.missing) if n not in ours)]:
        pair = [scores.get(name) for scores in (ours, theirs.scores)]
        one, other = (NO_SCORE if value is None else f"{value:.6f}" for value in pair)
        difference = NO_SCORE if None in pair else f"{ours[name] - theirs.scores[name]:+.6f}"
        rows.append((name, one, other, difference))
    return rows


def read_captions(path: Path) -> dict[int, list[str]]:
    """Return the captions of each image of a captions file.

    Raises:
        StageError: The file is not in COCO's format.
    """
    content = _read_json(path)
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list):
        _refuse(path, "wanted COCO's format: an object with the list 'annotations'")
    captions: dict[int, list[str]] = {}
    for image_id, caption in _entries(path, "annotations", annotations):
        captions.setdefault(image_id, []).append(caption)
    return captions


def read_results(path: Path) -> dict[int, str]:
    """Return the caption of each image of a results file.

    Raises:
        StageError: The file is not in COCO's format, or has two captions of an image.
    """
    content = _read_json(path)
    if not isinstance(content, list):
        _refuse(path, "wanted COCO's format: a list of objects with image_id and caption")
    results: dict[int, str] = {}
    for image_id, caption in _entries(path, "", content):
        if image_id in results:
            _refuse(path, f"image {image_id} has two captions, wanted one")
        results[image_id] = caption
    return results


def _read_json(path: Path) -> Any:
    def refuse(why: str) -> StageError:
        return StageError(f"{path}: no usable JSON in UTF-8: {why}.")

    if not path.exists():
        raise StageError(f"{path}: no such file. Name a file of captions and one of results.")
    check_ordinary(path, refuse)
    with reading_foreign_file(refuse, path):
        return parse_json(path.read_bytes().decode("utf-8-sig"))


def _entries(path: Path, place: str, entries: list[Any]) -> Iterator[tuple[int, str]]:
    for position, entry in enumerate(entries):
        found = entry if isinstance(entry, dict) else {}
        image_id, caption = found.get("image_id"), found.get("caption")
        # True is an int to isinstance, but no id.
        if type(image_id) is not int or not isinstance(caption, str):
            wanted = "wanted an object with a number 'image_id' and a text 'caption'"
            _refuse(path, f"{place}[{position}]: {wanted}")
        try:
            caption.encode()
        except UnicodeEncodeError:
            _refuse(path, f"{place}[{position}]: half a character (a lone surrogate)")
        yield image_id, caption


def _refuse(path: Path, reason: str) -> NoReturn:
    raise StageError(f"{path}: {reason}.")


def main() -> None:
    """Read the command line and score."""
    parser = command_parser(__doc__)
    parser.add_argument("captions", metavar="CAPTIONS", type=Path, help="captions by people")
    parser.add_argument("results", metavar="RESULTS", type=Path, help="captions to score")
    parser.add_argument("--official", action="store_true", help="run the Java programs too")
    arguments = parser.parse_args()
    run_guarded(lambda: score(arguments.captions, arguments.results, official=arguments.official))


if __name__ == "__main__":
    main()
