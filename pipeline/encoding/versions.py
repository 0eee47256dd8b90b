"""Which libraries decide the numbers of a feature, and in which versions they are here."""

from importlib.metadata import version

from PIL import features

LIBRARIES = ("numpy", "open_clip_torch", "pillow", "timm", "torch")
"""Beside the libjpeg that Pillow was built with."""


def library_versions() -> dict[str, str]:
    """Return library to version."""
    versions = {name: version(name) for name in LIBRARIES}
    return versions | {"libjpeg_turbo": features.version("libjpeg_turbo") or "absent"}
