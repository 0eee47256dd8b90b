"""The statistics of an extraction: counts, failures, and where the time went."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from workspace.errors import StageError


@dataclass
class ExtractionStats:
    """Counts, failures and times of one run, or of one process in it."""

    failures: dict[int, str] = field(default_factory=dict)
    """Why an image could not be decoded, by image id."""
    encoded_shards: dict[str, str] = field(default_factory=dict)
    """sha256 by file name; includes shards that a later failure removed from the plan."""
    images_encoded: int = 0
    elapsed: float = 0.0
    """Seconds of wall time."""
    devices: int = 1
    """Number of devices that encoded side by side."""
    decoders: int = 1
    """Number of processes that decoded side by side."""
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Seconds of decode, encode, hash and write, each summed over all processes."""

    def add(self, other: "ExtractionStats") -> None:
        """Add the statistics of another process."""
        self.failures |= other.failures
        self.encoded_shards |= other.encoded_shards
        self.images_encoded += other.images_encoded
        for name, seconds in other.seconds.items():
            self.seconds[name] += seconds
        self.devices = max(self.devices, other.devices)
        self.decoders = max(self.decoders, other.decoders)

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the duration of the block to the seconds of a phase."""
        started = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - started

    def busy_shares(self) -> dict[str, float]:
        """Return the share of the wall time that each phase was busy, from 0 to 1.

        The phase near 1 is the bottleneck.
        """
        return {
            phase: seconds / (self.elapsed * (self.decoders if phase == "decode" else self.devices))
            for phase, seconds in sorted(self.seconds.items())
        }

    def check_failures(self, max_failures: int, num_images: int) -> None:
        """Stop a run in which too many images failed.

        Raises:
            StageError: More than `max_failures`; names the first three.
        """
        if len(self.failures) > max_failures:
            examples = [f"image {id_}: {why}" for id_, why in list(self.failures.items())[:3]]
            raise StageError(
                f"extract: {len(self.failures)} images failed to decode so far, at most "
                f"{max_failures} of {num_images} may (extract.max_failure_rate): "
                f"{'; '.join(examples)}. Mend or remove them, run index and extract again."
            )
