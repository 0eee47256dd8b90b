import time
from datetime import UTC, datetime, timedelta

import pytest

from workspace.clock import utc_now


@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo", "America/New_York"])
def test_the_time_is_utc_wherever_the_machine_stands(monkeypatch, zone):
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        before = datetime.now(UTC).replace(microsecond=0)
        text = utc_now()
        now = datetime.fromisoformat(text)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert text.endswith("Z")
    assert now.utcoffset() == timedelta(0)
    assert before <= now <= datetime.now(UTC)
