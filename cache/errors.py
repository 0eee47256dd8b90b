"""The errors that a user, a file or another machine can cause.

    PatchcacheError
    |-- SettingsError            the call or the settings are wrong        (exit code 2)
    |-- StageError               in workspace.errors: a stage cannot do its work
    `-- CacheError
        |-- SpecMismatchError      features of another encoder
        |   `-- FormatVersionError   a store of another version of the format
        |-- MissingImageError      an image id that the store does not hold
        |-- CorruptShardError      bytes that differ from what was written
        |-- UnsafeShardError       a shard whose structure no writer of this format makes
        |-- InvalidFeaturesError   features that no store can hold
        |-- IncompleteStoreError   a folder that is not a whole store
        `-- UnreachableStoreError  a server that does not deliver

Each text says what was checked, what was wanted, what was found, where, and what to do.
"""

from .texts import without_passwords

REMEDY = (
    f"Run `dvc pull`, or `python -m {__package__}.verify --repair` on its folder and the extract "
    f"stage."
)
"""What to do about a damaged or missing file of a store."""


class PatchcacheError(Exception):
    """Base of all errors that the project raises on purpose; `exit_code` is a command's."""

    exit_code = 1

    def __str__(self) -> str:
        return without_passwords(super().__str__())


class SettingsError(PatchcacheError, ValueError):
    """A settings file or a command line that cannot be used."""

    exit_code = 2


class CacheError(PatchcacheError):
    """Base of the errors of a feature store."""


class SpecMismatchError(CacheError, ValueError):
    """Two sets of features that must not be mixed."""


class FormatVersionError(SpecMismatchError):
    """A store that another version of this format describes: not damaged, but not readable here."""


class MissingImageError(CacheError, KeyError):
    """An image id that is not in the store."""

    def __str__(self) -> str:
        # KeyError would print the repr of the text.
        return without_passwords(str(self.args[0])) if self.args else ""


class CorruptShardError(CacheError, ValueError):
    """A shard whose bytes differ from what its index or its own hashes say."""


class UnsafeShardError(CacheError, ValueError):
    """A shard with a structure that no writer of this format makes."""


class InvalidFeaturesError(CacheError, ValueError):
    """Features, or a spec of features, that were given to be written and that no store can hold."""


class IncompleteStoreError(CacheError, FileNotFoundError):
    """A folder that lacks a part of a store."""


class UnreachableStoreError(CacheError, ConnectionError):
    """A store whose server cannot be reached, refuses access, or does not deliver."""
