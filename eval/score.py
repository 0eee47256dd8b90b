"""Command: scores texts of any system, ours or not, in one table.

python -m eval.score CAPTIONS RESULTS [RESULTS ...]
python -m eval.score POPE ANSWERS [ANSWERS ...]
python -m eval.score CAPTIONS RESULTS --official

CAPTIONS has the format of COCO's captions_val2017.json; RESULTS is a list of objects with image_id
and caption, like reports/captions_results.json. POPE is a file of labelled questions like
coco_pope_random.json or reports/pope_questions.jsonl, or a folder of these; ANSWERS are JSON Lines
with question_id and text, like reports/pope_answers.jsonl, or a folder with a file for each subset.
NAME=FILE names a system in the table.

Each further system is compared with the first, text by text, if both have texts for the same
images. A system without a text for some images is scored on the others, and these are named.
--official also runs the official Java programs (PTB tokenizer, METEOR, SPICE) and prints their
scores beside ours; SPICE downloads Stanford CoreNLP at first use. If a score cannot be computed,
the exit code is 1.
"""

from collections.abc import Sequence
from pathlib import Path

from cache.cli.command import command_parser, run_guarded
from cache.errors import SettingsError
from eval.metrics import score_captions
from eval.scoring.official import OfficialScores, check_java, score_officially
from eval.systems.coco_files import captions_of, read_results
from eval.systems.files import NamedFile, named_files, read_values
from eval.systems.pope_files import is_labelled, read_labels
from eval.systems.score_table import (
    BENEATH,
    CAPTION_UNITS,
    UNITS,
    caption_rows,
    differing_notes,
    pope_rows,
)
from eval.systems.scored import Scored, score_answers, score_results
from eval.text_table import print_table, printable
from workspace.errors import StageError

NO_SCORE = "-"


def score(references: Path, results: Sequence[str], *, official: bool) -> None:
    """Print the scores of files of results.

    Args:
        references: Captions by people or labelled questions.
        results: Files or NAME=FILE, with texts about the same images.
        official: Whether to run the official Java programs too, for captions.

    Raises:
        SettingsError: There is no Java for the official programs, or POPE is to be scored by them.
        StageError: A file cannot be used, the files are about different images, or an official
            score could not be computed.
    """
    if official:
        check_java()
    files = named_files(results)
    # A folder holds questions, and of a file the content tells.
    content = None if references.is_dir() else read_values(references)
    if content is None or is_labelled(content):
        if official:
            raise SettingsError("--official is for captions: POPE's own program is plain counting.")
        score_pope_files(references, files)
        return
    captions = captions_of(references, content)
    score_caption_files(references, captions, files)
    if official:
        for file in files:
            score_file_officially(captions, file)


def score_caption_files(
    path: Path, captions: dict[int, list[str]], files: Sequence[NamedFile]
) -> None:
    """Print the table of captions."""
    systems = score_results(path, captions, files)
    count = sum(map(len, captions.values()))
    print(f"captions of {len(captions)} images, {count} by people. {CAPTION_UNITS} {BENEATH}")
    print_table(shown_rows(caption_rows(systems)))
    print_notes(systems[0], systems)


def score_pope_files(path: Path, files: Sequence[NamedFile]) -> None:
    """Print the table of yes-no answers."""
    questions = read_labels(path)
    systems = score_answers(questions, files)
    subsets = ", ".join(dict.fromkeys(question.subset for question in questions))
    images = len({question.image for question in questions})
    counted = f"{len(questions)} yes-no questions about {images} images: {printable(subsets)}"
    print(f"{counted}. {UNITS}. {BENEATH}")
    print_table(shown_rows(pope_rows(systems)))
    first = {part.part: part for part in systems[0]}
    for parts in systems:
        for part in parts:
            print_notes(first.get(part.part), [part])


def shown_rows(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return rows whose names, which may be those of files, cannot steer a terminal."""
    return [(name and printable(name), *cells) for name, *cells in rows]


def print_notes(first: Scored | None, systems: Sequence[Scored]) -> None:
    """Print what systems left out, and why some have no difference to the first one."""
    for system in systems:
        for note in (system.note(), differing_notes(first, system)):
            if note:
                print(f"note: {printable(note)}")


def score_file_officially(captions: dict[int, list[str]], file: NamedFile) -> None:
    """Print the scores of a file by our programs and by the official ones.

    Raises:
        StageError: An official score could not be computed.
    """
    candidates = read_results(file.path)
    references = {image_id: captions[image_id] for image_id in candidates}
    theirs = score_officially(references, candidates)
    print(f"\n{printable(file.name)}, not times 100:")
    print_table(official_rows(score_captions(references, candidates), theirs))
    if theirs.missing:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in theirs.missing.items())
        raise StageError(f"cannot compute {', '.join(theirs.missing)}. {reasons}.")


def official_rows(
    ours: dict[str, float], theirs: OfficialScores
) -> list[tuple[str, str, str, str]]:
    """Return the rows of the table with the official scores."""
    rows = [("", "ours", "official", "difference")]
    for name in [*ours, *(n for n in (*theirs.scores, *theirs.missing) if n not in ours)]:
        pair = [scores.get(name) for scores in (ours, theirs.scores)]
        one, other = (NO_SCORE if value is None else f"{value:.6f}" for value in pair)
        difference = NO_SCORE if None in pair else f"{ours[name] - theirs.scores[name]:+.6f}"
        rows.append((name, one, other, difference))
    return rows


def main() -> None:
    """Read the command line and score."""
    parser = command_parser(__doc__)
    parser.add_argument(
        "references", metavar="REFERENCES", type=Path, help="captions by people, or POPE's labels"
    )
    parser.add_argument(
        "results", metavar="RESULTS", nargs="+", help="texts to score: FILE or NAME=FILE"
    )
    parser.add_argument("--official", action="store_true", help="run the Java programs too")
    arguments = parser.parse_args()
    run_guarded(lambda: score(arguments.references, arguments.results, official=arguments.official))


if __name__ == "__main__":
    main()
