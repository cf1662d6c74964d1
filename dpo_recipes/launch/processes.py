"""Runs `accelerate launch` so that signals reach the training and its exit status comes back.

accelerate turns the status of the training process into a CalledProcessError, and leaves that process behind when it is
stopped itself. Here `supervise` starts `_inside` in a session of its own, hands it every signal once, and afterwards
ends the processes that are left in the session. `_inside` calls accelerate, passes the signals on to the training
processes and exits with their status.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import psutil

from dpo_recipes.terminal import outlive_the_terminal

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STANDSTILL = 30.0  # seconds without work, after a signal, that show a process to be frozen
LITTLE = 0.01  # share of a processor, and megabytes a second, that processes use while they wait for one another


def supervise(arguments: Sequence[str], environment: dict[str, str]) -> int:
    """Runs `accelerate launch` with the arguments; returns the training's exit status, 128 + n if signal n ended it.

    Ctrl-C, SIGTERM and a closed terminal reach every training process once; the third Ctrl-C kills them, and so does a
    standstill after a signal, where a process is frozen and the others wait for it. No process of the run outlives this
    call. If this process is killed, the run ends a few seconds later.
    """
    received: list[int] = []
    heeded = [number for number in FORWARDED if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in heeded}
    lifeline, held = os.pipe()  # the other end closes with this process, however it ends
    inside = [sys.executable, "-P", "-m", "dpo_recipes.launch.processes", str(lifeline), *arguments]
    streams = _relayed_streams()
    process = subprocess.Popen(inside, env=environment, start_new_session=True, pass_fds=[lifeline], **streams)
    pipes = ((process.stdout, 1), (process.stderr, 2))
    relays = [threading.Thread(target=_relay, args=pipe, daemon=True) for pipe in pipes if pipe[0]]
    for relay in relays:
        relay.start()
    try:
        is_frozen = _wait(process, received)
        end_session(process.pid)
        for relay in relays:
            relay.join(timeout=10)
    finally:
        os.close(lifeline)
        os.close(held)
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + received[0] if is_frozen else _status(process.returncode)


def _wait(process: subprocess.Popen[Any], received: list[int]) -> bool:
    """Hands on each signal as it is received until the process ends; returns True if the run was frozen and killed."""
    handled, is_frozen, work, since = 0, False, dict[int, float](), time.monotonic()
    while process.poll() is None:
        if handled and time.monotonic() - since > STANDSTILL and not is_frozen:
            done, states = _work(process.pid)
            is_frozen, work, since = _is_frozen(work, done, states), done, time.monotonic()
            if is_frozen:
                sys.stderr.write(f"{_FROZEN}\n")
                _kill(process.pid)
        for number in received[handled:]:
            if not handled:
                work, since = _work(process.pid)[0], time.monotonic()
            handled += 1
            if number == signal.SIGINT and received[:handled].count(signal.SIGINT) >= 3:
                _kill(process.pid)
            else:
                process.send_signal(number)
        time.sleep(0.05)
    return is_frozen


_FROZEN = (
    "A process of the run is frozen: the run ended without a checkpoint of this step. Complete checkpoints are kept: "
    "continue with --resume_from_checkpoint true."
)


def _descendants(leader: int) -> list[psutil.Process]:
    """The training processes and their helpers. torch's launcher starts each of them in a session of its own."""
    with suppress(psutil.Error):
        found: list[psutil.Process] = psutil.Process(leader).children(recursive=True)
        return found
    return []


def _kill(leader: int) -> None:
    for number in [leader, *(process.pid for process in _descendants(leader))]:
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def _work(leader: int) -> tuple[dict[int, float], set[str]]:
    """The work of each process below the leader, in seconds of processor time plus megabytes written; their states."""
    work, states = {}, set()
    for process in _descendants(leader):
        with suppress(psutil.Error):
            times = process.cpu_times()
            written = process.io_counters().write_bytes / 1e6 if psutil.LINUX else 0
            work[process.pid] = times.user + times.system + written
            states.add(process.status())
    return work, states


def _is_frozen(before: dict[int, float], now: dict[int, float], states: set[str]) -> bool:
    """Returns True if a process is stopped, or if all processes together did almost nothing and wait for no disk."""
    done = sum(work - before.get(process, 0.0) for process, work in now.items())  # one that ended counts no more
    return "stopped" in states or (done < LITTLE * STANDSTILL and "disk-sleep" not in states)


def _relayed_streams() -> dict[str, Any]:
    """Arguments of Popen that put a pipe of ours in front of each output that is no terminal.

    A full disk or a pipe without a reader would otherwise end a training with whatever a library prints at its import.
    """
    streams = {name: subprocess.PIPE for number, name in ((1, "stdout"), (2, "stderr")) if not os.isatty(number)}
    with suppress(OSError):  # one of them is closed
        if len(streams) == 2 and os.path.sameopenfile(1, 2):
            streams["stderr"] = subprocess.STDOUT  # the order of the lines stays
    return streams


def _relay(source: Any, target: int) -> None:
    """Copies a pipe to a file descriptor until the pipe ends, and drops the bytes that cannot be written."""
    while data := source.read1(2**16):
        with suppress(OSError):
            while data:
                data = data[os.write(target, data) :]
    source.close()


def end_session(leader: int, *, grace: float = 10.0) -> None:
    """Ends the processes of a session whose leader has ended: SIGTERM, then SIGKILL after `grace` seconds."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + grace
        for process in _members(leader):
            with suppress(ProcessLookupError):
                os.kill(process, number)
        while _members(leader) and time.monotonic() < deadline:
            time.sleep(0.05)


def _members(session: int) -> list[int]:
    members = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process.pid)
    return members


def _inside(lifeline: int, arguments: list[str]) -> int:
    """Calls accelerate in this process, the leader of the session, and returns the training's exit status."""
    outlive_the_terminal()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is started yet: Ctrl-C may simply end this process
    threading.Thread(target=_stop_with_parent, args=(lifeline,), daemon=True).start()
    os.environ |= {"PET_SIGNALS_TO_HANDLE": "SIGUSR2", "PET_SHUTDOWN_TIMEOUT": "120"}  # torch elastic: leave ours alone
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for number in FORWARDED:
        signal.signal(number, _pass_on)
    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except subprocess.CalledProcessError as failure:
        return failure.returncode
    except ChildFailedError as failure:
        return int(failure.get_first_failure()[1].exitcode)
    except (ValueError, ImportError) as error:  # raised before a process is started
        sys.stderr.write(f"accelerate cannot launch with {arguments[1]}: {error}\n")
        return 2
    return 0


def _pass_on(number: int, _: object) -> None:
    """Passes a signal on to the training processes alone, because it would kill the workers of a data loader."""
    if not (children := psutil.Process().children()):
        raise SystemExit(128 + number)
    for child in children:
        with suppress(psutil.Error):
            child.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)


def _stop_with_parent(lifeline: int) -> None:
    """Stops this session when the process that holds the other end of the pipe is gone."""
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    os.read(lifeline, 1)
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
    time.sleep(60)  # to save a checkpoint
    os.killpg(0, signal.SIGKILL)


def _status(returncode: int) -> int:
    return 128 - returncode if returncode < 0 else returncode


if __name__ == "__main__":
    sys.exit(_status(_inside(int(sys.argv[1]), sys.argv[2:])))
