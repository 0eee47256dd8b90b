"""List prices in US dollars, and the GPUs that they are for.

Prices move every month and differ by a factor of four between providers: these are for comparing
one way with another, not for a budget. `Prices` is a dataclass, so that anybody's own can be set.
"""

from dataclasses import dataclass

from bench.gpu_parts.arithmetic import PEAK_FLOPS


@dataclass(frozen=True)
class Gpu:
    """A GPU to rent."""

    name: str
    peak_flops: float
    """Dense bf16, of the data sheet."""
    hour: float
    """On demand."""
    spot_hour: float
    """Where the machine may be taken away: spot, or a marketplace."""
    cores: int
    """Virtual CPUs that the machine has for each GPU."""


H100 = Gpu("H100", PEAK_FLOPS["NVIDIA H100 80GB HBM3"], 4.0, 2.7, 24)
A100 = Gpu("A100", PEAK_FLOPS["NVIDIA A100-SXM4-80GB"], 2.8, 1.4, 12)
L4 = Gpu("L4", PEAK_FLOPS["NVIDIA L4"], 0.8, 0.4, 4)
GPUS = (H100, A100, L4)
"""Rounded list prices of an hour; CPUs of AWS's p5, p4de and g6.xlarge, which are included in the
hourly price."""


@dataclass(frozen=True)
class Prices:
    """What storage, transfer and requests cost: rounded list prices of S3."""

    storage_gb_month: float = 0.023
    """S3 Standard, first 50 TB; 0.021 above 500 TB."""
    egress_gb: float = 0.02
    """From one region to another; within a region it is free, to the internet 0.05 to 0.09."""
    get_thousand: float = 0.0004
    put_thousand: float = 0.005


PRICES = Prices()

SOURCES = {
    "H100, A100 on demand": "Lambda (lambda.ai/instances), machines of 8, September 2026: 3.99 and "
    "2.79; AWS's p5 and p4de in November 2026: 6.88 and 3.43",
    "H100, A100 on a marketplace": "RunPod Community Cloud (runpod.io/pricing), November 2026: "
    "2.69 and 1.39",
    "L4": "a round figure for AWS's g6.xlarge, whose page could not be read in November 2026",
    "storage, transfer, requests": "S3 Standard in us-east-1, the list prices of many years "
    "(aws.amazon.com/s3/pricing, whose numbers could not be read in November 2026)",
}
"""Where the prices come from, and when they were read, from transcriptions of these pages."""
