"""The time, as reports and run directories write it."""

from datetime import UTC, datetime


def utc_now() -> str:
    """Return the time in UTC as ISO 8601, to the second: 2026-03-01T08:00:00Z."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
