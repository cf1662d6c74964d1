"""The verb `doctor`: its parser, its four parts, and its report."""

import argparse
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dpo_recipes import __version__
from dpo_recipes.catalog import find_recipe, list_recipes, read_yaml
from dpo_recipes.doctor.report import Part, on_screen, scrub, write_report
from dpo_recipes.doctor.sizes import SIZES
from dpo_recipes.errors import RecipeError
from dpo_recipes.flags import at_least, listed
from dpo_recipes.launch.launch import Launch, prepare
from dpo_recipes.machine import set_environment
from dpo_recipes.terminal import duration, is_quiet, say


def add_parser(commands: Any) -> None:
    """Adds the verb to the subparsers of `dpo-recipes`."""
    parser = commands.add_parser(
        "doctor",
        help="check this machine: versions, arithmetic, speed, recipes",
        examples=["doctor", "doctor --quick --out doctor.md"],
    )
    parser.add_argument("--model", metavar="NAMES", help=f"models to time: {', '.join(SIZES)}")
    parser.add_argument("--pairs", type=listed(at_least(1)), metavar="N,N", help="pairs a timed step: 8,32; on a CPU 4")
    parser.add_argument("--quick", action="store_true", help="one architecture, and two timed batches of a tiny model")
    parser.add_argument("--profile", metavar="P", help="profile to check; by default the one that train would choose")
    parser.add_argument("--out", metavar="FILE", help="Markdown file to write; JSON goes into the same folder")
    parser.set_defaults(call=lambda options, flags: doctor(options))


def doctor(options: argparse.Namespace) -> int:
    """Examines this machine, prints a table for each part, and returns 0 without findings, else 1.

    Raises:
        RecipeError: If the profile or the model does not exist, or the file is not Markdown.
    """
    if options.out and Path(options.out).suffix != ".md":
        raise RecipeError(f"--out {options.out} is not a Markdown file. Give it a name that ends in .md.")
    started = time.monotonic()
    launch = prepare("quickstart", profile=options.profile)
    title = f"dpo-recipes {__version__}: doctor, {time.strftime('%Y-%m-%d')}"
    parts = []
    for part in examine(launch, options, lambda text: _progress(f"[{time.monotonic() - started:4.0f} s] {text}")):
        _progress("")
        say(scrub(on_screen(part)) + "\n", always=bool(part.findings))
        parts.append(part)
    found = sum(len(part.findings) for part in parts)
    verdict = f"{found} finding(s), each with its remedy, above" if found else "All is right"
    say(f"{verdict}; {duration(time.monotonic() - started)}.", always=True)
    if options.out:
        say("Wrote " + " and ".join(map(str, write_report(Path(options.out), parts, title))))
    return 1 if found else 0


def _progress(text: str) -> None:
    """Replaces the line of progress in a terminal; elsewhere each text has a line of its own, and none is empty."""
    if sys.stderr.isatty() and not is_quiet():
        sys.stderr.write(f"\r\033[K{text}")
    elif text and not is_quiet():
        sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _restrain_libraries(folder: str, *, use_cpu: bool) -> None:
    """Lets the libraries see at most one card, keeps their caches in a folder, and silences their warnings and bars."""
    import datasets
    import transformers

    cards = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if use_cpu else cards[0]  # with several cards TRL would use DataParallel
    os.environ |= {"HF_DATASETS_CACHE": f"{folder}/datasets", "XDG_CACHE_HOME": f"{folder}/cache"}
    datasets.config.HF_DATASETS_CACHE = Path(folder, "datasets")
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def examine(launch: Launch, options: argparse.Namespace, show: Callable[[str], None]) -> Iterator[Part]:
    """Yields the parts of the report, each as soon as it is known.

    Args:
        launch: The launch of any recipe, with the profile and accelerate file to check.
        options: The parsed options of the verb.
        show: Shows progress.
    """
    from dpo_recipes.doctor.machine import look_at_machine, look_at_versions

    yield look_at_versions()
    # With NVML torch counts the cards without starting CUDA, which survives no fork and no new CUDA_VISIBLE_DEVICES.
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    set_environment()
    show("libraries")
    yield look_at_machine(launch)
    yield from _compute(launch, options, show)


def _compute(launch: Launch, options: argparse.Namespace, show: Callable[[str], None]) -> Iterator[Part]:
    """Yields the parts that compute: arithmetic, speed, recipes in miniature."""
    import torch

    from dpo_recipes.doctor.compute import ARCHITECTURES, check_compute
    from dpo_recipes.doctor.recipes import check_recipes
    from dpo_recipes.doctor.speed import check_speed

    profile = read_yaml(launch.profile)
    use_cpu = bool(profile.get("use_cpu")) or not torch.cuda.is_available()
    dtype = torch.float16 if profile.get("fp16") else torch.bfloat16 if profile.get("bf16") else torch.float32
    quick = options.quick or use_cpu
    names = options.model.split(",") if options.model else ["tiny" if quick else "qwen2.5-1.5b"]
    if unknown := [name for name in names if name not in SIZES]:
        raise RecipeError(f"--model {unknown[0]} is not known. Name one of {', '.join(SIZES)}.")
    with tempfile.TemporaryDirectory(prefix="dpo-recipes-doctor-") as folder:
        _restrain_libraries(folder, use_cpu=use_cpu)
        architectures = ["llama"] if quick else list(ARCHITECTURES)
        yield check_compute(dtype, use_cpu=use_cpu, architectures=architectures, say=show)
        yield check_speed(
            names,
            options.pairs or ([4] if quick else [8, 32]),
            dtype,
            use_cpu=use_cpu,
            rounds=2 if quick else 5,
            checkpointing=profile.get("activation_checkpointing", True),
            say=show,
        )
        recipes = [find_recipe(name) for name in list_recipes()]
        yield check_recipes(recipes, launch.profile, Path(folder), use_cpu=use_cpu, say=show)
