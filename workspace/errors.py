"""The error of a stage; `cache.errors` has the whole tree."""

from cache.errors import PatchcacheError


class StageError(PatchcacheError, RuntimeError):
    """Inputs from which a stage cannot make its outputs."""
