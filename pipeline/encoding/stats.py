"""What became of one extraction: counts, failures, and where the time went."""

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from workspace.errors import StageError


@dataclass
class Tally:
    """What became of one run: counts, failures and where the time went."""

    failures: dict[int, str] = field(default_factory=dict)
    """Image id to the reason why it could not be decoded."""
    encoded_shards: dict[str, str] = field(default_factory=dict)
    """File name to sha256. One that a later failure displaced is among them, but not in the last
    plan."""
    images_encoded: int = 0
    elapsed: float = 0.0
    """Seconds on the wall."""
    devices: int = 1
    """How many encoded side by side."""
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Of decode, encode, hash and write, each summed over all processes."""

    def add(self, other: "Tally") -> None:
        """Add what another process did."""
        self.failures |= other.failures
        self.encoded_shards |= other.encoded_shards
        self.images_encoded += other.images_encoded
        for name, seconds in other.seconds.items():
            self.seconds[name] += seconds
        self.devices = max(self.devices, other.devices)

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Count the time in the block."""
        started = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - started

    def shares(self, workers: int) -> dict[str, float]:
        """Return which share of the time each kind of work was busy, from 0 to 1.

        The one near 1 is what the others waited for.
        """
        lanes = {"decode": self.devices * max(1, math.ceil(workers / self.devices))}
        return {
            name: seconds / (self.elapsed * lanes.get(name, self.devices))
            for name, seconds in sorted(self.seconds.items())
        }

    def check(self, max_failures: int, num_images: int) -> None:
        """Stop a run with too many failures.

        Raises:
            StageError: More images failed than may; names some of them.
        """
        if len(self.failures) > max_failures:
            examples = [f"image {id_}: {why}" for id_, why in list(self.failures.items())[:3]]
            raise StageError(
                f"extract: {len(self.failures)} images failed to decode so far, at most "
                f"{max_failures} of {num_images} may (extract.max_failure_rate): "
                f"{'; '.join(examples)}. Mend or remove them, run index and extract again."
            )
