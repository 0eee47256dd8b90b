"""Runs the programs of the official COCO caption evaluation: its tokenizer, METEOR and SPICE.

They are Java programs, which pycocoevalcap brings and calls. SPICE needs Stanford CoreNLP besides:
pycocoevalcap fetches it at first use and keeps it in its own folder.
"""

import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.spice import spice
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from cache.errors import SettingsError
from cache.files.foreign import reading_foreign_file
from workspace.errors import StageError

CORENLP = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
"""What SPICE needs and pycocoevalcap does not bring."""

FETCH_SECONDS = 30
"""How long a server may be silent."""

Tokens = dict[int, list[str]]
"""Image id to captions, tokens parted by spaces."""


@dataclass(frozen=True)
class Official:
    """What the official programs say."""

    scores: dict[str, float]
    """By name: those of `eval.metrics.score_captions`, and METEOR and SPICE, from 0 to 1."""
    missing: dict[str, str]
    """Score that could not be had to the reason."""


def check_java() -> None:
    """Refuse to go on without Java.

    Raises:
        SettingsError: No `java` on PATH.
    """
    if shutil.which("java") is None:
        raise SettingsError(
            "--official runs Java programs, and there is no `java` on PATH. Install a Java "
            "runtime, 8 or newer (Debian and Ubuntu: `apt install default-jre-headless`), or "
            "leave --official out."
        )


def score_officially(
    references: Mapping[int, Sequence[str]], candidates: Mapping[int, str]
) -> Official:
    """Score one caption an image with the official programs.

    Args:
        references: For each image id, at least one caption that a person wrote.
        candidates: For each of the same image ids, the caption to score.

    Raises:
        StageError: The tokenizer failed, without which there is no score.
    """
    wanted = tokenize(references)
    found = tokenize({image_id: [candidates[image_id]] for image_id in references})
    bleu, _ = Bleu(4).compute_score(wanted, found, verbose=0)
    scores = {f"BLEU-{n}": float(value) for n, value in enumerate(bleu, start=1)}
    missing = {}
    programs: dict[str, Callable[[Tokens, Tokens], float]] = {
        "ROUGE-L": rouge,
        "CIDEr": cider,
        "METEOR": meteor,
        "SPICE": spice_f,
    }
    for name, program in programs.items():
        try:
            # A Java program that ends early, or a fetch that fails, is an exception of any kind.
            with reading_foreign_file(StageError):
                scores[name] = program(wanted, found)
        except (StageError, OSError) as error:
            missing[name] = str(error)
    return Official(scores, missing)


def tokenize(captions: Mapping[int, Sequence[str]]) -> Tokens:
    """Split captions as the official evaluation does, in order of image id.

    Raises:
        StageError: The Java program gave other captions back than it was given.
    """
    # The Java program ends a caption at a carriage return, a form feed, U+2028 and the like; all
    # captions behind would go to the wrong images.
    given = {
        image_id: [{"caption": " ".join(caption.split())} for caption in captions[image_id]]
        for image_id in sorted(captions)
    }
    with reading_foreign_file(
        lambda why: StageError(f"the official tokenizer failed: {why}. Try `java -version`.")
    ):
        tokens: Tokens = PTBTokenizer().tokenize(given)
    if {i: len(texts) for i, texts in tokens.items()} != {i: len(c) for i, c in given.items()}:
        raise StageError(
            f"the official tokenizer returned {sum(map(len, tokens.values()))} captions of "
            f"{sum(map(len, given.values()))}: its Java program failed. Try `java -version`."
        )
    return tokens


def rouge(wanted: Tokens, found: Tokens) -> float:
    """Return ROUGE-L of captions with the same image ids."""
    return float(Rouge().compute_score(wanted, found)[0])


def cider(wanted: Tokens, found: Tokens) -> float:
    """Return CIDEr of captions with the same image ids.

    Raises:
        ValueError: No reference has a word.
    """
    return float(Cider().compute_score(wanted, found)[0])


def meteor(wanted: Tokens, found: Tokens) -> float:
    """Return METEOR of captions with the same image ids."""
    program = Meteor()
    try:
        with program.meteor_p:
            return float(program.compute_score(wanted, found)[0])
    finally:
        # Its destructor takes the lock too, and would wait for ever for what an error left taken.
        if program.lock.locked():
            program.lock.release()


def spice_f(wanted: Tokens, found: Tokens) -> float:
    """Return SPICE of captions with the same image ids.

    Raises:
        StageError: What it needs is not there and cannot be fetched, or its program failed.
    """
    folder = Path(spice.__file__).parent / "lib"
    try:
        with reading_foreign_file(StageError), silence_limited(FETCH_SECONDS):
            program = spice.Spice()
    except (StageError, OSError) as error:
        raise StageError(
            f"it needs Stanford CoreNLP, which cannot be fetched ({error}). Put "
            f"{' and '.join(CORENLP)} into {folder}"
        ) from None
    try:
        return float(program.compute_score(wanted, found)[0])
    except subprocess.CalledProcessError as error:
        raise StageError(
            f"its Java program ended with exit code {error.returncode}, and what it printed "
            f"stands above. It was written for Java 8; {' and '.join(CORENLP)} in {folder} must "
            f"be whole"
        ) from None


@contextmanager
def silence_limited(seconds: float) -> Iterator[None]:
    """Give up on a server that says nothing for so long; urllib's own limit is none."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
