"""Several machines: where they meet, and how each learns that another one has failed, is gone or trains something else.

torch's launcher opens a store of keys on the main machine. Over it every machine gives a sign of life, says what it
trains, and at the end why it failed. torch itself would wait for half an hour for a machine that has lost its power.
"""

import errno
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from typing import Any

from dpo_recipes.errors import RecipeError
from dpo_recipes.terminal import say

WAIT = 600  # seconds that a machine waits for the others at the start
BEAT = 2.0  # seconds between two signs of life
SILENCE = 30.0  # seconds without a sign of life after which a machine counts as gone
STOPPED = (129, 130, 143)  # exit statuses after SIGHUP, Ctrl-C and SIGTERM
SAME = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
"""Libraries whose versions must be the same on all machines."""
RESUME = "Complete checkpoints are kept: continue with --resume_from_checkpoint true."


@dataclass(frozen=True)
class Machines:
    """The number of machines, the rank of this one, and the address of the main one, whose rank is 0."""

    count: int
    rank: int
    host: str
    port: int

    def arguments(self) -> list[str]:
        """Arguments of `accelerate launch`."""
        place = ["--main_process_ip", self.host, "--main_process_port", str(self.port)]
        return ["--num_machines", str(self.count), "--machine_rank", str(self.rank), *place]


def read_machines(count: int | None, rank: int | None, main: str | None) -> Machines | None:
    """The machines that three flags describe; None without flags.

    Raises:
        RecipeError: If a flag is missing or makes no sense, or if no machine can be met at the address.
    """
    if (count, rank, main) == (None, None, None):
        return None
    host, _, port = (main or "").rpartition(":")
    if count is None or rank is None or not (host and port.isdigit() and 0 <= rank < count):
        raise RecipeError(
            f"Got --machines {count} --rank {rank} --main {main}. Each of N machines needs --machines N, a --rank of "
            "its own from 0 to N - 1, and --main HOST:PORT, the address of the machine with rank 0."
        )
    _check_address(host.strip("[]"), int(port), is_main=rank == 0)
    return Machines(count, rank, host.strip("[]"), int(port))


def _check_address(host: str, port: int, *, is_main: bool) -> None:
    remedy = "Give all machines the address of the machine with rank 0: --main HOST:PORT."
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        for place in [address, ("", port)] if is_main else []:  # torch listens on all addresses
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(place)
    except socket.gaierror as error:
        raise RecipeError(f"This machine does not know the name {host} ({error.strerror}). {remedy}") from error
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None)
        if number == errno.EADDRINUSE:
            said = f"Port {port} is taken on this machine, maybe by another run. Give all machines another port"
            raise RecipeError(f"{said}: --main {host}:PORT.") from error
        said = f"{host} is no address of this machine" if number == errno.EADDRNOTAVAIL else str(error)
        raise RecipeError(f"This machine cannot listen at {host}:{port} ({said}). {remedy}") from error


class Watch:
    """Gives a sign of life for this machine, and ends its training once another machine has failed or is silent.

    Attributes:
        reason: The sentence about another machine; None as long as all is well.
        status: The exit status that goes with it.
        what: What this machine trains.
    """

    def __init__(self, machines: Machines, end_training: Callable[[], None]) -> None:
        self.machines, self._end_training = machines, end_training
        self.reason: str | None = None
        self.status = 1
        self.what = _what()
        self._store: Any = None
        self._heard = dict[int, tuple[bytes, float]]()  # by rank, the last sign of life and when it came

    def start(self) -> None:
        """Begins, in threads that end with the process: one talks, the other sees if that one is kept waiting."""
        me = self.machines
        place = f"{me.host}:{me.port}, {WAIT // 60} minutes at most"
        say(f"Machine {me.rank} of {me.count}: waiting for the others at {place}.")
        for work in (self._talk, self._listen):
            threading.Thread(target=work, daemon=True).start()

    def leave(self, status: int, why: str) -> None:
        """Tells the other machines that this one has failed. The main one stays until they have read it.

        After a signal there is nothing to tell: the processes of all machines stop at the same update.
        """
        if self._store is None or status in (0, *STOPPED) or self.reason:
            return
        with suppress(RuntimeError):
            self._store.set(f"failed {self.machines.rank}", f"{status} {why or f'exit status {status}'}")
            time.sleep(2 * BEAT if self.machines.rank == 0 else 0)

    def _talk(self) -> None:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        me = self.machines
        with suppress(RuntimeError):  # the launcher itself says that nobody came
            wait = timedelta(seconds=WAIT)
            store = TCPStore(me.host, me.port, is_master=False, timeout=wait, wait_for_workers=False)
            store.set(f"trains {me.rank}", self.what)
            self._store = store
            self._heard[0] = b"", time.monotonic()
            for beat in range(sys.maxsize):
                store.set(f"alive {me.rank}", str(beat))
                for rank in range(me.count):
                    self._hear(rank)
                time.sleep(BEAT)
        if self._store:
            time.sleep(2 * BEAT)  # the training may be at its end here as well
            self._lose(0, "does not answer any more")

    def _hear(self, rank: int) -> None:
        """Reads what a machine has said. A key that is not there yet is not asked for, because that would wait."""
        if self._store.check([f"failed {rank}"]) and rank != self.machines.rank:
            status, _, why = self._store.get(f"failed {rank}").decode().partition(" ")
            time.sleep(2 * BEAT)  # the processes here may fail of themselves, or stop for the same signal
            self._lose(rank, f"has failed: {why}", status=int(status))
        if self._store.check([f"alive {rank}"]):
            sign = self._store.get(f"alive {rank}")
            last, _ = self._heard.get(rank, (b"", 0.0))
            if not last and self._store.get(f"trains {rank}").decode() != self.what:
                self._lose(rank, f"trains something else. {_OTHER}", status=2)
            if sign != last:
                self._heard[rank] = sign, time.monotonic()

    def _listen(self) -> None:
        while not self.reason:
            time.sleep(1)
            for rank, (_, since) in [*self._heard.items()]:
                if time.monotonic() - since > SILENCE:
                    self._lose(rank, f"has not been heard of for {SILENCE:.0f} s: it is off or cut off")

    def _lose(self, rank: int, what: str, *, status: int = 1) -> None:
        if self.reason:
            return
        place = f" ({self.machines.host})" if rank == 0 else ""
        again = "" if status == 2 else f" {_AGAIN}"
        self.reason, self.status = f"Machine {rank}{place} {what}.{again}", status
        sys.stderr.write(f"{self.reason}\n")
        self._end_training()


_AGAIN = (
    "This machine stops, too. Complete checkpoints are kept: start all machines again with --resume_from_checkpoint "
    "true."
)
_OTHER = (
    "The recipe, profile, flags, data files, this package and the versions of the libraries must be the same on all "
    "machines: compare the commands and `pip freeze`"
)


def _what() -> str:
    """Returns the launcher's hash of what this machine trains, and the versions of its libraries."""
    return " ".join([os.environ.get("DPO_RECIPES_REQUEST", ""), *(f"{name} {version(name)}" for name in SAME)])


def not_met(machines: Machines) -> str:
    """The sentence for machines that did not come."""
    return (
        f"The {machines.count} machines did not meet at {machines.host}:{machines.port} within {WAIT} s. Start the "
        "same command on each, with ranks from 0 on. The address must be that of the machine with rank 0, and no "
        "firewall may close the port."
    )
