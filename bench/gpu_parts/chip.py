"""The ceilings of a chip: how fast it multiplies bf16 matrices, and how fast it copies."""

import time
from collections.abc import Callable

import torch

from bench.gpu_parts.arithmetic import MEMORY_BANDWIDTH, PEAK_FLOPS
from bench.gpu_parts.report import Row
from bench.gpu_parts.training import Chip


def measure_products(size: int, device: torch.device) -> tuple[Chip, Row]:
    """Measure products of two square matrices of random numbers: the rates, and their row."""
    a, b = torch.randn(2, size, size, device=device).bfloat16()
    seconds = seconds_of_call(lambda: a @ b, device)
    chip = Chip(2 * size**3 / seconds, PEAK_FLOPS.get(name_of(device)))
    return chip, {"tflops": chip.measured / 1e12, "data_sheet": (chip.data_sheet or 0) / 1e12}


def measure_copies(num_bytes: int, device: torch.device) -> Row:
    """Measure copies within the device's memory; bytes read and bytes written both count."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = seconds_of_call(lambda: target.copy_(source), device)
    return {
        "tb_per_second": 2 * num_bytes / seconds / 1e12,
        "data_sheet": MEMORY_BANDWIDTH.get(name_of(device), 0) / 1e12,
    }


def name_of(device: torch.device) -> str:
    """Return the GPU's name; empty for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def seconds_of_call(call: Callable[[], object], device: torch.device, calls: int = 10) -> float:
    """Return the mean seconds of some calls, after three calls that warm up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        call()
    wait()
    started = time.perf_counter()
    for _ in range(calls):
        call()
    wait()
    return (time.perf_counter() - started) / calls
