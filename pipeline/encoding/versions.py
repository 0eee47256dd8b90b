"""The versions of the libraries that decide the numbers of a feature."""

from importlib.metadata import version

from PIL import features

from pipeline.settings import TRANSFORMERS

LIBRARIES = ("numpy", "open_clip_torch", "pillow", "timm", "torch")
"""The Python packages; the libjpeg that Pillow was built with comes on top."""


def library_versions(model: str = "") -> dict[str, str]:
    """Return the installed version of each library, by name.

    Args:
        model: The tower, in the settings or the spec. Only those of transformers depend on it.
    """
    names = (*LIBRARIES, "transformers") if model.startswith(TRANSFORMERS) else LIBRARIES
    versions = {name: version(name) for name in names}
    return versions | {"libjpeg_turbo": features.version("libjpeg_turbo") or "absent"}
