"""The machine: cards, free CPU threads, memory, processor. Torch is imported inside the functions that need it."""

import os
import platform
import re
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_recipes.errors import RecipeError

if TYPE_CHECKING:
    import torch

BFLOAT16 = 8.0  # compute capability; a card below it computes in float16
LOCAL_CARD = 30_000  # MiB; below it the profile for one 24 GB card, above it the one for 80 GB
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # a container's share: microseconds of CPU time in a period, or "max"
MOST_THREADS = 8  # a model small enough to train on a CPU gains little beyond
ENVIRONMENT = {"HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}  # its threads survive no fork
if "OMP_WAIT_POLICY" not in os.environ:  # the variable below would override it
    # libgomp reads it when torch loads it. By default its idle threads spin for milliseconds on cores that others need.
    ENVIRONMENT["GOMP_SPINCOUNT"] = "5000"


def gpu_cards() -> list[tuple[int, float]]:
    """Memory in MiB and compute capability of each NVIDIA card that CUDA_VISIBLE_DEVICES leaves visible."""
    rows = ask_driver("memory.total,compute_cap", r"^\s*(\d+)\s*,\s*(\d+\.\d+)\s*$")
    cards = [(int(memory), float(capability)) for memory, capability in rows]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return cards if visible is None else cards[: sum(card.strip() not in ("", "-1") for card in visible.split(","))]


def ask_driver(fields: str, pattern: str) -> list[tuple[str, ...]]:
    """The fields that nvidia-smi prints of each card, as the pattern's groups; empty without a working driver."""
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return re.findall(pattern, answer, re.MULTILINE)


def default_profile(cards: list[tuple[int, float]]) -> str:
    """The profile for a machine with these cards, as `gpu_cards` gives them."""
    if not cards:
        return "cpu"
    if min(capability for _, capability in cards) < BFLOAT16:
        return "turing"
    return "local" if min(memory for memory, _ in cards) < LOCAL_CARD else "gpu"


def card_memory(card: str) -> int:
    """MiB of a card named by its memory: "24GB" has 24 GiB, as sold.

    Raises:
        RecipeError: If it is not of that form.
    """
    match = re.fullmatch(r"([1-9]\d*)(?:GB|GiB|G)?", card.replace(" ", ""), re.IGNORECASE)
    if match is None:
        raise RecipeError(f"--gpu {card} names no card. Give its memory: --gpu 24GB.")
    return int(match[1]) * 1024


def set_environment() -> None:
    """Sets what a launched recipe is given, for a command that works in this process; its child processes choose anew.

    Variables that the user has set stay as they are.
    """
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(free_threads(1))


def free_threads(processes: int) -> int:
    """CPU threads for each of `processes` that no other program uses at the moment; at least 1.

    Too many cost more than they bring: two threads beside one busy core were over ten times slower than one.
    """
    import psutil

    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    busy = psutil.cpu_percent(interval=0.5, percpu=True)
    free = sum(1 - busy[core] / 100 for core in cores if core < len(busy))
    free = min(free, psutil.cpu_count(logical=False) or free)
    with suppress(OSError, ValueError):
        quota, period = CPU_QUOTA.read_text().split()
        free = min(free, int(quota) / int(period))
    return max(1, min(MOST_THREADS, int(free / processes + 0.2)))  # a core that is 20 % busy counts as free


def peak_memory() -> int:
    """The largest resident memory that this process has had, in bytes.

    On Linux `getrusage` keeps the peak of the process that started this one, which /proc does not.
    """
    with suppress(OSError):
        if found := re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE):
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def hardware(device: "torch.device", processes: int = 1) -> str:
    """The name of the card or of the processor, with the number of processes and, on a CPU, of their threads."""
    import torch

    if device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name()}"
    return f"{processor()}, {processes} process(es) x {torch.get_num_threads()} thread(s)"


def processor() -> str:
    """The name of the processor."""
    with suppress(OSError):
        if found := re.search(r"(?m)^model name.*?: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8")):
            return found[1]
    return platform.processor() or platform.machine()
