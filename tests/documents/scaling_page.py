"""Makes docs/scaling.md from the cost model, whose rates come from the result files.

`python -m tests.documents.measured_tables` writes it.
"""

import math
from collections.abc import Iterable
from pathlib import Path

from bench.cost_model import (
    BUSY,
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
    MAX_SHARDS,
    TOWERS,
    mean_shard_rows,
    mean_shards,
    most_images,
)
from bench.cost_parts.work import tower_flops

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/scaling.md"

SIZES = {"10 M": 10 * MILLION, "400 M": 400 * MILLION, "5 B": 5000 * MILLION}
STAGES = ("stage 1", "stage 2")
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
    largest = result("large_index")["images"]["10000000"]
    b32, l14, large = (extracted_images(tower, H100, RATES) for tower in TOWERS)
    of_a_store = [layout(SIZES["5 B"], tower, RATES).images for tower in TOWERS]
    smallest, biggest = min(of_a_store), max(of_a_store)
    steps = result("step")["pretrain"]["median"]
    return f"""# Past one machine: bytes, hours, prices

What 10 million, 400 million and 5 billion images cost, and when they are better not cached. **Measured** figures come from `bench/results/` (two shared CPU cores); **computed** ones from the
formulas of `bench/cost_model.py`; **published** ones from the page that is linked. Nothing here was run on more than one machine, or on a GPU. This page is made by
`python -m tests.documents.measured_tables`.

- **Bytes decide, not hours.** A million images are {two(1e6 * B32.row_bytes / 1e9)} GB with ViT-B/32 and {digits(1e6 * L14_336.row_bytes / 1e12)} TB with ViT-L/14-336. Making them costs ${two(extraction_price(B32, H100, RATES))} to ${two(extraction_price(L14_336, H100, RATES))}; a month in S3 costs ${two(storage_price(B32))} to ${two(storage_price(L14_336))}.
- **Reading is easy.** One H100 that trains Phi-2 takes {two(read_bytes("stage 1", B32, H100) / 1e6)} MB/s (ViT-B/32) to {two(read_bytes("stage 1", L14_336, H100) / 1e6)} MB/s (ViT-L/14-336).
- **Decoding is the limit of extraction with small towers**: an H100 would need {two(cores_needed(B32, H100, RATES))} cores with ViT-B/32, and {two(cores_needed(L14_336, H100, RATES))} with ViT-L/14-336.
- **One store ends at {two(smallest / MILLION)} to {two(biggest / MILLION)} million images**, by limits of Linux and of memory; beyond that, stores lie side by side, which training does not read today.

## Checked against the benchmarks

Each prediction uses other measurements than the one beside it. The bytes of a shard and of a store are exact, and a test writes stores to show it.

{checked()}

The mixture's conversations are longer than COCO's captions, and the prediction counts records alike: it is the loosest one, and only says that the stage grows with its records. A shard has
{mean_shard_rows(1024):.0f} rows on the mean for a `shard_rows` of 1,024, since no shard has more than twice that.

## What is stored

Computed; bytes of an index and memory from [large_index.json](../bench/results/large_index.json) and [scale.json](../bench/results/scale.json).

{stores()}

`shard_rows` stays at 1,024 up to {MAX_SHARDS:,} shards, and grows by powers of two as long as a mean shard has at most 600 MB, of which extraction holds up to twice as much in memory. Larger shards mean fewer files, mappings and requests;
smaller ones mean less to encode again after a kill, less to send after a change, and an even end on many GPUs.

## When one index.parquet is too much

Ten million images have an index of {digits(largest["bytes"] / 1e6)} MB that is read in {two(largest["read_seconds"])} seconds (measured), so its size is not what ends it. Three limits come first:

- **The footer.** It lists every shard ({two(largest["entry_bytes"] / largest["shards"])} bytes each) and every row group, and a reader refuses more than 16 MiB. The table shows where that is; more than 10,000 row groups, 655 million images, are always refused.
  Writing is not refused: `shard_rows` has to be chosen before the first image is encoded.
- **Mappings.** Linux gives a process 65,530 of them (`vm.max_map_count`), and a mapped shard takes two. The 32,311th shard of a store could not be mapped (measured); the error says "cannot be mapped: Cannot allocate memory".
  `sysctl vm.max_map_count=1048576`, which Ubuntu 24.04 has from the start, moves that to half a million shards.
- **Memory and start.** Every process that opens a store holds {two(RATES.open_bytes)} bytes an image, and {two(RATES.open_peak_bytes)} while it opens it. Planning takes {two(1e6 / RATES.planned_images)} seconds a million images.

{limits()}

What then: **stores side by side**, one for each range of image ids, each with its own `spec.json`, index and shards. One spec serves all of them, since it says what made the features and not of which images.
What works today: a workspace for each range makes its store (`data` names its pictures); each store is verified, described, shared and replaced by itself; `FeatureStore` opens each, in one process or in many. What does not: the training stages take one
store, so that training on several needs a loop of your own over `FeatureStore(path)`, in which every rank opens its share of the stores; no command joins or cuts stores; nothing checks that no image is in two of them.

## Extraction

Computed: operations of all blocks but the last, at {100 * BUSY:.0f} % of an H100's {H100.peak_flops / 1e12:.0f} TFLOP/s. {100 * BUSY:.0f} % is an assumption, between published inference of CLIP towers at 18 % (clip-retrieval on an A100, decoding included) and 59 % (timm on an RTX 4090, pixels on the GPU already).
Measured: a core decodes {digits(RATES.decoded_images)} photographs of 640 x 480 a second ([encode_cpu.json](../bench/results/encode_cpu.json)), and hashes and writes {digits(RATES.written_bytes / 1e6)} MB/s ([extract.json](../bench/results/extract.json)).
A machine is assumed to have {H100.cores} virtual CPUs for each H100, {A100.cores} for an A100, {L4.cores} for an L4.

{extraction()}

{wall_time()}

{prices_of_extraction()}

With ViT-B/32 {100 * b32 / encoded_images(B32, H100):.0f} % of an H100 is used, and a million images cost about the same on an L4. With ViT-L/14 every GPU is busy. Downloading the pictures is not counted: {digits(b32 * RATES.jpeg_bytes / 1e6)} MB/s of JPEGs for a GPU at {two(b32)} images a second.

## Reading

Computed: stage 1 with five captions an image, stage 2 with its conversations, packed, Phi-2, at {100 * BUSY:.0f} % of an H100; the last five columns are for an epoch over a million images.

{reading()}

Eight H100 take {two(8 * read_bytes("stage 1", L14_336, H100) / 1e9)} GB/s at most; this project reads {digits(result("read")["warm"]["median"]["FeatureBatches"] * B32.row_bytes / 1e9)} GB/s from memory and {digits(result("read")["cold"]["median"]["FeatureBatches"] * B32.row_bytes / 1e9)} GB/s from a disk on two cores ([read.json](../bench/results/read.json)).
Rows that lie close are one request, so that a million requests are the most. Transfer within a region is free; to another one it costs more than a month of storage after {two(storage_price(B32) / transfer_price(B32))} epochs: copy the store once.

## Where caching stops paying

{worth()}

- **Against S3, a cache needs {two(break_even_epochs(B32, H100, RATES, 1))} to {two(break_even_epochs(L14, H100, RATES, 1))} epochs a month** (prices alone, an H100, pictures at hand, one month). With four epochs in all, as in `configs/coco.yaml`, encoding at every step is cheaper than renting S3 for the features. On disks that are there anyway, a cache pays from the second epoch.
- **On an H100 with Phi-2, CLIP is a small share of a step.** What a cache saves there is less the GPU than the decoding cores ({two(trained_images("stage 1", B32, H100) / RATES.decoded_images)} for each H100) and the pictures on every machine; and all runs see the same bits.
- **On small machines and with small models it is the other way round**: on two CPU cores, CLIP at every step takes stage 1 from {steps["usual loop"]} to {steps["usual loop, with CLIP"]} captions a second ([step.json](../bench/results/step.json)), and a sweep of ten runs reads the same features ten times.
- ViT-B/32's features have {two(B32.row_bytes / RATES.jpeg_bytes)} of the bytes of a photograph of 640 x 480 ({digits(RATES.jpeg_bytes / 1e3)} kB): an epoch reads less than from the pictures. Those of ViT-L/14-336 have {two(L14_336.row_bytes / RATES.jpeg_bytes)} times as many.

What would shrink the features: averaging squares of 2 x 2 patches before they are stored, to a fourth (`projector.pool` averages what it reads, and the store stays whole; `write_store` takes features that were averaged before); a tower with fewer patches, as ViT-B/32 has a fifth of
ViT-L/14's. float8 would halve them; the format has float16 alone. Compression [gains nothing](design-notes.md#the-store) on float16 features.

## Neighbours

Published by others, on their machines; none of it was repeated here. They keep a label or one vector of about 1.5 kB an image; this project keeps every patch, {two(B32.row_bytes / 1536)} to {two(L14_336.row_bytes / 1536)} times the bytes, so that their writing is not comparable. What is comparable is
images a second of a GPU and of a core, beside {digits(RATES.decoded_images)} decoded images a second of a core here, and {two(encoded_images(L14, A100))} images a second computed for ViT-L/14 on an A100.

{neighbours()}

clip-retrieval's 312 on an A100 are {two(MILLION / 312 / 3600)} GPU hours a million images with ViT-L/14, where the table above computes {two(extraction_hours(MILLION, L14, A100, 1, RATES))}. Its 7,000 with ViT-B/32 on 8 A100, for one GPU alone 2,500, show the same limit as above: cores, not GPUs. A published run of Ray Data or Anyscale over LAION was not found.

## Prices

US dollars; list prices, rounded. They differ by a factor of four between providers, so read the ratios; `bench.cost_parts.prices` holds them in one dataclass.

{prices()}
"""


def prices() -> str:
    rows = [
        *((f"{gpu.name}, an hour", f"{gpu.hour:g}, marketplace {gpu.spot_hour:g}") for gpu in GPUS),
        ("storage, GB and month", f"{PRICES.storage_gb_month:g} (0.021 above 500 TB)"),
        ("to another region, GB", f"{PRICES.egress_gb:g} (to the internet 0.05 to 0.09)"),
        ("1,000 GET, 1,000 PUT", f"{PRICES.get_thousand:g}, {PRICES.put_thousand:g}"),
    ]
    listed = "\n".join(f"- {what}: {source}." for what, source in SOURCES.items())
    return f"{table(('what', '$'), rows)}\n\n{listed}"
