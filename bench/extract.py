"""How long the extract stage takes as a whole, beside a loop that does less and a usual script.

    python -m bench.extract

Every run is a process of its own in an emptied folder, timed from its start to its end: imports
and making the model count for all alike. Imports that one contender needs stand inside it, so
that none pays for another's. Random weights, which take as long as others.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
import xxhash
from PIL import Image

from bench.command import benchmark_parser, run_benchmark
from cache.files.atomic import write_json

ROOT = Path(__file__).parents[1]
CPU_IMAGES, GPU_IMAGES, QUICK_IMAGES = 512, 8192, 16
"""Image files, of COCO's usual shape and mean size."""
PICTURES = 256
"""How many of them differ."""
ROUNDS = 3
"""Rounds that are timed. One more comes before them: it warms the page cache, and its memory is
watched, which takes time.
"""
BATCH = 64
WATCH_SECONDS = 0.1

ENCODER = {
    "model": "ViT-B-32-quickgelu",
    "pretrained": "random",
    "layer": -2,
    "precision": "bf16",
    "batch_size": BATCH,
    "device": "auto",
}
EXTRACT = {"workers": 2, "engine": "local", "shard_rows": 256, "max_failure_rate": 0.0}
"""On a GPU as many workers as there are cores."""
DATA = {
    "source": "local",
    "train": {"images": "images.zip", "captions": "none"},
    "val": {"images": "images.zip", "captions": "none"},
    "instruct": "none",
    "instruct_holdout": 0.0,
    "max_reject_rate": 0.0,
}

STAGE, BARE = "extract stage", "bare loop, nothing written"
SCRIPTS = ("CLIPImageProcessor", "CLIPImageProcessorPil")
"""Contenders that are named after the preprocessing that they take from transformers; the first
is its default. Which of them is faster depends on the machine.
"""
CONTENDERS = {
    STAGE: ("-m", "pipeline.extract"),
    BARE: ("-c", "from bench.extract import bare_loop; bare_loop()"),
    **{
        name: ("-c", f"from bench.extract import usual_script; usual_script({name!r})")
        for name in SCRIPTS
    },
}
WRITTEN = (".work", "data/features", "reports", "npy")
"""What the contenders leave behind."""
MOST_OF_BARE = 1.05
"""The goal: the stage takes at most this many times as long as the bare loop."""


def bare_loop() -> None:
    """Decode and encode in the working directory as the stage does, and drop the features."""
    from torch.utils.data import DataLoader, Dataset

    from cache.plan import plan_shards
    from pipeline.encoding.batches import BatchDecoder
    from pipeline.encoding.encode import PREFETCH_BATCHES
    from pipeline.encoding.encoder import load_encoder
    from pipeline.images.source import open_images, read_source
    from pipeline.settings import EncoderSettings, ExtractSettings
    from workspace.data_settings import DataSettings
    from workspace.settings import Params

    params = Params.read(Path("params.yaml"))
    settings = params.section("extract", ExtractSettings)
    source = open_images(read_source(), params.section("data", DataSettings))
    encoder = load_encoder(params.section("encoder", EncoderSettings))
    fingerprint = encoder.spec.fingerprint
    plan = plan_shards(source.image_ids, source.source_xxh3, fingerprint, settings.shard_rows)
    decoder = BatchDecoder(plan, source, encoder.spec)

    class Pixels(Dataset[torch.Tensor]):
        """Batches as torch's loader passes them on: in shared memory."""

        def __len__(self) -> int:
            return len(decoder)

        def __getitem__(self, number: int) -> torch.Tensor:
            return torch.from_numpy(decoder.decode(number).pixels_BSSC)

    loader = DataLoader(
        Pixels(),
        batch_size=None,
        num_workers=settings.workers,
        prefetch_factor=PREFETCH_BATCHES,
        pin_memory=encoder.device.type == "cuda",
    )
    for pixels_BSSC in loader:
        encoder.encode(pixels_BSSC)


def usual_script(processor_name: str) -> None:
    """Make such features as many scripts do: transformers, one process, one file an image.

    Args:
        processor_name: The class that decoded pictures are given to.
    """
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = getattr(transformers, processor_name)()
    # The configuration's defaults are ViT-B/32 with QuickGELU.
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig())
    model = model.eval().to(device, torch.bfloat16)
    paths = sorted(Path("images").iterdir())
    Path("npy").mkdir()
    for start in range(0, len(paths), BATCH):
        batch = paths[start : start + BATCH]
        pictures = [Image.open(path).convert("RGB") for path in batch]
        x = processor(images=pictures, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            states = model(x.to(device, torch.bfloat16), output_hidden_states=True).hidden_states
        features = states[-2][:, 1:].to(torch.float16).cpu().numpy()
        for path, patches in zip(batch, features, strict=True):
            np.save(f"npy/{path.stem}.npy", patches)


def jpeg(seed: int) -> bytes:
    """Return a noisy 640 x 480 JPEG of COCO's mean size, 160 kB."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8))
    pixels = np.asarray(small.resize((640, 480), Image.Resampling.BICUBIC)).astype(np.int16)
    pixels = pixels + rng.integers(-16, 17, (480, 640, 1), dtype=np.int16)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def make_workspace(folder: Path, num_images: int, settings: dict[str, Any]) -> None:
    """Write images as a zip and as a folder, their index, and settings."""
    pictures = [jpeg(seed) for seed in range(min(PICTURES, num_images))]
    files = {f"{n:012d}.jpg": pictures[n % len(pictures)] for n in range(num_images)}
    (folder / "images").mkdir()
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
            (folder / "images" / name).write_bytes(data)
    write_index(folder / "data/index", files)
    params = {"data": DATA, "encoder": ENCODER, "extract": settings}
    # JSON is YAML.
    write_json(folder / "params.yaml", params)


def write_index(folder: Path, files: dict[str, bytes]) -> None:
    """Write what the extract stage reads of the index stage's tables."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "image_id": pa.array(range(len(files)), pa.int64()),
        "split": pa.array(["train"] * len(files)),
        "file_name": pa.array(list(files)),
        "source_xxh3": pa.array(map(xxhash.xxh3_64_intdigest, files.values()), pa.uint64()),
    }
    folder.mkdir(parents=True)
    pq.write_table(pa.table(columns), folder / "images.parquet")


def start(contender: str, folder: Path) -> subprocess.Popen[bytes]:
    """Start a contender in the folder, emptied of what the run before wrote."""
    for name in WRITTEN:
        shutil.rmtree(folder / name, ignore_errors=True)
    # Nobody waits for the disk on another's behalf.
    os.sync()
    return subprocess.Popen(
        [sys.executable, *CONTENDERS[contender]],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )


def check_done(contender: str, process: subprocess.Popen[bytes], folder: Path) -> None:
    """Refuse a run that failed or did less than all of its work."""
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    made = wanted = len(list((folder / "images").iterdir()))
    if contender == STAGE:
        made = read_report(folder)["images"]
    if contender in SCRIPTS:
        made = len(list((folder / "npy").glob("*.npy")))
    if made != wanted:
        raise RuntimeError(f"{contender}: made the features of {made} images, wanted {wanted}")


def read_report(folder: Path) -> dict[str, Any]:
    """Return what the stage says of its last run."""
    report: dict[str, Any] = json.loads((folder / "reports/extract.json").read_text())
    return report


def timed(contender: str, folder: Path) -> float:
    """Run a contender; return its seconds on the wall."""
    process = start(contender, folder)
    started = time.perf_counter()
    process.wait()
    seconds = time.perf_counter() - started
    check_done(contender, process, folder)
    return seconds


def watched(contender: str, folder: Path) -> float:
    """Run a contender; return the MiB that its processes held at most, shared pages once."""
    process, peak = start(contender, folder), 0.0
    while process.poll() is None:
        peak = max(peak, held_mib(psutil.Process(process.pid)))
        time.sleep(WATCH_SECONDS)
    check_done(contender, process, folder)
    return peak


def held_mib(process: psutil.Process) -> float:
    """Return the proportional set size of a process and all that it started."""
    held = 0.0
    with contextlib.suppress(psutil.Error):
        for member in (process, *process.children(recursive=True)):
            held += member.memory_full_info().pss / 2**20
    return held


def run_rounds(folder: Path, rounds: int) -> dict[str, Any]:
    """Run all rounds in a workspace and return what the result file says of them."""
    peaks = {contender: round(watched(contender, folder)) for contender in CONTENDERS}
    seconds: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}
    reports: list[dict[str, Any]] = []
    for _ in range(rounds):
        for contender, values in seconds.items():
            values.append(timed(contender, folder))
            if contender == STAGE:
                reports.append(read_report(folder))
    return {
        "median": {name: round(statistics.median(values), 2) for name, values in seconds.items()},
        "runs": {name: [round(value, 2) for value in values] for name, values in seconds.items()},
        "peak_memory_mib": peaks,
        "stage": {
            "images_per_second": statistics.median(r["images_per_second"] for r in reports),
            "seconds": {
                part: statistics.median(report["seconds"][part] for report in reports)
                for part in reports[0]["seconds"]
            },
        },
    }


def goals(median: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Say what was wanted of the stage's seconds, what came out, and whether that is enough."""
    of_bare = median[STAGE] / median[BARE]
    of_script = median[STAGE] / min(median[name] for name in SCRIPTS)
    wanted = f"<= {MOST_OF_BARE}"
    return {
        "time of the bare loop": _goal(wanted, of_bare, of_bare <= MOST_OF_BARE),
        "time of the faster usual script": _goal("< 1", of_script, of_script < 1),
    }


def _goal(wanted: str, ratio: float, met: bool) -> dict[str, Any]:
    return {"wanted": wanted, "found": round(ratio, 3), "met": met}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; return what the result file says."""
    on_gpu = torch.cuda.is_available()
    num_images = GPU_IMAGES if on_gpu else CPU_IMAGES
    if arguments.quick:
        num_images = QUICK_IMAGES
    rounds = 1 if arguments.quick else ROUNDS
    settings = EXTRACT | ({"workers": os.cpu_count()} if on_gpu else {})
    with tempfile.TemporaryDirectory() as name:
        make_workspace(Path(name), num_images, settings)
        found = run_rounds(Path(name), rounds)
    spin_count = os.environ.get("GOMP_SPINCOUNT", "not set")
    setting = {"images": num_images, "GOMP_SPINCOUNT": spin_count} | ENCODER | settings
    result = {
        "unit": "seconds",
        "setting": setting,
        "rounds": rounds,
        **found,
        "goals": goals(found["median"]),
    }
    print_result(result)
    return result


def print_result(result: dict[str, Any]) -> None:
    """Print the table, the stage's own seconds and the goals."""
    print(f"\nextract: median seconds for {result['setting']['images']} images, peak MiB")
    for contender, seconds in result["median"].items():
        print(f"  {contender:<44} {seconds:>8.2f} {result['peak_memory_mib'][contender]:>8}")
    print(f"  the stage's own report: {result['stage']}")
    for goal, outcome in result["goals"].items():
        met = "met" if outcome["met"] else "not met"
        print(f"  of the {goal}: {outcome['found']}, wanted {outcome['wanted']}: {met}")


def main() -> None:
    """Measure and write the result file, named after the kind of machine."""
    run_benchmark(
        f"extract{'_gpu' if torch.cuda.is_available() else ''}",
        measure,
        benchmark_parser(__doc__),
        minutes=4,
        quick_seconds=60,
        libraries=("torch", "open_clip_torch", "transformers", "pillow", "h5py"),
    )


if __name__ == "__main__":
    main()
