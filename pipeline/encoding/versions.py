"""The versions of the libraries that decide the numbers of a feature."""

from importlib.metadata import version

from PIL import features

LIBRARIES = ("numpy", "open_clip_torch", "pillow", "timm", "torch")
"""The Python packages; the libjpeg that Pillow was built with comes on top."""


def library_versions() -> dict[str, str]:
    """Return the installed version of each library, by name."""
    versions = {name: version(name) for name in LIBRARIES}
    return versions | {"libjpeg_turbo": features.version("libjpeg_turbo") or "absent"}
