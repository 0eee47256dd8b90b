"""The commands of several machines are those of the SLURM script, and torchrun knows them."""

import re
import shlex
import subprocess

from torch.distributed.run import get_args_parser

from tests.documents.pages import ROOT, section
from train.ranks import NEW_STORE

SCRIPT = ROOT / "configs/slurm.sh"
OF_THE_JOB = {"--rdzv-id"}
"""Options that only SLURM needs: torchrun's own default is a constant, and jobs share machines."""


def options_of(command):
    """Return the options of a command of torchrun, with their values, and what it runs."""
    words = shlex.split(command.partition("torchrun ")[2])
    parsed = vars(get_args_parser().parse_args(words))
    return {word for word in words if word.startswith("--")}, parsed


def test_the_script_of_slurm_has_the_command_of_the_page():
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0
    (documented,) = (
        command
        for block in section("Several machines")
        for command in block.commands
        if "torchrun" in command
    )
    commands = [c for block in section("Several machines") for c in block.commands]
    assert commands[0] == f"export {NEW_STORE}=1"
    text = SCRIPT.read_text()
    assert re.search(rf"^export .*\b{NEW_STORE}=1$", text, re.M)
    command = text.partition("srun ")[2].replace("\\\n", " ")
    names, ours = options_of(command)
    documented_names, theirs = options_of(documented)
    assert names == documented_names | OF_THE_JOB
    for name in ("rdzv_backend", "max_restarts", "module"):
        assert ours[name] == theirs[name]
    assert theirs["training_script"] == "train.pretrain"
    assert ours["training_script"] == "train.$1"


def test_the_page_names_the_command_of_the_script():
    commands = [c for block in section("Several machines") for c in block.commands]
    (usage,) = re.findall(r"^# +(sbatch .*)$", SCRIPT.read_text(), re.M)
    assert usage in commands
