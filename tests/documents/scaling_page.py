"""Makes docs/scaling.md from the cost model, whose rates come from the result files.

`python -m tests.documents.measured_tables` writes it.
"""

import math
from collections.abc import Iterable
from pathlib import Path

from bench.cost_model import (
    MFU,
    MILLION,
    break_even_epochs,
    cores_needed,
    encoded_images,
    encoding_share,
    extracted_images,
    extraction_hours,
    extraction_price,
    layout,
    predictions,
    read_bytes,
    requests_price,
    storage_price,
    trained_images,
    transfer_price,
)
from bench.cost_parts.prices import A100, GPUS, H100, L4, PRICES, SOURCES
from bench.cost_parts.published import RUNS
from bench.cost_parts.rates import read_rates, result
from bench.cost_parts.sizes import (
    B32,
    L14,
    L14_336,
    MAX_PLANNED_SHARDS,
    TOWERS,
    mean_shard_rows,
    mean_shards,
    most_images,
)
from bench.cost_parts.work import STAGES, tower_flops

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/scaling.md"
TEMPLATE = Path(__file__).with_suffix(".md")
"""The page, with names in place of its figures and tables."""

SIZES = {"10 M": 10 * MILLION, "400 M": 400 * MILLION, "5 B": 5000 * MILLION}
VECTOR_BYTES = 1536
"""Of a pooled embedding of 768 float16 values."""
RATES = read_rates()

Cells = Iterable[object]


def digits(value: float, count: int = 3) -> str:
    """Return a number with so many digits, commas between thousands."""
    if value == 0:
        return "0"
    places = count - 1 - math.floor(math.log10(abs(value)))
    return f"{round(value, places):,.{max(0, places)}f}"


def two(value: float) -> str:
    return digits(value, 2)


def table(head: Cells, rows: Iterable[Cells]) -> str:
    lines = [[str(cell) for cell in cells] for cells in (head, *rows)]
    texts = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([texts[0], f"|{'---|' * len(lines[0])}", *texts[1:]])


def checked() -> str:
    head = (
        "what",
        "predicted",
        "measured",
        "unit",
        "predicted / measured",
        "held within",
        "measured by",
    )
    return table(
        head,
        (
            (
                found.what,
                digits(found.predicted),
                digits(found.measured),
                found.unit,
                f"{found.ratio:.2f}",
                f"{found.factor:g}",
                f"[{found.source}](../bench/results/{found.source})",
            )
            for found in predictions()
        ),
    )


def stores() -> str:
    head = (
        "images", "tower", "features, TB", "stores", "`shard_rows`", "shards", "MB a shard",
        "index of a store, GB", "footer, MB", "memory to hold a store open, GB", "while opening",
        "S3, $ a month",
    )  # fmt: skip
    return table(head, (_store_row(*size, tower) for size in SIZES.items() for tower in TOWERS))


def _store_row(label, images, tower):
    found = layout(images, tower, RATES)
    return (
        label,
        tower.name,
        digits(found.features / 1e12),
        found.stores,
        f"{found.shard_rows:,}",
        digits(found.shards),
        two(found.shard_bytes / 1e6),
        two(found.index / 1e9),
        two(found.footer / 1e6),
        two(found.open_bytes / 1e9),
        two(found.open_peak_bytes / 1e9),
        two(images / MILLION * storage_price(tower)),
    )


def limits() -> str:
    head = ("`shard_rows`", "an index that a reader takes has at most", "30,000 shards hold")
    return table(
        head,
        (
            (
                f"{rows:,}",
                f"{two(most_images(B32, rows, RATES.index) / MILLION)} M images",
                f"{two(30_000 / mean_shards(MILLION, rows))} M images",
            )
            for rows in (256, 1024, 4096, 8192)
        ),
    )


def extraction() -> str:
    head = (
        "tower", "GFLOP an image", "images/s of an H100", "cores that keep it busy",
        f"images/s with {H100.cores} cores", "GB/s written", "GPU hours a million",
    )  # fmt: skip
    return table(head, (_extraction_row(tower) for tower in TOWERS))


def _extraction_row(tower):
    rate = extracted_images(tower, H100, RATES)
    return (
        tower.name,
        digits(tower_flops(tower) / 1e9),
        two(encoded_images(tower, H100)),
        two(cores_needed(tower, H100, RATES)),
        two(rate),
        two(rate * tower.row_bytes / 1e9),
        two(extraction_hours(MILLION, tower, H100, 1, RATES)),
    )


def hours(value: float) -> str:
    if value < 1:
        return f"{two(60 * value)} min" if value > 1 / 60 else "< 1 min"
    return f"{two(value)} h" if value < 48 else f"{two(value / 24)} days"


def wall_time() -> str:
    head = ("images", "tower", *(f"{gpus} H100" for gpus in (8, 64, 256)))
    return table(
        head,
        (
            (
                label,
                tower.name,
                *(
                    hours(extraction_hours(images, tower, H100, gpus, RATES))
                    for gpus in (8, 64, 256)
                ),
            )
            for label, images in SIZES.items()
            for tower in TOWERS
        ),
    )


def prices_of_extraction() -> str:
    head = (
        "$ a million images",
        *(f"{g.name}, {kind}" for g in GPUS for kind in ("on demand", "marketplace")),
    )
    return table(
        head,
        (
            (
                tower.name,
                *(
                    two(extraction_price(tower, gpu, RATES, spot=spot))
                    for gpu in GPUS
                    for spot in (False, True)
                ),
            )
            for tower in TOWERS
        ),
    )


def reading() -> str:
    head = (
        "tower", "kB an image", *(f"{stage}: images/s of an H100" for stage in STAGES),
        *(f"{stage}: MB/s" for stage in STAGES), "requests a million images, by rows", "by shards",
        "$ by rows", "$ by shards", "$ from another region",
    )  # fmt: skip
    return table(head, (_reading_row(tower) for tower in TOWERS))


def _reading_row(tower):
    shards = mean_shards(MILLION, layout(400 * MILLION, tower, RATES).shard_rows)
    return (
        tower.name,
        digits(tower.row_bytes / 1e3),
        *(two(trained_images(stage, tower, H100)) for stage in STAGES),
        *(two(read_bytes(stage, tower, H100) / 1e6) for stage in STAGES),
        f"{MILLION:,}",
        two(shards),
        two(requests_price(MILLION)),
        two(requests_price(shards)),
        two(transfer_price(tower)),
    )


def worth() -> str:
    head = (
        "tower", "a month in S3, $ a million", "encoding a million again, $",
        "epochs a month from which S3 is cheaper", "the same with a fourth of the patches",
        *(f"encoding again, share of {stage}" for stage in STAGES), "bytes beside the JPEG",
    )  # fmt: skip
    return table(head, (_worth_row(tower) for tower in TOWERS))


def _worth_row(tower):
    once = extraction_price(tower, H100, RATES)
    return (
        tower.name,
        two(storage_price(tower)),
        two(once),
        two(break_even_epochs(tower, H100, RATES, months=1)),
        two(break_even_epochs(tower, H100, RATES, months=0.25)),
        *(f"{100 * encoding_share(stage, tower):.1f} %" for stage in STAGES),
        two(tower.row_bytes / RATES.jpeg_bytes),
    )


def neighbours() -> str:
    head = (
        "engine",
        "model",
        "hardware",
        "images/s",
        "a GPU",
        "a core",
        "what is comparable",
        "published by",
    )
    return table(head, (_neighbour_row(run) for run in RUNS))


def _neighbour_row(run):
    rate = run.images_per_second
    return (
        run.engine,
        run.model,
        run.hardware,
        two(rate) if rate else "",
        two(rate / run.gpus) if rate else "",
        two(rate / run.cores) if rate and run.cores else "",
        run.comparable,
        f"[{run.source[0]}]({run.source[1]})",
    )


def render() -> str:
    """Return the page."""
    return TEMPLATE.read_text().format(**figures())


def figures() -> dict[str, object]:
    """Return what stands for the names in the template."""
    largest = result("large_index")["images"]["10000000"]
    b32 = extracted_images(B32, H100, RATES)
    of_a_store = [layout(SIZES["5 B"], tower, RATES).images for tower in TOWERS]
    smallest, biggest = min(of_a_store), max(of_a_store)
    steps = result("step")["pretrain"]["median"]
    read = result("read")
    batches = {kind: read[kind]["median"]["FeatureBatches"] for kind in ("warm", "cold")}
    return {
        "b32_gb": two(1e6 * B32.row_bytes / 1e9),
        "l336_tb": digits(1e6 * L14_336.row_bytes / 1e12),
        "b32_making": two(extraction_price(B32, H100, RATES)),
        "l336_making": two(extraction_price(L14_336, H100, RATES)),
        "b32_month": two(storage_price(B32)),
        "l336_month": two(storage_price(L14_336)),
        "b32_read": two(read_bytes("stage 1", B32, H100) / 1e6),
        "l336_read": two(read_bytes("stage 1", L14_336, H100) / 1e6),
        "b32_cores": two(cores_needed(B32, H100, RATES)),
        "l336_cores": two(cores_needed(L14_336, H100, RATES)),
        "smallest_store": two(smallest / MILLION),
        "largest_store": two(biggest / MILLION),
        "mean_rows": f"{mean_shard_rows(1024):.0f}",
        "most_shards": f"{MAX_PLANNED_SHARDS:,}",
        "index_mb": digits(largest["bytes"] / 1e6),
        "index_seconds": two(largest["read_seconds"]),
        "entry": two(largest["entry_bytes"] / largest["shards"]),
        "open_bytes": two(RATES.open_bytes),
        "open_peak_bytes": two(RATES.open_peak_bytes),
        "plan_seconds": two(1e6 / RATES.planned_images),
        "mfu": f"{100 * MFU:.0f}",
        "h100_peak": f"{H100.peak_flops / 1e12:.0f}",
        "decoded": digits(RATES.decoded_images),
        "written": digits(RATES.written_bytes / 1e6),
        "h100_cores": H100.cores,
        "a100_cores": A100.cores,
        "l4_cores": L4.cores,
        "b32_used": f"{100 * b32 / encoded_images(B32, H100):.0f}",
        "jpeg_rate": digits(b32 * RATES.jpeg_bytes / 1e6),
        "b32_images": two(b32),
        "eight": two(8 * read_bytes("stage 1", L14_336, H100) / 1e9),
        "warm": digits(batches["warm"] * B32.row_bytes / 1e9),
        "cold": digits(batches["cold"] * B32.row_bytes / 1e9),
        "copies": two(storage_price(B32) / transfer_price(B32)),
        "fewest_epochs": two(break_even_epochs(B32, H100, RATES, 1)),
        "most_epochs": two(break_even_epochs(L14, H100, RATES, 1)),
        "decoding_cores": two(trained_images("stage 1", B32, H100) / RATES.decoded_images),
        "cached_rate": steps["usual loop"],
        "clip_rate": steps["usual loop, with CLIP"],
        "b32_jpegs": two(B32.row_bytes / RATES.jpeg_bytes),
        "jpeg_kb": digits(RATES.jpeg_bytes / 1e3),
        "l336_jpegs": two(L14_336.row_bytes / RATES.jpeg_bytes),
        "b32_vectors": two(B32.row_bytes / VECTOR_BYTES),
        "l336_vectors": two(L14_336.row_bytes / VECTOR_BYTES),
        "l14_a100": two(encoded_images(L14, A100)),
        "clip_retrieval_hours": two(MILLION / RUNS[0].images_per_second / 3600),
        "a100_hours": two(extraction_hours(MILLION, L14, A100, 1, RATES)),
        "checked": checked(),
        "stores": stores(),
        "limits": limits(),
        "extraction": extraction(),
        "wall_time": wall_time(),
        "prices_of_extraction": prices_of_extraction(),
        "reading": reading(),
        "worth": worth(),
        "neighbours": neighbours(),
        "prices": prices(),
    }


def prices() -> str:
    rows = [
        *((f"{gpu.name}, an hour", f"{gpu.hour:g}, marketplace {gpu.spot_hour:g}") for gpu in GPUS),
        ("storage, GB and month", f"{PRICES.storage_gb_month:g} (0.021 above 500 TB)"),
        ("to another region, GB", f"{PRICES.egress_gb:g} (to the internet 0.05 to 0.09)"),
        ("1,000 GET, 1,000 PUT", f"{PRICES.get_thousand:g}, {PRICES.put_thousand:g}"),
    ]
    listed = "\n".join(f"- {what}: {source}." for what, source in SOURCES.items())
    return f"{table(('what', '$'), rows)}\n\n{listed}"
