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
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import psutil

from dpo_recipes.launch.machines import RESUME, WAIT, Machines, Watch, not_met
from dpo_recipes.terminal import outlive_the_terminal

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STANDSTILL = 30.0  # seconds without work, after a signal, that show a process to be frozen
HANG = 45.0  # seconds without work, of several processes and of the network, that show a hang without any signal
QUIET = 100_000  # bytes received in that time that the machines' signs of life explain
LITTLE = 0.01  # share of a processor, and megabytes a second, that processes use while they wait for one another


def supervise(arguments: Sequence[str], environment: dict[str, str]) -> int:
    """Runs `accelerate launch` with the arguments; returns the training's exit status, 128 + n if signal n ended it.

    Ctrl-C, SIGTERM and a closed terminal reach every training process once; the third Ctrl-C kills them, and so does a
    standstill after a signal, where a process is frozen and the others wait for it. No process of the run outlives this
    call. If this process is killed, the run ends a few seconds later. Several processes that stand still are killed,
    too; the variable DPO_RECIPES_HANG sets after how many seconds, and 0 never.
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
    if is_frozen:
        return 128 + received[0] if received else 1
    return _status(process.returncode)


def _wait(process: subprocess.Popen[Any], received: list[int]) -> bool:
    """Hands on each signal as it is received until the process ends; returns True if the run was frozen and killed."""
    handled, is_frozen, work, since = 0, False, dict[int, float](), time.monotonic()
    hang, traffic = float(os.environ.get("DPO_RECIPES_HANG", HANG)), _received_bytes()
    while process.poll() is None:
        limit = STANDSTILL if handled else hang
        if limit and time.monotonic() - since > limit and not is_frozen:
            done, states = _work(process.pid)
            quiet = _received_bytes() - traffic < QUIET and len(_below(process.pid)) > 1
            is_frozen = _is_frozen(work, done, states) and (handled > 0 or quiet)
            work, since, traffic = done, time.monotonic(), _received_bytes()
            if is_frozen:
                _show_where(process.pid)
                frozen = "A process of the run is frozen: the run ended without a checkpoint of this step."
                sys.stderr.write(f"{frozen} {RESUME}\n")
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


def _received_bytes() -> int:
    """Bytes that came over the network: a download may keep all processes waiting."""
    cards = psutil.net_io_counters(pernic=True)
    return sum(card.bytes_recv for name, card in cards.items() if name != "lo")


def _below(leader: int, *, helpers: bool = False) -> list[psutil.Process]:
    """The training processes on this machine, by their ranks; with their helpers, if these are asked for.

    torch's launcher starts each training process in a session of its own.
    """
    with suppress(psutil.Error):
        return sorted(psutil.Process(leader).children(recursive=helpers), key=lambda child: child.pid)
    return []


def _show_where(leader: int) -> None:
    """Writes the state of each of several training processes, and lets each write its stack, in the same order."""
    ranks = _below(leader)
    for child in ranks if len(ranks) > 1 else []:
        with suppress(psutil.Error):
            rank, is_stopped = child.environ().get("RANK", "?"), child.status() == psutil.STATUS_STOPPED
            what = "is stopped; the others wait for it." if is_stopped else "waits. Its stack is below."
            sys.stderr.write(f"Rank {rank} (process {child.pid}) {what}\n")
    sys.stderr.flush()
    for child in ranks if len(ranks) > 1 else []:
        with suppress(psutil.Error):
            child.send_signal(signal.SIGUSR2)  # `recipe.run` has registered faulthandler
            time.sleep(0.3)


def _kill(leader: int, *, also_leader: bool = True) -> None:
    for number in [*[leader] * also_leader, *(process.pid for process in _below(leader, helpers=True))]:
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def _work(leader: int) -> tuple[dict[int, float], set[str]]:
    """The work of each process below the leader, in seconds of processor time plus megabytes written; their states."""
    work, states = {}, set()
    for process in _below(leader, helpers=True):
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
    os.environ |= {"PET_SIGNALS_TO_HANDLE": "SIGUSR2", "PET_SHUTDOWN_TIMEOUT": "30"}  # torch elastic: leave ours alone
    level = os.environ.get("TORCH_CPP_LOG_LEVEL")
    os.environ["TORCH_CPP_LOG_LEVEL"] = level or "FATAL"  # here a store that cannot be reached has sentences of its own
    from accelerate.commands.launch import launch_command, launch_command_parser

    if level is None:
        del os.environ["TORCH_CPP_LOG_LEVEL"]  # the training processes say what they have to say
    options = launch_command_parser().parse_args(arguments)
    for number in FORWARDED:
        signal.signal(number, _pass_on)
    machines = watch = None
    if options.num_machines:
        place = options.main_process_ip, int(options.main_process_port)
        machines = Machines(options.num_machines, options.machine_rank, *place)
        options.rdzv_conf = f"timeout={WAIT}"
        watch = Watch(machines, end_training=lambda: _kill(os.getpid(), also_leader=False))
        watch.start()
    status, why = _launch(partial(launch_command, options), arguments[1], machines)
    if watch and watch.reason:  # said already
        return watch.status if status else 0
    if why:
        sys.stderr.write(f"{why}\n")
    if watch:
        watch.leave(_status(status), why)
    return status


def _launch(launch: Callable[[], None], file: str, machines: Machines | None) -> tuple[int, str]:
    """Lets accelerate start the training processes; returns the exit status and a sentence about what went wrong."""
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch()
    except subprocess.CalledProcessError as failure:
        return failure.returncode, ""
    except ChildFailedError as failure:
        return _first_failure(failure)
    except DistError:
        if machines is None:
            raise
        return 1, not_met(machines)
    except (ValueError, ImportError) as error:  # raised before a process is started
        return 2, f"accelerate cannot launch with {file}: {error}"
    return 0, ""


def _first_failure(failure: Any) -> tuple[int, str]:
    """The exit status of the process that failed first, and a sentence about it where rank 0 has not said it."""
    rank, first = failure.get_first_failure()
    status, main = int(first.exitcode), failure.failures.get(0)
    if -status in FORWARDED or status > 128 or (status > 0 and main and main.exitcode > 0):
        return status, ""
    if status > 0:
        why = f": {first.message}" if os.path.isfile(first.error_file) else ". Its error is above."
        return status, f"Rank {rank} (process {first.pid}) failed with exit status {status}{why}"
    name = signal.Signals(-status).name
    memory = ", as the kernel does when memory runs out" if -status == signal.SIGKILL else ""
    ended = f"Rank {rank} (process {first.pid}) was ended by {name}{memory}, so all processes were ended."
    return status, f"{ended} {RESUME}"


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
