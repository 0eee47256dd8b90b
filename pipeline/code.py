"""Stage code: writes, for every other stage, the hash of each file of code that it runs.

DVC does not follow Python imports, so every other stage depends on its file in `data/code/`. Such a
file has one line for each module that the stage imports, directly or not, and for each data file
that this code reads. A module's hash is taken of its syntax tree without docstrings: a comment
changes no file here, a statement changes the files of exactly the stages that import its module.

DVC's `params` cannot hold a section that may be absent from the settings, so the switches of such a
section stand in the file of its stage too.
"""

from cache.files.atomic import sha256_of, write_text
from workspace.code_hash import ROOT, code_hash, modules_of
from workspace.control_settings import ControlsSettings
from workspace.paths import CODE
from workspace.settings import Params
from workspace.stage import run_stage

STAGES = {
    "fetch": ("pipeline.fetch", "demo.world"),
    "inputs": ("pipeline.inputs",),
    "index": ("pipeline.index",),
    "extract": ("pipeline.extract",),
    "pretrain": ("train.pretrain",),
    "finetune": ("train.finetune",),
    "control": ("train.control",),
    "evaluate": ("eval.evaluate",),
}
"""The modules that a stage starts; the demo's world is rendered in a process of its own."""

FILES = {
    "extract": ("pipeline/encoding/probe_images/*",),
    "evaluate": ("eval/report/templates/*",),
}
"""Patterns of the data files that the code of a stage reads."""


def code(params: Params) -> None:
    """Write the file of every stage."""
    switches = {"control": params.section("controls", ControlsSettings)}
    for stage, modules in STAGES.items():
        paths = modules_of(modules)
        files = [path for pattern in FILES.get(stage, ()) for path in ROOT.glob(pattern)]
        hashes = {path: code_hash(path) for path in paths} | {
            path: sha256_of(path) for path in files
        }
        lines = [f"{hashes[path]}  {path.relative_to(ROOT)}\n" for path in sorted(hashes)]
        if stage in switches:
            lines += [f"{name}: {value}\n" for name, value in vars(switches[stage]).items()]
        write_text(CODE / stage, "".join(lines))
    print(f"code: {len(STAGES)} stages hashed in {CODE}")


if __name__ == "__main__":
    run_stage(code, __doc__)
