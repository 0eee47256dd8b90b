"""Runs the programs of the official COCO caption evaluation: its tokenizer, METEOR and SPICE.

pycocoevalcap ships these Java programs and calls them. SPICE also needs Stanford CoreNLP, which
pycocoevalcap downloads into its own folder at first use.
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
"""Files that SPICE needs and pycocoevalcap does not ship."""

DOWNLOAD_TIMEOUT = 30
"""Seconds without an answer after which a download is given up."""

Tokens = dict[int, list[str]]
"""Image id to captions, whose tokens are separated by spaces."""


@dataclass(frozen=True)
class OfficialScores:
    """The scores of the official programs, and the reasons for those that are missing."""

    scores: dict[str, float]
    """The scores of `eval.metrics.score_captions`, and METEOR and SPICE, which go from 0 to 1."""
    missing: dict[str, str]
    """Name of a score to the reason why it could not be computed."""


def check_java() -> None:
    """Check that Java is installed.

    Raises:
        SettingsError: There is no `java` on PATH.
    """
    if shutil.which("java") is None:
        raise SettingsError(
            "--official runs Java programs, and there is no `java` on PATH. Install a Java "
            "runtime, 8 or newer (Debian and Ubuntu: `apt install default-jre-headless`), or "
            "leave --official out."
        )


def score_officially(
    references: Mapping[int, Sequence[str]], candidates: Mapping[int, str]
) -> OfficialScores:
    """Score one caption per image with the official programs.

    Args:
        references: Image id to at least one caption by a person.
        candidates: Image id to the caption to score, for the same images.

    Raises:
        StageError: The tokenizer failed, so that no score could be computed.
    """
    wanted = tokenize(references)
    found = tokenize({image_id: [candidates[image_id]] for image_id in references})
    bleu, _ = Bleu(4).compute_score(wanted, found, verbose=0)
    scores = {f"BLEU-{n}": float(value) for n, value in enumerate(bleu, start=1)}
    missing = {}
    programs: dict[str, Callable[[Tokens, Tokens], float]] = {
        "ROUGE-L": lambda wanted, found: float(Rouge().compute_score(wanted, found)[0]),
        # A ValueError if no reference has a word.
        "CIDEr": lambda wanted, found: float(Cider().compute_score(wanted, found)[0]),
        "METEOR": meteor,
        "SPICE": spice_f,
    }
    for name, program in programs.items():
        try:
            # A Java program that ends early and a failed download raise exceptions of any kind.
            with reading_foreign_file(StageError):
                scores[name] = program(wanted, found)
        except (StageError, OSError) as error:
            missing[name] = str(error)
    return OfficialScores(scores, missing)


def tokenize(captions: Mapping[int, Sequence[str]]) -> Tokens:
    """Split captions as the official evaluation does, in order of image id.

    Raises:
        StageError: The Java program failed, or returned another number of captions.
    """
    # The Java program ends a caption at a carriage return, a form feed, U+2028 and the like; all
    # later captions would go to the wrong images.
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


def meteor(wanted: Tokens, found: Tokens) -> float:
    """Return METEOR of captions with the same image ids."""
    program = Meteor()
    try:
        with program.meteor_p:
            return float(program.compute_score(wanted, found)[0])
    finally:
        # An error leaves the lock taken, and the program's destructor would wait for it forever.
        if program.lock.locked():
            program.lock.release()


def spice_f(wanted: Tokens, found: Tokens) -> float:
    """Return SPICE of captions with the same image ids.

    Raises:
        StageError: CoreNLP is missing and cannot be downloaded, or the Java program failed.
    """
    folder = Path(spice.__file__).parent / "lib"
    try:
        with reading_foreign_file(StageError), socket_timeout(DOWNLOAD_TIMEOUT):
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
            f"its Java program ended with exit code {error.returncode}; its output stands above. "
            f"It was written for Java 8, and {' and '.join(CORENLP)} in {folder} must be intact"
        ) from None


@contextmanager
def socket_timeout(seconds: float) -> Iterator[None]:
    """Set the timeout of new sockets; urllib itself waits forever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
