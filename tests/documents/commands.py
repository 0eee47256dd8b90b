"""Checks a command of the documents against what it would run, without running it."""

import contextlib
import importlib
import io
import itertools
import re
import shlex
import sys

import click
import pytest
from accelerate.commands.launch import launch_command_parser
from dvc.cli.parser import get_main_parser
from huggingface_hub.cli.hf import app as hub_command_line
from ray.scripts.scripts import cli as ray_command_line
from torch.distributed.run import get_args_parser as get_torchrun_parser

from tests.documents.pages import ROOT

SYSTEM = {"apt-get", "export", "git", "nvidia-smi", "sbatch", "scp", "source", "ssh", "sudo"}
"""Programs that the project does not bring."""


VARIABLE = re.compile(r"[A-Z_]+=")
"""A word that sets a variable for the command behind it."""


def check_line(monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """Check commands that are joined by `&&`."""
    for command in line.split(" && "):
        words = shlex.split(command)
        check_command(monkeypatch, *itertools.dropwhile(VARIABLE.match, words))


def check_command(monkeypatch: pytest.MonkeyPatch, program: str, *arguments: str) -> None:
    """Fail if the program would refuse the arguments, or name what the checkout does not have."""
    if program == "cp":
        assert (ROOT / arguments[0]).is_file()
    elif program == "cd":
        assert len(arguments) == 1
    elif program == "dvc":
        parsed = get_main_parser().parse_args(arguments)
        assert set(getattr(parsed, "targets", [])) <= stages()
    elif program == "torchrun":
        parsed = get_torchrun_parser().parse_args(arguments)
        assert parsed.module
        check_module(monkeypatch, parsed.training_script, *parsed.training_script_args)
    elif program == "accelerate":
        assert arguments[0] == "launch"
        parsed = launch_command_parser().parse_args(arguments[1:])
        assert parsed.module
        check_module(monkeypatch, parsed.training_script, *parsed.training_script_args)
    elif program == "make":
        assert arguments[0] in targets()
        assert all(re.match(r"PYTHON=", argument) for argument in arguments[1:])
    elif program == "jupyter":
        assert (ROOT / arguments[-1]).is_file()
    elif program == "hf":
        check_click_command(hub_command_line, *arguments)
    elif program == "ray":
        check_click_command(ray_command_line, *arguments)
    elif program not in SYSTEM:
        assert (program, arguments[0]) == ("python", "-m"), f"{program}: no way to check it"
        check_module(monkeypatch, *arguments[1:])


def check_click_command(command_line: click.Group, *arguments: str) -> None:
    """Fail if a command line that is made with click would refuse the arguments."""
    # An unknown command of the Hub would be looked for among extensions.
    assert arguments[0] in command_line.list_commands(click.Context(command_line))
    context = command_line.make_context(command_line.name, list(arguments))
    while isinstance(context.command, click.Group):
        rest = [*context._protected_args, *context.args]
        name, command, rest = context.command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)


def check_module(monkeypatch: pytest.MonkeyPatch, module: str, *arguments: str) -> None:
    """Fail if a module cannot be started, or lacks an option."""
    assert can_be_started(module)
    options = [word for word in arguments if word.startswith("--")]
    text = help_of(monkeypatch, module) if options else ""
    assert [option for option in options if not re.search(rf"{option}\b", text)] == []


def stages() -> set[str]:
    return set(re.findall(r"^  (\w+):\n    cmd:", (ROOT / "dvc.yaml").read_text(), re.M))


def targets() -> set[str]:
    """The targets of the Makefile, variables expanded."""
    text = (ROOT / "Makefile").read_text()
    variables = dict(re.findall(r"^(\w+) := (.*)", text, re.M))
    names = re.findall(r"^([\w$().]+):(?!=)", text, re.M)
    while any("$" in name for name in names):
        names = [re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], n) for n in names]
    return set(names) - {".PHONY"}


def help_of(monkeypatch: pytest.MonkeyPatch, module: str) -> str:
    """What `python -m module --help` prints."""
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        importlib.import_module(module).main()
    return printed.getvalue()


def can_be_started(module: str) -> bool:
    return "__main__" in (ROOT / f"{module.replace('.', '/')}.py").read_text()
