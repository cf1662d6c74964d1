"""Reads versions, cards, memory, disk, and the profile that `train` would choose."""

import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from dpo_recipes.catalog import read_yaml
from dpo_recipes.doctor.report import Finding, Part
from dpo_recipes.doctor.sizes import SIZES
from dpo_recipes.launch.launch import Launch
from dpo_recipes.machine import ask_driver, free_threads, gpu_cards, processor

CONSTRAINTS = Path(__file__).parent.parent.parent / "constraints.txt"  # exists in a clone, not in an installed wheel
EXAMPLE = "qwen2.5-1.5b"  # the model of hh-rlhf-lora
LEAST_DISK = 20  # GB: an install with CUDA, a 1.5B model and the checkpoints of one run


def look_at_versions(
    requirements: Sequence[str] | None = None, pins: Mapping[str, str] | None = None, python: str | None = None
) -> Part:
    """Installed versions, compared with the package's requirements and the pins of constraints.txt.

    Args:
        requirements: Requirements as in pyproject.toml; by default the installed package's.
        pins: Versions by package; by default the pins of constraints.txt, if it exists.
        python: Version of Python; by default this interpreter's.
    """
    python, pins = python or platform.python_version(), _read_pins() if pins is None else pins
    part = Part("Versions", ["package", "installed", "needed", "pinned", ""], fold=2)
    is_new = tuple(map(int, python.split(".")[:2])) >= (3, 11)
    part.rows.append(["python", python, ">=3.11", "", "ok" if is_new else "wrong"])
    if not is_new:
        part.findings.append(Finding(f"Python {python} runs, 3.11 or newer is needed", "Run: make PYTHON=python3.12"))
    for needed in map(Requirement, requirements or requires("dpo-recipes") or []):
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(needed.name)
        except PackageNotFoundError:
            installed = "none"
        fits = installed != "none" and needed.specifier.contains(installed, prereleases=True)
        pin = pins.get(needed.name, "")
        same = "ok" if not pin or installed.partition("+")[0] == pin else "ok, not the pin"
        part.rows.append([needed.name, installed, str(needed.specifier), pin, same if fits else "wrong"])
        if not fits:
            wanted = str(needed.specifier) or "any version"
            constraint = "-c constraints.txt " if pin else ""
            remedy = f"Run: pip install {constraint}'{needed.name}{'' if pin else needed.specifier}'"
            part.findings.append(Finding(f"{needed.name} {installed} installed, {wanted} needed", remedy))
    return part


def look_at_machine(launch: Launch) -> Part:
    """Processor, cards, memory and disk, and the launch's profile and accelerate file."""
    import psutil
    import torch

    cards, names = gpu_cards(), ask_driver("name,driver_version", r"^(.+), ([\d.]+)\s*$")
    disk = shutil.disk_usage(Path.cwd()).free / 1e9
    memory = psutil.virtual_memory()
    rows = [
        ["processor", f"{processor()}, {os.cpu_count()} cores, {free_threads(1)} free threads"],
        ["memory", f"{memory.total / 2**30:.0f} GiB, {memory.available / 2**30:.0f} GiB free"],
        ["disk", f"{disk:.0f} GB free in this folder"],
        *(
            [f"card {index}", f"{name}, {mib:,} MiB, compute capability {capability}, driver {driver}"]
            for index, ((mib, capability), (name, driver)) in enumerate(zip(cards, names, strict=False))
        ),
        ["torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"],
        ["profile", f"{launch.profile.stem}, accelerate file {launch.accelerate.stem}"],
    ]
    part = Part("Machine", ["", ""], rows)
    profile = read_yaml(launch.profile)
    size = memory.total if profile.get("use_cpu") or not cards else min(mib for mib, _ in cards) * 2**20
    part.rows.append(["memory decides", _what_fits(profile, size)])
    if tokens := profile.get("tokens_per_step"):
        # hh-rlhf has 290 tokens a pair on average.
        part.rows.append(["micro-batch", f"{tokens:,} tokens, about {tokens // 290} pairs as in hh-rlhf"])
    if cards and not torch.cuda.is_available():
        what = f"{len(cards)} card(s) found, but torch {torch.__version__} (CUDA {torch.version.cuda}) sees none"
        remedy = "Install a torch built for the driver's CUDA: https://pytorch.org/get-started."
        part.findings.append(Finding(what, remedy))
    if disk < LEAST_DISK:
        part.findings.append(Finding(f"{disk:.0f} GB of disk free, {LEAST_DISK} needed", "Free disk space."))
    return part


def _what_fits(profile: Mapping[str, Any], size: int) -> str:
    """Says what the memory estimate decides for hh-rlhf-lora under this profile, on a device of `size` bytes."""
    from transformers import AutoConfig

    from dpo_recipes.preflight.decide import fit
    from dpo_recipes.preflight.memory import count_weights, size_text
    from dpo_recipes.presets import LORA

    config, budget = AutoConfig.for_model(**SIZES[EXAMPLE]), profile.get("tokens_per_step")
    settings: dict[str, Any] = LORA | {"activation_checkpointing": "auto", "max_length": 1024} | dict(profile)
    settings["per_device_train_batch_size"] = 64  # a whole update
    weights = count_weights(config, settings)
    budgets = [*([budget] if budget else []), "auto"]
    found = [fit(config, weights, {**settings, "tokens_per_step": each}, size, task="preference") for each in budgets]
    parts = [
        f"tokens_per_step {tokens:,}{' (auto)' if asked == 'auto' else ''} with activation checkpointing "
        f"{'on' if checkpointing else 'off'}, about {size_text(needs)}"
        for asked, (checkpointing, tokens, needs) in zip(budgets, found, strict=True)
    ]
    return f"{EXAMPLE} with LoRA: {'; '.join(parts)} of {size_text(size)}"


def _read_pins() -> dict[str, str]:
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines() if CONSTRAINTS.exists() else []
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
