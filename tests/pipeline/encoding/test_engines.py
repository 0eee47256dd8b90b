"""Which engine encodes, on which devices, and what share of the time each was busy."""

import pytest
import torch

from cache.errors import SettingsError
from pipeline.encoding import engines
from pipeline.encoding.encoder import resolve_devices
from pipeline.encoding.stats import ExtractionStats


class JobOf:
    def __init__(self, engine, device, settings):
        self.engine, self.settings = engine, settings(device=device)


@pytest.mark.parametrize(
    ("engine", "device", "address", "here"),
    [
        ("auto", "cpu", None, True),
        ("auto", "cpu,cpu", None, False),
        ("auto", "cpu", "10.0.0.1:6379", False),
        ("local", "cpu", "10.0.0.1:6379", True),
        ("ray", "cpu", None, False),
    ],
)
def test_several_devices_or_a_cluster_take_ray(settings, engine, device, address, here):
    assert engines.is_local(JobOf(engine, device, settings), address) == here


def test_the_local_engine_takes_the_first_of_several_gpus_and_says_so(
    settings, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert engines.is_local(JobOf("local", "auto", settings), None)
    assert capsys.readouterr().out == (
        "extract: uses the first of 3 GPUs (extract.engine: local)\n"
    )
    assert not engines.is_local(JobOf("auto", "auto", settings), None)


def test_the_local_engine_refuses_several_devices_that_are_named(settings):
    with pytest.raises(SettingsError, match=r"^extract\.engine is local, .*names 2: cpu,cpu"):
        engines.is_local(JobOf("local", "cpu,cpu", settings), None)


@pytest.mark.parametrize("value", ["", "local"])
def test_no_address_and_local_name_no_cluster(monkeypatch, value):
    monkeypatch.setenv("RAY_ADDRESS", value)
    assert engines.cluster_address() is None


def test_auto_is_every_gpu_or_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert [str(device) for device in resolve_devices("auto")] == ["cuda:0", "cuda:1", "cuda:2"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve_devices("auto") == [torch.device("cpu")]


def test_a_list_names_several_devices():
    assert resolve_devices("cpu") == [torch.device("cpu")]
    assert resolve_devices("cpu, cpu,cpu") == [torch.device("cpu")] * 3


@pytest.mark.parametrize("name", ["gpu", "", "cpu,", "cpu;cpu", "cpu,nothing", "cuda:99"])
def test_an_unknown_device_is_a_wrong_setting(name):
    with pytest.raises(SettingsError, match=r"^encoder\.device: ") as caught:
        resolve_devices(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("decoders", "devices"), [(1, 1), (3, 1), (1, 2), (3, 2)])
def test_a_phase_is_busy_as_a_share_of_the_processes_that_do_it(decoders, devices):
    stats = ExtractionStats(elapsed=2.0, devices=devices, decoders=decoders)
    stats.seconds["decode"] = 2.0 * decoders
    stats.seconds["encode"] = 1.0
    assert stats.busy_shares() == {"decode": 1.0, "encode": 0.5 / devices}
