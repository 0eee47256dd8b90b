"""The error of a stage; `cache.errors` has the tree of all errors."""

from cache.errors import PatchcacheError


class StageError(PatchcacheError, RuntimeError):
    """A stage cannot make its outputs from its inputs."""
