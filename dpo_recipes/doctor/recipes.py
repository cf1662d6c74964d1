"""Trains every recipe in miniature, from data to page, in parallel processes."""

import multiprocessing
import os
import runpy
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path

from dpo_recipes.doctor.miniature import miniature_flags
from dpo_recipes.doctor.report import Finding, Part
from dpo_recipes.machine import free_threads
from dpo_recipes.terminal import duration

PRELOAD = ["trl.trainer.dpo_trainer", "trl.trainer.sft_trainer", "trl.trainer.reward_trainer"]
PRELOAD += ["dpo_recipes.runs", "dpo_recipes.ppo", "dpo_recipes.preflight", "dpo_recipes.shared_prefix"]
PROCESS_MEMORY = 2 * 2**30  # bytes of main memory, and of the card's memory, that a miniature run takes
TIMEOUT = 600  # seconds; on an idle machine a run takes 5 to 30
Context = ForkServerContext | SpawnContext


def check_recipes(
    recipes: Sequence[Path], profile: Path, folder: Path, *, use_cpu: bool, say: Callable[[str], None]
) -> Part:
    """Trains each recipe in miniature under a profile.

    Args:
        recipes: Files of the recipes.
        profile: The machine's profile.
        folder: Folder for models, rows and runs; the caller removes it.
        use_cpu: Compute on the CPU even if there is a card.
        say: Shows progress.
    """
    part = Part("Recipes in miniature", ["recipe", "profile", "time", ""], fold=2)
    part.note = "Each recipe trains two updates on tiny models and rows and writes its page, by its own code."
    multiprocessing.set_forkserver_preload(PRELOAD)
    context, stopped = _start_context(tempfile.gettempdir()), threading.Event()
    say("tiny models")
    runs, pool = {}, ThreadPoolExecutor(_workers(use_cpu=use_cpu))
    try:
        for recipe in recipes:
            try:
                words = [str(recipe.resolve()), "--config", str(profile.resolve()), *miniature_flags(recipe, folder)]
                runs[pool.submit(_run, context, words, folder / "runs" / recipe.stem, stopped)] = recipe
            except Exception as error:  # any error of the recipe's file
                _add(part, recipe, profile, "", f"{type(error).__name__}: {error}")
        for number, run in enumerate(as_completed(runs), start=1):
            say(f"{runs[run].stem} ({number} of {len(runs)})")
            _add(part, runs[run], profile, *run.result())
    finally:
        stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.kill()
            process.join()
    part.rows.sort()
    return part


def _run(context: Context, words: list[str], place: Path, stopped: threading.Event) -> tuple[str, str]:
    """Trains a recipe in a process of its own; returns its time and its first error, empty after a success."""
    start = time.monotonic()
    place.mkdir(parents=True)
    process = context.Process(target=_train, args=(words, place))
    process.start()
    if stopped.is_set():  # the check ended while this process started
        process.kill()
    process.join(TIMEOUT)
    spent = duration(time.monotonic() - start)
    if process.exitcode is None:
        process.kill()
        return spent, f"no end after {TIMEOUT} s"
    return spent, _first_error(place, process.exitcode) if process.exitcode else ""


def _add(part: Part, recipe: Path, profile: Path, spent: str, error: str) -> None:
    part.rows.append([recipe.stem, profile.stem, spent, "failed" if error else "ok"])
    if error:
        command = f"dpo-recipes train {recipe.stem.replace('_', '-')} --profile {profile.stem}"
        remedy = f"If the error names no remedy, see the whole output with: {command}"
        part.findings.append(Finding(f"{recipe.stem} under {profile.stem}: {error}", remedy))


def _start_context(temporary: str) -> Context:
    """The fork server, which imports the libraries once, or spawn if the temporary folder has a long path.

    The fork server's socket is two random names below that folder, and the path of a Unix socket has at most 103 bytes.
    """
    socket = f"{temporary}/pymp-12345678/listener-12345678"
    return get_context("forkserver") if len(os.fsencode(socket)) <= 103 else get_context("spawn")


def _first_error(place: Path, status: int) -> str:
    """Error that ended a run, in one line."""
    lines = [line for line in (place / "stderr").read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"ended with status {status} and no message"


def _workers(*, use_cpu: bool) -> int:
    """Number of parallel runs for which threads and memory are free."""
    import psutil
    import torch

    memory = [psutil.virtual_memory().available, *([] if use_cpu else [torch.cuda.mem_get_info()[0]])]
    return max(1, min(free_threads(1), *(int(free) // PROCESS_MEMORY for free in memory)))


def _train(words: list[str], place: Path) -> None:
    """Runs a recipe in this process as `accelerate launch` would, and exits with its status."""
    import torch

    for number, name in enumerate(("stdout", "stderr"), start=1):
        os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(place)
    torch.set_num_threads(1)
    sys.argv[:] = words  # the recipe reads its flags from this process's command line
    try:
        runpy.run_path(words[0], run_name="__main__")
    except Exception as error:
        traceback.print_exc()
        sys.stderr.write(f"{type(error).__name__}: {' '.join(str(error).split())}\n")
        sys.exit(1)
