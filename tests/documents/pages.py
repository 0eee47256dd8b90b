"""The fenced blocks of README.md and docs/, and a shell that runs them as written."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

NOT_RUN = {
    "cp configs/coco.yaml params.yaml && dvc repro": "downloads 26 GB",
    "cp configs/laptop.yaml params.yaml && dvc repro": "downloads 2 GB",
    "torchrun --nproc-per-node 4 -m train.pretrain && dvc commit --force pretrain": "four GPUs",
    "torchrun --nproc-per-node 4 -m train.finetune && dvc commit --force finetune": "four GPUs",
    "accelerate launch --multi_gpu --num_processes 4 -m train.pretrain && "
    "dvc commit --force pretrain": "four GPUs",
    "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1": "for the next command",
    "torchrun --nnodes 2 --nproc-per-node 4 "
    "--rdzv-backend c10d --rdzv-endpoint host:29500 "
    "--max-restarts 3 -m train.pretrain": "two machines with four GPUs",
    "accelerate launch --multi_gpu --num_machines 2 --num_processes 8 --machine_rank 0 "
    "--main_process_ip host --main_process_port 29500 -m train.pretrain": "two machines",
    "sbatch --nodes 2 --gpus-per-node 4 configs/slurm.sh pretrain": "a SLURM cluster",
    "ray get-auth-token --generate && "
    "RAY_AUTH_MODE=token ray start --head --port=6379 --disable-usage-stats": (
        "leaves a server; tests/pipeline/cluster starts clusters"
    ),
    "ssh node mkdir -p .ray && scp ~/.ray/auth_token node:.ray/": "another machine",
    "RAY_AUTH_MODE=token ray start --address=192.0.2.10:6379": "another machine",
    "RAY_AUTH_MODE=token RAY_ADDRESS=auto python -m pipeline.extract": "a cluster",
    "nvidia-smi": "a GPU",
    "sudo apt-get update && sudo apt-get install --yes git make build-essential python3-dev "
    "python3-venv": "installs packages of the system",
    "git clone <repository> patchcache && cd patchcache": "another machine",
    "make .venv/installed && source .venv/bin/activate": "installs 6 GB",
    "jupyter nbconvert --to html --execute docs/patchcache.ipynb": "runs the demo",
    "python -m cache.push data/features s3://bucket/features": "a bucket",
    "python -m cache.verify s3://bucket/features": "a bucket",
    "hf auth login": "an account on the Hub",
    'hf upload me/photo-features data/features --repo-type dataset --delete "*.h5"': "the Hub",
    "hf upload me/photo-features data/features.card.md README.md --repo-type dataset": "the Hub",
    "hf buckets create me/photo-features --private": "the Hub",
    "hf sync data/features hf://buckets/me/photo-features --delete": "the Hub",
    "python -m eval.serve --run runs/finetune": "serves until it is stopped",
}
"""Commands that cannot run in a test, and why; they are parsed."""

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block, and the heading above it."""

    page: Path
    heading: str
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """Lines of a shell block, without comments."""
        return [re.sub(r"\s+# .*", "", line) for line in self.text.splitlines()]

    @property
    def runnable(self) -> list[str]:
        return [command for command in self.commands if command not in NOT_RUN]


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(page, re.findall(r"^#+ (.*)", text[: found.start()], re.M)[-1], *found.groups())
        for found in _FENCE.finditer(text)
    ]


def all_blocks(*languages: str) -> list[Block]:
    return [b for page in PAGES for b in blocks_of(page) if b.language in languages]


def section(heading: str) -> list[Block]:
    """The shell blocks under a heading, in order."""
    return [block for block in all_blocks("sh") if block.heading == heading]


def run_commands(
    commands: Sequence[str], folder: Path, words: Mapping[str, str] | None = None
) -> list[str]:
    """Run commands in one shell, as somebody who has activated `.venv`.

    Args:
        commands: All must succeed.
        folder: Where the shell starts.
        words: Replaced in the commands: what a reader has to fill in, and files of the reader's.

    Returns:
        What each command printed.
    """
    filled = [filled_in(command, words or {}) for command in commands]
    script = "\n".join(["set -e", *(f"echo '{_MARK}'\n{command}" for command in filled)])
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    outputs = done.stdout.split(_MARK + "\n")[1:]
    assert done.returncode == 0, f"{filled[len(outputs) - 1]}\n{outputs[-1][-3000:]}"
    return outputs


_MARK = "== the next command =="


def run_python(code: str, folder: Path, words: Mapping[str, str]) -> None:
    """Run a block of Python as a script would."""
    run_commands([f"python -c {shlex.quote(filled_in(code, words))}"], folder)


def filled_in(text: str, words: Mapping[str, str]) -> str:
    for word, value in words.items():
        text = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", lambda _, value=value: value, text)
    return text


def _environment() -> dict[str, str]:
    somebody = {
        f"GIT_{role}_{key}": value
        for role in ("AUTHOR", "COMMITTER")
        for key, value in (("NAME", "somebody"), ("EMAIL", "somebody@localhost"))
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return inherited | somebody | {"PATH": path}
