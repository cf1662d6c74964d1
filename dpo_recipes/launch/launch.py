"""`dpo-recipes train`: decides what to run and with how much of the machine; `processes` runs it."""

import hashlib
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from dpo_recipes.catalog import find_recipe, find_settings, read_yaml, recipe_setting
from dpo_recipes.errors import RecipeError
from dpo_recipes.files import read_json
from dpo_recipes.launch.processes import supervise
from dpo_recipes.manifest import finished_run
from dpo_recipes.secrecy import hide_flags
from dpo_recipes.terminal import say

# Flags that change the way to a result, not the result.
HOW_NOT_WHAT = ("overwrite", "resume_from_checkpoint", "dry_run", "threshold", "hub_token")
STARTS = ("model_name_or_path", "reward_model_name_or_path")  # each may name the output of another recipe
BFLOAT16 = 8.0  # compute capability; a card below it computes in float16
LOCAL_CARD = 30_000  # MiB; below it the profile for one 24 GB card, above it the one for 80 GB
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # a container's share: microseconds of CPU time in a period, or "max"
# glibc gives each large tensor back to the kernel, which clears it before the next use: a third of a step's time.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}  # bytes
ENVIRONMENT = {"HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}  # its threads survive no fork
MOST_THREADS = 8  # a model small enough to train on a CPU gains little beyond


def prepare(
    name: str, *, profile: str | None = None, accelerate: str | None = None, flags: Sequence[str] = ()
) -> "Launch":
    """The launch of a recipe, whose `run` trains it.

    Args:
        name: A recipe's name or path.
        profile: Name or path of the machine's settings; by default what the machine has.
        accelerate: Name or path of accelerate's settings; by default what the profile needs.
        flags: TRL arguments, which beat the profile and the recipe.

    Raises:
        RecipeError: If the recipe, the profile or the accelerate file cannot be found or read.
    """
    if any(word.partition("=")[0] == "--config" for word in flags):
        raise RecipeError("Got --config, which the launcher passes itself. Name your own file with --profile FILE.")
    recipe = find_recipe(name)
    cards = gpu_cards()
    profile_file = find_settings("profiles", profile or default_profile(cards), recipe=recipe)
    on_cpu = read_yaml(profile_file).get("use_cpu") or not cards
    default_devices = "cpu" if on_cpu else "single_gpu" if len(cards) == 1 else "multi_gpu"
    accelerate_file = find_settings("accelerate", accelerate or default_devices, recipe=recipe)
    return Launch(recipe, profile_file, accelerate_file, flags=tuple(flags))


@dataclass(frozen=True)
class Launch:
    """A recipe with the profile, the accelerate file and the flags it is to run with."""

    recipe: Path
    profile: Path
    accelerate: Path
    flags: tuple[str, ...]

    def run(self) -> int:
        """Trains the stages before where they are missing or were asked for differently, then this recipe.

        Returns:
            The exit status of the first training that fails, or 128 + n if signal n ended it.
        """
        if not (self.is_dry_run() or "overwrite" in dict(grouped(self.flags))) and self.is_done(self.folder()):
            say(finished_run(self.folder()))
            return 0
        needed = self._stages_to_train()
        if needed and self.is_dry_run():
            return self._dry_run(needed)
        if needed and (status := self.check()):
            return status
        for stage, reason in needed.values():
            say(f"{self.recipe.stem} needs {stage.recipe.stem}, which is trained first: {reason}.")
            if status := stage.run():
                return status
        command = self._arguments()
        say(shlex.join(["accelerate", "launch", *hide_flags(command)]))
        return supervise(command, self._environment())

    def _dry_run(self, needed: dict[str, tuple["Launch", str]]) -> int:
        """The plans of the stages before, then this one's, with the tokenizers and configurations that those have."""
        with tempfile.TemporaryDirectory() as folder:
            planned: dict[str, str] = {}
            for name, (stage, reason) in needed.items():
                say(f"{self.recipe.stem} needs {name}, which would be trained first: {reason}.")
                place = os.environ["DPO_RECIPES_DRY_RUN"] = str(Path(folder) / "outputs" / name)
                status = replace(stage, flags=("--dry_run", "true", *stage._named(planned))).run()
                del os.environ["DPO_RECIPES_DRY_RUN"]
                if status:
                    return status
                planned[name] = place
            return replace(self, flags=(*self.flags, *self._named(planned))).run()

    def _named(self, planned: dict[str, str]) -> list[str]:
        """Flags that name the folders of the stages before, where these were planned."""
        before = {key: stage.recipe.stem for key, stage in self.stages_before().items()}
        return [word for key, name in before.items() if name in planned for word in (f"--{key}", planned[name])]

    def is_dry_run(self) -> bool:
        """Whether nothing is to be started."""
        words = dict(grouped(self.flags)).get("dry_run", ["false"]) or ["true"]  # the flag alone is yes
        return words[-1].lower() in ("true", "t", "1", "yes", "y")

    def check(self, *others: "Launch") -> int:
        """2 if the recipe would refuse the settings, 0 if not: better known before a stage trains for minutes.

        Args:
            others: Launches of the same recipe to look at as well.
        """
        launches = (self, *others)
        calls = json.dumps([[each.request(), "--config", str(each.profile), *each.flags] for each in launches])
        command = [sys.executable, "-P", "-m", "dpo_recipes.launch.launch", str(self.recipe), calls]
        return subprocess.run(command, stdout=subprocess.DEVNULL).returncode

    def request(self) -> str:
        """A hash of what is asked for: recipe, profile, flags, local dataset, this package, and the stages before."""
        root = Path(__file__).parents[1]
        parts = [*root.rglob("*.py"), *root.rglob("*.toml")]
        # A comparison trains nothing itself: its report may change without a run being another.
        package = [path for path in parts if not {"recipes", "compare"} & {*path.relative_to(root).parts}]
        name = self.setting("dataset_name") or os.devnull
        data = {Path(re.sub(r":\d+$", "", part)).expanduser() for part in (name, *name.split("+"))}  # a mixture's parts
        data_files = [path for part in data for path in (part, *part.rglob("*")) if path.is_file()]
        files = [self.recipe, self.profile, *sorted(package), *sorted(data_files)]
        flags = [group for group in grouped(self.flags) if group[0] not in HOW_NOT_WHAT]
        asked = " ".join([str(flags), *(stage.request() for stage in self.stages_before().values())])
        digest = hashlib.sha256(asked.encode())
        for file in files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    def setting(self, key: str) -> str | None:
        """A setting that is a string, from the flags, else the profile, else the recipe."""
        given = [" ".join(values) for name, values in grouped(self.flags) if name == key]
        return given[-1] if given else read_yaml(self.profile).get(key) or recipe_setting(self.recipe, key)

    def stages_before(self) -> dict[str, "Launch"]:
        """The launches whose outputs this one starts from, by the setting that names `outputs/NAME`, another recipe."""
        stages = {}
        for key in STARTS:
            named = re.fullmatch(r"(?:\./)?outputs/([\w-]+)/?", self.setting(key) or "")
            if named is None or named[1].replace("-", "_") == self.recipe.stem:
                continue
            with suppress(RecipeError):
                recipe = find_recipe(named[1], beside=self.recipe.parent)
                stage = Launch(recipe, self.profile, self.accelerate, flags=())
                stages[key] = stage.going_on(keep=key in dict(grouped(self.flags)))
        return stages

    def _stages_to_train(self) -> dict[str, tuple["Launch", str]]:
        """Each stage that must be trained before this one, with the reason, by its name; first what others need."""
        needed: dict[str, tuple[Launch, str]] = {}
        for key, stage in self.stages_before().items():
            if reason := self._why_retrain(stage, Path(self.setting(key) or ""), flag=key):
                needed |= stage._stages_to_train() | {stage.recipe.stem: (stage, reason)}
        return needed

    def going_on(self, *, anew: bool = False, keep: bool = False) -> "Launch":
        """This run, told what to do with what its output folder holds: continue the same one, replace another.

        Args:
            anew: Replace the same one too.
            keep: Replace nothing. The run itself refuses a folder that it would have to replace.
        """
        folder = self.folder()
        request = read_json(folder / "settings.json").get("request")
        unfinished = not (folder / "done.json").exists() and request == self.request()
        word = "resume_from_checkpoint" if unfinished and not anew else "overwrite"
        # A folder without settings is none of ours: the run itself refuses to replace it.
        if not request or (keep and word == "overwrite"):
            return self
        return replace(self, flags=(*self.flags, f"--{word}", "true"))

    def folder(self) -> Path:
        """The run's output folder."""
        return Path(self.setting("output_dir") or Path("outputs") / self.recipe.stem)

    def is_done(self, folder: Path) -> bool:
        """Whether the folder holds the run that is asked for, finished."""
        return read_json(folder / "done.json").get("request") == self.request()

    def is_given(self, key: str) -> bool:
        """Returns True where a flag names a model that is there: it is taken as it stands."""
        return key in dict(grouped(self.flags)) and (Path(self.setting(key) or "") / "config.json").exists()

    def _why_retrain(self, stage: "Launch", model: Path, *, flag: str) -> str | None:
        """Why the stage's finished model, if there is one, will not do; None if it will."""
        if self.is_given(flag):
            return None
        done = read_json(model / "done.json")
        if not done:
            return f"{model / 'done.json'} is missing or cannot be read"
        if done.get("request") in (None, stage.request()):  # None: trained without the launcher
            return None
        if (model / "adapter_config.json").exists():
            return None  # a LoRA adapter alone, which another training would leave again: the recipe says what to do
        return f"it was made from another recipe, profile, flags, data or code (--{flag} {model} keeps it)"

    def _processes(self) -> int:
        return int(read_yaml(self.accelerate).get("num_processes") or max(1, len(gpu_cards())))

    def _arguments(self) -> list[str]:
        """What follows `accelerate launch` when the line is typed by hand."""
        on_all_cards = "num_processes" not in read_yaml(self.accelerate)
        processes = ["--num_processes", str(self._processes())] if on_all_cards else []
        files = ["--config_file", str(self.accelerate), *processes, str(self.recipe), "--config", str(self.profile)]
        return [*files, *self.flags]

    def _environment(self) -> dict[str, str]:
        """The user's environment, with defaults for what it does not set."""
        defaults = dict(ENVIRONMENT)
        if read_yaml(self.profile).get("use_cpu"):
            defaults |= KEEP_MEMORY
        if "OMP_NUM_THREADS" not in os.environ:
            defaults["OMP_NUM_THREADS"] = str(free_threads(self._processes()))
        return defaults | os.environ | {"DPO_RECIPES_REQUEST": self.request()}


def default_profile(cards: list[tuple[int, float]]) -> str:
    """The profile for a machine with these cards, as `gpu_cards` gives them."""
    if not cards:
        return "cpu"
    if min(capability for _, capability in cards) < BFLOAT16:
        return "turing"
    return "local" if min(memory for memory, _ in cards) < LOCAL_CARD else "gpu"


def gpu_cards() -> list[tuple[int, float]]:
    """Memory in MiB and compute capability of each NVIDIA card that CUDA_VISIBLE_DEVICES leaves visible."""
    query = ["nvidia-smi", "--query-gpu=memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = re.findall(r"^\s*(\d+)\s*,\s*(\d+\.\d+)\s*$", answer, re.MULTILINE)
    cards = [(int(memory), float(capability)) for memory, capability in rows]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return cards if visible is None else cards[: sum(card.strip() not in ("", "-1") for card in visible.split(","))]


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
    """What a launched recipe is given, for a command that works in this process; processes it starts choose anew."""
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(free_threads(1))


def free_threads(processes: int) -> int:
    """CPU threads for each of `processes` that nobody else uses at the moment; at least 1.

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


def grouped(flags: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each flag's name without dashes, with its values: `--a 1 --b=2` -> [("a", ["1"]), ("b", ["2"])]."""
    groups: list[tuple[str, list[str]]] = []
    for word in flags:
        name, joined, value = word.partition("=")
        if word.startswith("--"):
            groups.append((name[2:].replace("-", "_"), [value] if joined else []))
        elif groups:
            groups[-1][1].append(word)
    return groups


def check_settings() -> None:
    """Reads the recipe in sys.argv[1] with each request and flags of sys.argv[2], as itself would; trains nothing."""
    from dpo_recipes.recipe import FinishedRun, RecipeArguments, argument_classes, parse_recipe

    calls = json.loads(sys.argv[2])
    recipe = runpy.run_path(sys.argv[1])
    parts = argument_classes(recipe)
    ours = any(issubclass(part, RecipeArguments) for part in parts)
    for flags in calls if "RECIPE" in recipe and ours else []:
        os.environ["DPO_RECIPES_REQUEST"], *sys.argv[1:] = flags
        with suppress(FinishedRun):
            parse_recipe(recipe["RECIPE"], parts)


if __name__ == "__main__":
    from dpo_recipes.recipe import run

    run(check_settings)
