"""`dpo-recipes train`: decides which trainings to run, with which settings and devices; `processes` runs them."""

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
from dpo_recipes.flags import grouped, says_no
from dpo_recipes.launch.machines import Machines
from dpo_recipes.machine import ENVIRONMENT, default_profile, free_threads, gpu_cards
from dpo_recipes.manifest import finished_run
from dpo_recipes.secrecy import hide_flags
from dpo_recipes.terminal import say

# Flags that change how a result is reached, not the result.
HOW_NOT_WHAT = ("overwrite", "resume_from_checkpoint", "dry_run", "threshold", "hub_token")
STARTS = ("model_name_or_path", "reward_model_name_or_path")  # each may name the output of another recipe
# Rooms that train nothing: their code may change without making a run another one. A wheel holds the recipes, too.
TRAIN_NOTHING = {"recipes", "compare", "evaluate", "vote", "publish", "doctor", "pages"}
# glibc gives each large tensor back to the kernel, which clears it before the next use: a third of a step's time.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}  # bytes


def prepare(
    name: str,
    *,
    profile: str | None = None,
    accelerate: str | None = None,
    machines: Machines | None = None,
    flags: Sequence[str] = (),
) -> "Launch":
    """The launch of a recipe, whose `run` trains it.

    Args:
        name: A recipe's name or path.
        profile: Name or path of the machine's settings; by default what the machine has.
        accelerate: Name or path of accelerate's settings; by default what the profile needs.
        machines: The machines that train together, or None for this one alone.
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
    alone = len(cards) == 1 and not machines
    default_devices = ("cpu2" if machines else "cpu") if on_cpu else "single_gpu" if alone else "multi_gpu"
    accelerate_file = find_settings("accelerate", accelerate or default_devices, recipe=recipe)
    if machines and read_yaml(accelerate_file).get("distributed_type") == "NO":
        raise RecipeError(f"{accelerate_file} is for one process. Several machines need multi_gpu, fsdp2, zero3, ...")
    return Launch(recipe, profile_file, accelerate_file, flags=tuple(flags), machines=machines)


@dataclass(frozen=True)
class Launch:
    """A recipe with the profile, the accelerate file and the flags it is to run with."""

    recipe: Path
    profile: Path
    accelerate: Path
    flags: tuple[str, ...]
    machines: Machines | None = None

    def run(self) -> int:
        """Trains each stage that this recipe needs and that is missing or out of date, then this recipe.

        Returns:
            The exit status of the first training that fails, or 128 + n if signal n ended it.
        """
        if not (self.is_dry_run() or "overwrite" in self.given()) and self.is_done(self.folder()):
            say(finished_run(self.folder()), always=True)
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
        say("Loading the libraries ...")
        from dpo_recipes.launch.processes import supervise  # imports psutil

        return supervise(command, self._environment())

    def given(self) -> dict[str, list[str]]:
        """The flags by name, each with its values."""
        return dict(grouped(self.flags))

    def setting(self, key: str) -> str | None:
        """A setting that is a string, from the flags, else the profile, else the recipe."""
        given = self.given()
        if key in given:
            return " ".join(given[key])
        return read_yaml(self.profile).get(key) or recipe_setting(self.recipe, key)

    def is_dry_run(self) -> bool:
        """Returns True if the flags ask to start nothing."""
        words = self.given().get("dry_run", ["false"]) or ["true"]  # the flag alone is yes
        return not says_no(words[-1])

    def folder(self) -> Path:
        """The run's output folder."""
        return Path(self.setting("output_dir") or Path("outputs") / self.recipe.stem)

    def is_done(self, folder: Path) -> bool:
        """Returns True if the folder holds the run that is asked for, finished."""
        return read_json(folder / "done.json").get("request") == self.request()

    def request(self) -> str:
        """A hash of what is asked for: recipe, profile, flags, local dataset, this package, and the stages before."""
        root = Path(__file__).parents[1]
        parts = [*root.rglob("*.py"), *root.rglob("*.toml")]
        package = [path for path in parts if not TRAIN_NOTHING & {*path.relative_to(root).parts}]
        name = self.setting("dataset_name") or os.devnull
        data = {Path(re.sub(r":\d+$", "", part)).expanduser() for part in (name, *name.split("+"))}  # a mixture's parts
        data_files = [path for part in data for path in (part, *part.rglob("*")) if path.is_file()]
        flags = [group for group in grouped(self.flags) if group[0] not in HOW_NOT_WHAT]
        asked = " ".join([str(flags), *(stage.request() for stage in self.stages_before().values())])
        digest = hashlib.sha256(asked.encode())
        for file in [self.recipe, self.profile, *sorted(package), *sorted(data_files)]:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    def stages_before(self) -> dict[str, "Launch"]:
        """The launches whose outputs this one starts from, by the setting that names `outputs/NAME`, another recipe."""
        stages = {}
        for key in STARTS:
            named = re.fullmatch(r"(?:\./)?outputs/([\w-]+)/?", self.setting(key) or "")
            if named is None or named[1].replace("-", "_") == self.recipe.stem:
                continue
            with suppress(RecipeError):
                recipe = find_recipe(named[1], beside=self.recipe.parent)
                stage = Launch(recipe, self.profile, self.accelerate, flags=(), machines=self.machines)
                stages[key] = stage.going_on(keep=key in self.given())
        return stages

    def going_on(self, *, anew: bool = False, keep: bool = False) -> "Launch":
        """This launch with a flag for what its output folder holds: continue the same run, replace another.

        Args:
            anew: Replace the same run, too.
            keep: Replace nothing. The run itself refuses a folder that it would have to replace.
        """
        folder = self.folder()
        request = read_json(folder / "settings.json").get("request")
        unfinished = not (folder / "done.json").exists() and request == self.request()
        word = "resume_from_checkpoint" if unfinished and not anew else "overwrite"
        # A folder without our settings belongs to somebody else: the run itself refuses to replace it.
        if not request or (keep and word == "overwrite"):
            return self
        return replace(self, flags=(*self.flags, f"--{word}", "true"))

    def is_given(self, key: str) -> bool:
        """Returns True if a flag names a model that exists: the launch takes it as it is."""
        return key in self.given() and (Path(self.setting(key) or "") / "config.json").exists()

    def check(self, *others: "Launch") -> int:
        """Returns 2 if the recipe refuses the settings, else 0; a call before a stage saves minutes of training.

        Args:
            others: Further launches of the same recipe.
        """
        launches = (self, *others)
        calls = json.dumps([[each.request(), "--config", str(each.profile), *each.flags] for each in launches])
        command = [sys.executable, "-P", "-m", "dpo_recipes.launch.launch", str(self.recipe), calls]
        return subprocess.run(command, stdout=subprocess.DEVNULL).returncode

    def _stages_to_train(self) -> dict[str, tuple["Launch", str]]:
        """The stages that must be trained first, by name and in their order, each with the reason."""
        needed: dict[str, tuple[Launch, str]] = {}
        for key, stage in self.stages_before().items():
            if not self.is_given(key) and (reason := stage._why_train(Path(self.setting(key) or ""), flag=key)):
                needed |= stage._stages_to_train() | {stage.recipe.stem: (stage, reason)}
        return needed

    def _why_train(self, model: Path, *, flag: str) -> str | None:
        """The reason why this stage's model must be trained; None if the finished one will do."""
        done = read_json(model / "done.json")
        if not done:
            return f"{model / 'done.json'} is missing or cannot be read"
        if done.get("request") in (None, self.request()):  # None: trained without the launcher
            return None
        if (model / "adapter_config.json").exists():
            return None  # a LoRA adapter alone, which another training would leave again: the recipe says what to do
        return f"it was made from another recipe, profile, flags, data or code (--{flag} {model} keeps it)"

    def _dry_run(self, needed: dict[str, tuple["Launch", str]]) -> int:
        """Shows the plans of the stages before, then this launch's plan, which reads the tokenizers that they leave."""
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
            flags = (*self.flags, *self._named(planned))
            if "".join(self.given()["dry_run"]).isdigit():
                say(f"The time is not estimated, because that takes the weights of {' and '.join(planned)}.")
                flags += ("--dry_run", "true")
            return replace(self, flags=flags).run()

    def _named(self, planned: dict[str, str]) -> list[str]:
        """Flags that name the folders of those stages before that were planned."""
        before = {key: stage.recipe.stem for key, stage in self.stages_before().items()}
        return [word for key, name in before.items() if name in planned for word in (f"--{key}", planned[name])]

    def _arguments(self) -> list[str]:
        """The words that follow `accelerate launch` when the line is typed by hand."""
        machines = self.machines
        on_all_cards = machines or "num_processes" not in read_yaml(self.accelerate)
        all_processes = self._processes() * (machines.count if machines else 1)
        where = ["--num_processes", str(all_processes)] if on_all_cards else []
        where += machines.arguments() if machines else []
        files = ["--config_file", str(self.accelerate), *where, str(self.recipe), "--config", str(self.profile)]
        return [*files, *self.flags]

    def _environment(self) -> dict[str, str]:
        """The user's environment, with defaults for the variables that it lacks."""
        defaults = ENVIRONMENT | (KEEP_MEMORY if read_yaml(self.profile).get("use_cpu") else {})
        if "OMP_NUM_THREADS" not in os.environ:
            defaults["OMP_NUM_THREADS"] = str(free_threads(self._processes()))
        return defaults | os.environ | {"DPO_RECIPES_REQUEST": self.request()}

    def _processes(self) -> int:
        """Processes on this machine."""
        return int(read_yaml(self.accelerate).get("num_processes") or max(1, len(gpu_cards())))


def read_settings() -> None:
    """Parses the recipe in sys.argv[1] with each request and flags of sys.argv[2], as its training would.

    `Launch.check` calls it in a process of its own, which trains nothing.
    """
    from dpo_recipes.recipe import FinishedRun, RecipeArguments, argument_classes, parse_recipe

    recipe = runpy.run_path(sys.argv[1])
    parts = argument_classes(recipe)
    ours = any(issubclass(part, RecipeArguments) for part in parts)
    for request, *words in json.loads(sys.argv[2]) if "RECIPE" in recipe and ours else []:
        os.environ["DPO_RECIPES_REQUEST"] = request
        with suppress(FinishedRun):
            parse_recipe(recipe["RECIPE"], parts, argv=[sys.argv[1], *words])


if __name__ == "__main__":
    from dpo_recipes.recipe import run

    run(read_settings)
