"""Cost model for making, storing and reading the features of many images, from measured rates.

Bytes follow from the shape of a tower. Seconds of a CPU come from the result files of this folder.
Seconds of a GPU are operations over a share of the data sheet's rate: computed, until a result file
of `bench.gpu` is there to check them. `predictions` holds the model against the benchmarks, and
docs/scaling.md shows the results.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cost_parts.prices import PRICES, Gpu, Prices
from bench.cost_parts.rates import Rates, read_rates, result
from bench.cost_parts.sizes import (
    B32,
    L14_336,
    USUAL_SHARD_ROWS,
    Tower,
    feature_bytes,
    footer_bytes,
    index_bytes,
    mean_shards,
    plan_stores,
)
from bench.cost_parts.work import tower_flops, training_flops
from bench.gpu_parts.arithmetic import PEAK_FLOPS
from bench.gpu_parts.goals import EXTRACTION, rates_of
from bench.gpu_parts.report import measured
from bench.measure import RESULTS
from bench.texts import CAPTIONS_AN_IMAGE

MFU = 0.4
"""Model FLOPs utilization: the share of the data sheet's rate that a GPU reaches, as in
docs/gpu.md. Published inference of CLIP towers has 0.18 (clip-retrieval, A100) to 0.59 (timm, RTX
4090, pixels already on the GPU)."""

MILLION = 1_000_000
GB = 1e9


def encoded_images(tower: Tower, gpu: Gpu, mfu: float = MFU) -> float:
    """Return the images a second of the tower's forward pass on a GPU."""
    return mfu * gpu.peak_flops / tower_flops(tower)


def core_seconds(tower: Tower, rates: Rates) -> float:
    """Return the seconds of a core for an image: decoding, and its part of a shard."""
    return 1 / rates.decoded_images + tower.row_bytes / rates.written_bytes


def cores_needed(tower: Tower, gpu: Gpu, rates: Rates) -> float:
    """Return the cores that keep a GPU busy during extraction."""
    return encoded_images(tower, gpu) * core_seconds(tower, rates)


def extracted_images(tower: Tower, gpu: Gpu, rates: Rates) -> float:
    """Return the images a second of an extraction for each GPU, with the cores of its machine."""
    return min(encoded_images(tower, gpu), gpu.cores / core_seconds(tower, rates))


def extraction_hours(images: float, tower: Tower, gpu: Gpu, gpus: int, rates: Rates) -> float:
    """Return the hours of the clock of an extraction."""
    return images / extracted_images(tower, gpu, rates) / gpus / 3600


def extraction_price(tower: Tower, gpu: Gpu, rates: Rates, *, spot: bool = False) -> float:
    """Return the price of extracting a million images: hours of GPUs, whose machines have cores."""
    hour = gpu.spot_hour if spot else gpu.hour
    return hour * extraction_hours(MILLION, tower, gpu, 1, rates)


def encoding_price(tower: Tower, gpu: Gpu, rates: Rates) -> float:
    """Return the price of encoding a million images again, nothing written."""
    images = min(encoded_images(tower, gpu), gpu.cores * rates.decoded_images)
    return gpu.hour * MILLION / images / 3600


def storage_price(tower: Tower, prices: Prices = PRICES) -> float:
    """Return the price of keeping the features of a million images for a month."""
    shards = feature_bytes(MILLION, tower.row_bytes, USUAL_SHARD_ROWS)
    return shards / GB * prices.storage_gb_month


def requests_price(requests: float, prices: Prices = PRICES) -> float:
    """Return the price of so many GET requests."""
    return requests / 1000 * prices.get_thousand


def transfer_price(tower: Tower, prices: Prices = PRICES) -> float:
    """Return the price of moving the features of a million images to another region."""
    return MILLION * tower.row_bytes / GB * prices.egress_gb


def trained_images(stage: str, tower: Tower, gpu: Gpu, mfu: float = MFU) -> float:
    """Return the images a second that one GPU trains Phi-2 with, each with all its texts."""
    return mfu * gpu.peak_flops / training_flops(stage, tower)


def read_bytes(stage: str, tower: Tower, gpu: Gpu) -> float:
    """Return the bytes a second that keep one training GPU fed."""
    return trained_images(stage, tower, gpu) * tower.row_bytes


def encoding_share(stage: str, tower: Tower) -> float:
    """Return the operations of encoding an image over those of training with it."""
    return tower_flops(tower) / training_flops(stage, tower)


def break_even_epochs(
    tower: Tower, gpu: Gpu, rates: Rates, months: float, prices: Prices = PRICES
) -> float:
    """Return after how many epochs a cache in object storage costs less than encoding each time.

    Reading is within a region and by whole shards, so that it costs next to nothing.
    """
    shards = mean_shards(MILLION, USUAL_SHARD_ROWS)
    once = extraction_price(tower, gpu, rates) + shards / 1000 * prices.put_thousand
    kept = months * storage_price(tower, prices)
    epoch = requests_price(shards, prices)
    return (once + kept) / (encoding_price(tower, gpu, rates) - epoch)


@dataclass(frozen=True)
class Layout:
    """Stores side by side that hold so many images."""

    stores: int
    images: int
    """Of a store."""
    shard_rows: int
    shards: float
    """Of all stores."""
    shard_bytes: float
    """Mean size."""
    features: float
    """Bytes of all shards."""
    index: float
    """Bytes of one store's index."""
    footer: float
    """Bytes of its footer."""
    open_bytes: float
    """Memory of a process that opened one store."""
    open_peak_bytes: float
    """The same, while it opens it."""


def layout(images: int, tower: Tower, rates: Rates) -> Layout:
    """Return the stores that `plan_stores` chooses, with their indexes."""
    plan = plan_stores(images, tower)
    of_index = (plan.images, plan.shards, plan.shard_bytes, rates.index)
    return Layout(
        plan.stores,
        plan.images,
        plan.shard_rows,
        plan.stores * plan.shards,
        plan.shard_bytes,
        plan.stores * plan.features,
        index_bytes(*of_index),
        footer_bytes(*of_index),
        plan.images * rates.open_bytes,
        plan.images * rates.open_peak_bytes,
    )


@dataclass(frozen=True)
class Prediction:
    """A figure of the model beside the one that a benchmark measured."""

    what: str
    predicted: float
    measured: float
    unit: str
    factor: float
    """The prediction holds if neither is more than so many times the other."""
    source: str
    """Result file that has the measured figure."""

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.measured

    @property
    def holds(self) -> bool:
        """Whether the prediction is within its factor."""
        return 1 / self.factor <= self.ratio <= self.factor


def predictions(results: Path = RESULTS) -> list[Prediction]:
    """Predict what benchmarks measured, each from other measurements than its own."""
    rates = read_rates(results)
    checks = (_of_stores, _of_stages, _of_reading, _of_full_coco, _of_gpus)
    return [found for check in checks for found in check(rates, results)]


def _of_stores(rates: Rates, results: Path) -> Iterator[Prediction]:
    scale, indexes = result("scale", results), result("large_index", results)["images"]
    size = max(scale["setting"]["shards"], key=int)
    rows, found = scale["setting"]["shard_rows"], scale["setting"]["shards"][size]
    shards = mean_shards(int(size), rows)
    yield Prediction(f"shards of {int(size):,} images", shards, found, "shards", 1.2, "scale.json")
    sizes = sorted(map(int, scale["median"]))
    low, middle, high = (scale["median"][str(images)]["open_seconds"] for images in sizes)
    opening = low + (high - low) * (sizes[1] - sizes[0]) / (sizes[2] - sizes[0])
    yield Prediction(f"opening {sizes[1]:,} images", opening, middle, "s", 1.5, "scale.json")
    middle_size = sorted(indexes, key=int)[1]
    figures = indexes[middle_size]
    num_bytes = figures["entry_bytes"] + figures["row_groups"] * rates.index.group_bytes
    yield Prediction(
        f"index.parquet of {int(middle_size):,} images",
        (int(middle_size) * rates.index.row_bytes + num_bytes) / 1e6,
        figures["bytes"] / 1e6,
        "MB",
        1.02,
        "large_index.json",
    )


def _of_stages(rates: Rates, results: Path) -> Iterator[Prediction]:
    extract, index = result("extract", results), result("index", results)
    cores = extract["machine"]["threads"]
    seconds = core_seconds(B32, rates) + 1 / rates.encoded_images
    yield Prediction(
        "extract, ViT-B/32 on two cores",
        cores / seconds,
        extract["stage"]["images_per_second"],
        "images/s",
        1.5,
        "extract.json",
    )
    coco, mixture = (index[name] for name in ("coco", "mix665k"))
    per_record = coco["index"]["seconds"] / _records(coco)
    yield Prediction(
        "index of LLaVA's 665k mixture",
        per_record * _records(mixture),
        mixture["index"]["seconds"],
        "s",
        4.0,
        "index.json",
    )


def _records(data: dict[str, Any]) -> int:
    return sum(int(data[kind]["read"]) for kind in ("images", "captions", "conversations"))


def _of_reading(rates: Rates, results: Path) -> Iterator[Prediction]:
    verify, read = result("verify", results), result("read", results)
    num_bytes = verify["setting"]["bytes"]
    yield Prediction(
        "verify, from the disk",
        num_bytes / min(rates.hashed_bytes, rates.disk_bytes),
        verify["cold"]["median"]["FeatureStore.verify"],
        "s",
        1.6,
        "verify.json",
    )
    yield Prediction(
        "random batches of ViT-B/32, from the disk",
        rates.disk_bytes / B32.row_bytes,
        read["cold"]["median"]["FeatureBatches"],
        "rows/s",
        1.6,
        "read.json",
    )


def _of_full_coco(rates: Rates, results: Path) -> Iterator[Prediction]:
    if (found := result("full_coco", results)) is None:
        return
    images = found["setting"]["images"]
    num_bytes = feature_bytes(images, B32.row_bytes, USUAL_SHARD_ROWS)
    source = "full_coco.json"
    yield Prediction(
        "features of COCO", num_bytes / GB, found["write"]["bytes"] / GB, "GB", 1.01, source
    )
    yield Prediction(
        "shards of COCO",
        mean_shards(images, USUAL_SHARD_ROWS),
        found["plan"]["shards"],
        "shards",
        1.3,
        source,
    )
    yield Prediction(
        "verify of COCO, from the disk",
        num_bytes / min(rates.hashed_bytes, rates.disk_bytes),
        found["verify"]["seconds"],
        "s",
        2.5,
        source,
    )
    index = result("index", results)["coco"]["index"]["seconds"]
    yield Prediction("index of COCO", index, found["index"]["seconds"], "s", 2.0, source)


def _of_gpus(rates: Rates, results: Path) -> Iterator[Prediction]:
    for path in sorted(results.glob("gpu_*.json")):
        found = result(path.stem, results)
        name, parts = found["machine"]["gpu"], found["parts"]
        if name not in PEAK_FLOPS:
            continue
        gpu = Gpu(name, PEAK_FLOPS[name], 0, 0, 0)
        for tower, model in ((B32, "ViT-B-32-quickgelu"), (L14_336, "ViT-L-14-336-quickgelu")):
            if row := measured(parts.get(EXTRACTION), f"{model}, decoded"):
                yield _of_gpu(
                    tower.name, encoded_images(tower, gpu), row["images_per_second"], path
                )
        if captions := rates_of(parts).captions_per_second:
            trained = trained_images("stage 1", B32, gpu)
            yield _of_gpu("stage 1 with NF4", trained, captions / CAPTIONS_AN_IMAGE, path)


def _of_gpu(what: str, predicted: float, found: float, path: Path) -> Prediction:
    return Prediction(what, predicted, found, "images/s", 3.0, path.name)
