"""Connects to the Ray cluster that RAY_ADDRESS names, or starts Ray on this machine alone."""

import contextlib
import os
import secrets
import signal
import socket
import tempfile
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from cache.cli.interrupts import without_interrupts
from cache.errors import SettingsError
from cache.texts import one_line
from workspace.code_hash import ROOT
from workspace.errors import StageError

ENVIRONMENT = {
    # No report of the use goes to Ray's authors.
    "RAY_USAGE_STATS_ENABLED": "0",
    # The encoders of this machine name their GPUs, which Ray would hide from them.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Variables that Ray reads as it is imported, for a user who has not set them."""

MIN_STORE_BYTES = 128 << 20
"""Least memory of Ray's object store here; Ray itself refuses less than 75 MiB."""

ANSWER_SECONDS = 10.0
"""How long the first node of a cluster may take to answer."""

START = "Start it (docs/data.md)"
TOKEN_OR_START = (
    "Set RAY_AUTH_MODE=token, and its token in ~/.ray/auth_token, RAY_AUTH_TOKEN or the file of "
    "RAY_AUTH_TOKEN_PATH, if it wants one; start it (docs/data.md) if it does not run"
)
"""Advice after a failure of Ray, whose own reason does not tell a wrong token from others."""


def import_ray() -> ModuleType:
    """Return the package ray.

    Raises:
        SettingsError: The package is not installed.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"extract.engine: several devices or machines need the package {error.name}, which is "
            f"not installed. Install the extra `ray` (pip install ray), or set extract.engine: "
            f"local and name one device."
        ) from None
    return ray  # type: ignore[no-any-return]


@contextlib.contextmanager
def connected(address: str | None, num_cpus: int, store_bytes: int) -> Iterator[None]:
    """Hold a connection to a cluster until the block ends.

    Args:
        address: Of the cluster's first node, as RAY_ADDRESS has it; None starts Ray on this
            machine, in a folder of its own, and ends it with the block.
        num_cpus: Of Ray on this machine.
        store_bytes: Memory of Ray's object store on this machine.

    Raises:
        SettingsError: Ray is not installed, or the address is one of Ray Client.
        StageError: The cluster does not answer or refuses, or Ray does not start.
    """
    if address and address.startswith("ray://"):
        raise SettingsError(
            f"RAY_ADDRESS is {address}, the address of Ray Client, wanted host:port of the first "
            f"node. Run this command on a machine of the cluster, with RAY_ADDRESS=auto."
        )
    if not address:
        # Ray started here asks all its processes for a token. Its own would be the same in each
        # run. A cluster's token can be in a file, which the variable would hide.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import_ray()
    # A socket's path has at most 107 characters, so that the folder is not in the workspace.
    with tempfile.TemporaryDirectory(prefix="patchcache-", ignore_cleanup_errors=True) as folder:
        own = {
            "num_cpus": num_cpus,
            "num_gpus": 0,
            "object_store_memory": max(store_bytes, MIN_STORE_BYTES),
            "include_dashboard": False,
            "_temp_dir": folder,
        }
        try:
            _init(address, {"address": address} if address else {"address": "local", **own})
            yield
        finally:
            _shut_down()


def _init(address: str | None, options: dict[str, Any]) -> None:
    import ray
    from ray.exceptions import RayError

    if address:
        _check_answers(address)
    python_path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Signals reach the processes that Ray starts through this one alone. A cluster may not answer.
    with contextlib.nullcontext() if address else without_interrupts():
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(
                log_to_driver=False,
                logging_level="ERROR",
                runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(python_path)}},
                **options,
            )
        except (RayError, RuntimeError, ValueError, OSError) as error:
            raise _no_connection(address, str(error), TOKEN_OR_START) from None
        except SystemExit:
            # Ray's handler of SIGTERM.
            raise KeyboardInterrupt from None
        finally:
            signal.signal(signal.SIGTERM, handler)


def _check_answers(address: str) -> None:
    """Refuse a host:port where nothing answers; Ray itself would wait for long.

    Raises:
        StageError: Nothing answers.
    """
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), ANSWER_SECONDS).close()
        except OSError as error:
            raise _no_connection(address, str(error)) from None


def _shut_down() -> None:
    import ray

    with without_interrupts():
        ray.shutdown()


def _no_connection(address: str | None, reason: str, advice: str = START) -> StageError:
    if not address:
        return StageError(
            f"extract: Ray does not start on this machine: {_first_line(reason)}. Set "
            f"extract.engine: local to encode with one device."
        )
    return StageError(
        f"RAY_ADDRESS: no connection to a Ray cluster at {address}: {_first_line(reason)}. "
        f"{advice}, or unset RAY_ADDRESS to encode on this machine."
    )


def _first_line(text: str) -> str:
    return one_line(text.strip().partition("\n")[0]).rstrip(".")
