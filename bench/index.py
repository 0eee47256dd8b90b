"""How long the stage index takes, and how much memory, on data of the published sizes.

    python -m bench.index [--checkout FOLDER ...]

COCO 2017 with LLaVA-Instruct-150K, and LLaVA-1.5's mixture of 665,298 conversations about images in
five places, 40,688 of them without an image. Every run is a fresh process, and each checkout named
takes its turn on the same files; without --checkout, this one alone.
Pictures are one small JPEG over and over, told apart by what follows its end.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.child import run_measured
from bench.coco_sized import (
    COCO,
    QUESTION_WORDS,
    ROOT,
    DataSize,
    Random,
    demo_words,
    draw_picture,
    file_name,
    sentence,
    write_inputs,
    write_pictures,
)
from bench.command import benchmark_parser, run_benchmark
from cache.files.atomic import write_json

ROUNDS = 2
QUICK_DIVISOR = 100

MIX = {
    "coco/train2017": (364_100, 118_287),
    "gqa/images": (72_140, 72_140),
    "ocr_vqa/images": (80_000, 80_000),
    "textvqa/train_images": (21_953, 21_953),
    "vg/VG_100K": (86_417, 86_417),
}
"""Conversations and images of LLaVA-1.5's mixture (arXiv 2310.03744), by folder."""

TEXT_ONLY = 40_688
"""Its conversations without an image, from ShareGPT."""


def mixture(
    rng: Random, words: NDArray[np.object_], names: dict[str, list[str]], divisor: int
) -> Iterator[dict[str, Any]]:
    """Yield the records of a mixture, in random order of their kinds."""
    records = [
        (folder, name)
        for folder, (count, _) in MIX.items()
        for name in rng.choice(names[folder], count // divisor).tolist()
    ]
    records += [("", "")] * (TEXT_ONLY // divisor)
    for number in rng.permutation(len(records)).tolist():
        folder, name = records[number]
        question = sentence(rng, words, QUESTION_WORDS) + "?"
        record: dict[str, Any] = {"id": str(number)}
        if folder:
            question = f"<image>\n{question}"
            record["image"] = f"{folder}/{name}"
        said = [("human", question), ("gpt", sentence(rng, words, (1, 60)))]
        said += [("human", sentence(rng, words, QUESTION_WORDS)), ("gpt", words[0])]
        yield record | {"conversations": [{"from": role, "value": text} for role, text in said]}


def make_mixture(folder: Path, divisor: int) -> None:
    """Make pictures, conversations and settings of a mixture in an empty folder."""
    rng = np.random.default_rng(0)
    picture, names, places = draw_picture(rng), {}, []
    for place, (_, count) in MIX.items():
        image_ids = range(1, count // divisor + 1)
        zip_name = place.replace("/", "_") + ".zip"
        write_pictures(folder / zip_name, image_ids, [picture], mark=place)
        names[place] = [file_name(image_id) for image_id in image_ids]
        places.append({"path": zip_name, "prefix": place})
    write_json(folder / "mix.json", list(mixture(rng, demo_words(), names, divisor)))
    data = {
        "source": "local",
        "train": {"images": places},
        "instruct": "mix.json",
        "instruct_holdout": 0.02,
        "max_reject_rate": 0.0,
    }
    write_json(folder / "params.yaml", {"seed": 0, "data": data})


def measure_size(folder: Path, checkouts: list[Path], rounds: int) -> dict[str, Any]:
    """Run the stage with each checkout in turn, several times; return medians and the report."""
    runs: dict[str, list[dict[str, float]]] = {str(path): [] for path in checkouts}
    for _ in range(rounds):
        for checkout in checkouts:
            for output in ("data", "reports", ".work"):
                shutil.rmtree(folder / output, ignore_errors=True)
            child = run_measured(["-m", "pipeline.index"], folder, checkout)
            child.check(f"index of {checkout}")
            runs[str(checkout)].append({"seconds": child.seconds, **child.memory()})
    report = json.loads((folder / "reports/index.json").read_text())
    result: dict[str, Any] = {
        name: {key: report[name][key] for key in ("read", "kept", "reasons")}
        for name in ("images", "captions", "conversations")
    }
    for number, found in enumerate(runs.values()):
        median = {key: round(statistics.median(run[key] for run in found), 2) for key in found[0]}
        name = "index" if number == len(runs) - 1 else f"checkout {number + 1}"
        result[name] = median
        print(
            f"  {name:<12} {median['seconds']:7.1f} s  {median['peak_anonymous_gib']:6.2f} GiB",
            flush=True,
        )
    return result


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; return what the result file says."""
    divisor, rounds = (QUICK_DIVISOR, 1) if arguments.quick else (1, ROUNDS)
    checkouts = [path.resolve() for path in arguments.checkout] or [ROOT]
    result = {}
    with tempfile.TemporaryDirectory() as name:
        (coco := Path(name) / "coco").mkdir()
        write_inputs(coco, _divided(COCO, divisor))
        print("index: COCO 2017 and LLaVA-Instruct-150K", flush=True)
        result["coco"] = measure_size(coco, checkouts, rounds)
        shutil.rmtree(coco)
        (mix := Path(name) / "mix").mkdir()
        make_mixture(mix, divisor)
        print("index: LLaVA-1.5's mixture", flush=True)
        # Earlier versions know no prefixes.
        result["mix665k"] = measure_size(mix, checkouts[-1:], rounds)
    return result


def _divided(size: DataSize, divisor: int) -> DataSize:
    return size.divided_by(divisor) if divisor > 1 else size


def main() -> None:
    """Measure and write the result file."""
    parser = benchmark_parser(__doc__)
    parser.add_argument(
        "--checkout",
        type=Path,
        action="append",
        default=[],
        help="code to measure, several times the option for several; the last is the subject",
    )
    run_benchmark(
        "index", measure, parser, minutes=15, quick_seconds=60, libraries=("pyarrow", "xxhash")
    )


if __name__ == "__main__":
    main()
