"""What Ray costs: the extract stage's two engines, and a bare Ray Data script, on the same cores.

    python -m bench.ray_engine

Each contender runs in a process of its own that stays, with Ray started and one round done before
the clock, whose seconds are told beside. The local engine and the Ray engine keep their towers
loaded. Ray Data starts its actors, and loads the tower, in each run: beside it stands the Ray
engine that does so too. The bare script decodes and encodes the same images with the same code,
and drops the features. Memory is that of a contender's processes together, in one more round.
"""

import argparse
import contextlib
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from bench.command import benchmark_parser, run_benchmark
from bench.extract import held_mib
from bench.gpu_parts.extraction import make_images, tower_settings
from bench.measure import at_least, interleaved, medians, print_goals, print_table, summary
from cache.plan import plan_shards
from pipeline.encoding.batches import BatchDecoder, DecodedBatch, Job
from pipeline.encoding.encode import ShardEncoder
from pipeline.encoding.encoder import Encoder, load_encoder
from pipeline.encoding.probe import encode_probe_images, serialize_probe
from pipeline.encoding.stats import ExtractionStats

ROOT = Path(__file__).parents[1]
MODEL = "ViT-B-32-quickgelu"
CPUS = 2
NUM_IMAGES, QUICK_IMAGES = 192, 32
SHARD_ROWS = 32
ROUNDS = 2
WATCH_SECONDS = 0.2
LOCAL, RAY = "local engine", "Ray engine"
ANEW, BARE = "Ray engine, encoders started anew", "bare Ray Data, which starts them anew"
GOALS = ((RAY, LOCAL, 0.9), (ANEW, BARE, 0.95))
"""What the images a second of one are to be at least, as a share of the other's."""


SERVE = "import sys; from bench.ray_engine import serve; serve(*sys.argv[1:])"


def make_job(folder: Path, num_images: int, name: str, encoder: Encoder) -> Job:
    """Return images as one job, whose shards are written to a folder of that name."""
    source = make_images(folder / f"{name}.zip", num_images)
    spec = encoder.spec
    probe = folder / f"{name}.probe"
    probe.write_bytes(serialize_probe(encode_probe_images(encoder), spec))
    (folder / name).mkdir(exist_ok=True)
    return Job(
        shards=plan_shards(source.image_ids, source.source_xxh3, spec.fingerprint, SHARD_ROWS),
        source=source,
        settings=tower_settings(MODEL, "fp32", torch.device("cpu")),
        spec=spec,
        probe=probe,
        folder=folder / name,
        workers=CPUS,
        engine="local",
        max_failures=0,
    )


def local_engine(job: Job, encoder: Encoder) -> Iterator[Callable[[], object]]:
    """Yield the work of the local engine."""
    yield lambda: ShardEncoder(job, encoder, ExtractionStats(), lambda count: None).run()


def ray_engine(job: Job, encoder: Encoder) -> Iterator[Callable[[], object]]:
    """Yield the work of the Ray engine; its encoders stay loaded between rounds."""
    from pipeline.cluster.engine import cluster_run

    with cluster_run(job, None, ExtractionStats(), lambda count: None) as run:
        yield run.encode_all


def ray_engine_anew(job: Job, encoder: Encoder) -> Iterator[Callable[[], object]]:
    """Yield the work of the Ray engine, whose encoders start in each round."""
    from pipeline.cluster.engine import cluster_run

    with cluster_run(job, None, ExtractionStats(), lambda count: None) as run:

        def work() -> None:
            run.encode_all()
            run.close()

        yield work


def bare_ray_data(job: Job, encoder: Encoder) -> Iterator[Callable[[], object]]:
    """Yield the work of a Ray Data script: tasks decode batches, a pool of one actor encodes."""
    import ray
    import ray.data

    from pipeline.cluster.connection import connected

    settings, threads = job.settings, torch.get_num_threads()
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    with connected(None, CPUS, 512 << 20):
        ray.data.DataContext.get_current().enable_progress_bars = False
        decoder = ray.put(BatchDecoder(job.shards, job.source, job.spec))
        num_batches = len(BatchDecoder(job.shards, job.source, job.spec))

        def decode(row: dict[str, Any]) -> dict[str, Any]:
            batch: DecodedBatch = ray.get(decoder).decode(int(row["id"]))
            return {"pixels": batch.pixels_BSSC}

        class Forward:
            def __init__(self) -> None:
                torch.set_num_threads(threads)
                self.encoder = load_encoder(settings)

            def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
                features = [self.encoder.encode(torch.tensor(p)) for p in batch["pixels"]]
                return {"rows": [len(f) for f in features]}

        def work() -> None:
            data = ray.data.range(num_batches, override_num_blocks=num_batches)
            encoded = data.map(decode).map_batches(
                Forward, batch_size=1, compute=ray.data.ActorPoolStrategy(size=1), num_cpus=0
            )
            rows = sum(row["rows"] for row in encoded.iter_rows())
            if rows != len(job.source.image_ids):
                raise RuntimeError(f"bare Ray Data encoded {rows} images")

        yield work


CONTENDERS = {LOCAL: local_engine, RAY: ray_engine, ANEW: ray_engine_anew, BARE: bare_ray_data}


def serve(name: str, folder: str, num_images: str) -> None:
    """Answer each line of stdin with the seconds that the work took; a contender's process."""
    encoder = load_encoder(tower_settings(MODEL, "fp32", torch.device("cpu")))
    job = make_job(Path(folder), int(num_images), name.replace(" ", "-"), encoder)
    with contextlib.contextmanager(CONTENDERS[name])(job, encoder) as work:
        work()
        print("ready", flush=True)
        for _ in sys.stdin:
            started = time.perf_counter()
            work()
            print(time.perf_counter() - started, flush=True)


class Contender:
    """A contender's process."""

    def __init__(self, name: str, folder: Path, num_images: int) -> None:
        started = time.perf_counter()
        self.num_images = num_images
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, name, str(folder), str(num_images)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": ""},
        )
        self._answer()
        self.first_seconds = time.perf_counter() - started

    def _answer(self) -> str:
        assert self.process.stdout
        answer = self.process.stdout.readline().strip()
        if not answer:
            raise RuntimeError(f"the process of a contender ended: {self.process.wait()}")
        return answer

    def rate(self) -> float:
        """Work once; return images a second."""
        assert self.process.stdin
        print(file=self.process.stdin, flush=True)
        return self.num_images / float(self._answer())

    def peak_mib(self) -> float:
        """Work once; return the most memory of its processes together."""
        peak, done = 0.0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(WATCH_SECONDS):
                peak = max(peak, held_mib(psutil.Process(self.process.pid)))

        watcher = threading.Thread(target=watch)
        watcher.start()
        self.rate()
        done.set()
        watcher.join()
        return peak

    def close(self) -> None:
        """End the process; Ray ends with it."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(60)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; return what the result file says."""
    num_images = QUICK_IMAGES if arguments.quick else NUM_IMAGES
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        contenders = {}
        for contender in CONTENDERS:
            contenders[contender] = Contender(contender, Path(name), num_images)
            stack.callback(contenders[contender].close)
        rates = interleaved(
            {contender: made.rate for contender, made in contenders.items()},
            1 if arguments.quick else ROUNDS,
        )
        peaks = {contender: round(made.peak_mib()) for contender, made in contenders.items()}
        first = {contender: round(made.first_seconds, 1) for contender, made in contenders.items()}
    median = medians(rates)
    print_table("ray_engine", "images", median)
    goals = {
        f"images a second, {name} of {other}": at_least(wanted, median[name] / median[other])
        for name, other, wanted in GOALS
    }
    print_goals(goals)
    print(f"  seconds until the first work was done: {first}; peak MiB: {peaks}")
    return {
        "unit": "images/s",
        "setting": {"images": num_images, "model": MODEL, "cpus": CPUS, "shard_rows": SHARD_ROWS},
        **summary(rates),
        "seconds_until_first_work_was_done": first,
        "peak_memory_mib": peaks,
        "goals": goals,
    }


def main() -> None:
    """Measure and write the result file."""
    run_benchmark(
        "ray_engine",
        measure,
        benchmark_parser(__doc__),
        minutes=7,
        quick_seconds=90,
        libraries=("ray", "torch", "open_clip_torch", "pillow"),
    )


if __name__ == "__main__":
    main()
