"""Plans the stages of a comparison: each is a recipe with its flags, and comes after the stages that it needs."""

import hashlib
import itertools
import runpy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from dpo_recipes.catalog import find_recipe
from dpo_recipes.errors import RecipeError
from dpo_recipes.files import read_json
from dpo_recipes.flags import grouped
from dpo_recipes.launch.launch import Launch
from dpo_recipes.preflight.inspect import parse_namespace
from dpo_recipes.recipe import argument_classes
from dpo_recipes.terminal import say

ONLINE = ("rounds", "ppo", "rloo")  # learn from answers of the policy that a reward model scores
ALGORITHMS = ("dpo", *ONLINE)  # compared with each other
DEFAULT = ("dpo", "rounds", "ppo")
NAMES = {"sft": "SFT", "dpo": "DPO", "ppo": "PPO", "rloo": "RLOO", "rounds": "DPO in rounds"}
JUDGE_SEED = 1000  # of the judge's training; no learner has it
RESERVED = {
    **{"output_dir": "--output_dir of the comparison", "seed": "--seeds 0,1,2", "beta": "--betas 0.05,0.1"},
    **{"part": "nothing: the comparison divides the data", "config": "--profile FILE", "sweep": "--betas and --seeds"},
    **{"reward_model_name_or_path": "nothing: the comparison trains one", "max_steps": "--dpo.max_steps"},
    **{"overwrite": "nothing: remove the folder to begin anew", "resume_from_checkpoint": "nothing: it goes on itself"},
    **{"dry_run": "nothing: the plan is printed first", "eval_pairs": "--prompts"},
    **dict.fromkeys(("budget", "num_prompts"), "nothing: all others sample as many answers as DPO sees pairs"),
    **dict.fromkeys(
        ("max_prompt_length", "max_pair_length"), "--max_length: all learn from the prompts of DPO's pairs"
    ),
}
"""Settings that the comparison sets, each with the flag to give in its place."""
FREE = ("dpo.max_steps", "reward.max_steps", "judge.max_steps")
"""Reserved settings that one recipe may get all the same."""


@dataclass(frozen=True)
class Recipe:
    """A recipe with its settings in a comparison."""

    kind: str
    namespace: Mapping[str, Any]  # of its file
    launch: Launch  # with the profile and the user's flags
    script_args: Any
    training_args: Any
    model_args: Any


@dataclass(frozen=True)
class Stage:
    """One training of a comparison."""

    kind: str
    name: str
    launch: Launch
    folder: Path
    needs: tuple["Stage", ...] = ()
    beta: str | None = None
    seed: int | None = None

    def key(self) -> str:
        """A hash of the settings, data and code of this stage and of the stages that it needs."""
        asked = [self.launch.request(), *(stage.key() for stage in self.needs)]
        return hashlib.sha256(" ".join(asked).encode()).hexdigest()

    def read(self, file: str) -> dict[str, Any]:
        """A JSON file of the folder; empty if it is missing."""
        return read_json(self.folder / file)


def find_siblings(recipe: Path, kinds: Sequence[str]) -> dict[str, Path]:
    """The file of each kind: hh_rlhf_lora has hh_rlhf_reward, hh_rlhf_ppo and hh_rlhf_rloo in the same folder.

    Raises:
        RecipeError: If some are missing; the message names them.
    """
    found, missing = {"dpo": recipe}, []
    bases = [base for base in (recipe.stem, recipe.stem.rpartition("_")[0]) if base]
    for kind in kinds:
        for base in bases:
            with suppress(RecipeError):
                found.setdefault(kind, find_recipe(f"{base}_{kind}", beside=recipe.parent))
        if kind not in found:
            missing.append(" or ".join(f"{base}_{kind}.py" for base in bases))
    if missing:
        raise RecipeError(
            f"To compare {recipe.stem} takes {', '.join(missing)} in the same folder, which has none. Write it from "
            "that of hh-rlhf (dpo-recipes copy hh-rlhf-reward), or compare others: --methods dpo."
        )
    return found


def read_recipes(
    launch: Launch, methods: Sequence[str] | None, *, flags: Sequence[str], judge: str | None = None
) -> dict[str, Recipe]:
    """The recipes of a comparison by kind, with valid settings.

    `reward` is among them where an algorithm optimises it, and `judge`, the same file for another run, where the DPO
    recipe names no judge of its own.

    Args:
        launch: Of the DPO recipe, without flags.
        methods: Algorithms that the user asked for. By default those of DEFAULT; rounds only if there is a recipe.
        flags: `--key value` goes to every recipe that has such a setting, `--ppo.key value` to that one,
            `--reward.key value` to the judge too.
        judge: A model that judges, so that none is trained.

    Raises:
        RecipeError: If a recipe is missing, an algorithm or flag is unknown, or a value is refused.
    """
    given = grouped(flags)
    kinds = _check_call(methods or DEFAULT, given)
    if methods is None:
        kinds = _without_missing_rounds(launch.recipe, kinds)
    execute = cache(lambda file: runpy.run_path(str(file)))  # a judge has the file of the reward model
    needs_judge = judge is None and "judge" not in execute(launch.recipe)
    files = find_siblings(launch.recipe, [*kinds, *(["reward"] if needs_judge or {*ONLINE} & {*kinds} else [])])
    files |= {"judge": files["reward"]} if needs_judge else {}
    recipes: dict[str, Recipe] = {}
    known_by: set[str] = set()
    for kind, file in files.items():
        namespace = execute(file)
        known = {entry.name for part in argument_classes(namespace) for entry in fields(part)}
        known |= {f"{prefix}.{key}" for prefix in (kind, "reward" if kind == "judge" else kind) for key in known}
        taken = [(name, values) for name, values in given if name in known]
        known_by |= {name for name, _ in taken}
        own = [word for name, values in taken for word in (f"--{name.rpartition('.')[2]}", *values)]
        if kind != "dpo":  # all start from the same model
            own += ["--model_name_or_path", str(recipes["dpo"].model_args.model_name_or_path)]
        if kind in ONLINE and "max_pair_length" in known and (longest := recipes["dpo"].training_args.max_length):
            own += ["--max_pair_length", str(longest)]
        parsed = parse_namespace(namespace, file, profile=launch.profile, flags=own)
        recipes[kind] = Recipe(kind, namespace, replace(launch, recipe=file, flags=tuple(own)), *parsed)
    if unknown := [name for name, _ in given if name not in known_by]:
        raise RecipeError(
            f"--{unknown[0]} is a setting of none of the recipes {', '.join(files)}. To give one recipe a setting, "
            "write for example --ppo.learning_rate 1e-5."
        )
    return recipes


def _without_missing_rounds(recipe: Path, kinds: list[str]) -> list[str]:
    """The algorithms without rounds, if the recipe has no sibling for them and nobody asked for them."""
    try:
        find_siblings(recipe, ["rounds"])
    except RecipeError:
        say(f"There is no recipe for DPO in rounds beside {recipe.name}, so they are not compared.")
        return [kind for kind in kinds if kind != "rounds"]
    return kinds


def _check_call(methods: Sequence[str], given: Sequence[tuple[str, list[str]]]) -> list[str]:
    """The algorithms that the user asked for; raises RecipeError for unknown ones and for reserved settings."""
    kinds = [kind for kind in ALGORITHMS if kind in methods]
    if len(kinds) < len({*methods}):
        raise RecipeError(f"Got --methods {','.join(methods)}. Give some of {', '.join(ALGORITHMS)}.")
    for name, _ in given:
        key = name.rpartition(".")[2]
        if key in RESERVED and name not in FREE:
            raise RecipeError(f"--{name} is for the comparison to set. Give {RESERVED[key]}.")
    return kinds


def plan_stages(
    recipes: Mapping[str, Recipe], *, betas: Sequence[str], seeds: Sequence[int], root: Path, amounts: Mapping[str, int]
) -> list[Stage]:
    """The stages in their order: the SFT model and the judge once, then the other stages for each seed.

    Args:
        recipes: As `read_recipes` returns them; with a judge among them, all others learn from the part `learn`.
        betas: Each algorithm is trained with each beta.
        seeds: Each stage but the SFT model and the judge is trained with each seed.
        root: The folder of the stages' folders.
        amounts: Of each online algorithm, as `amount_within` returns them.
    """
    start: list[Stage] = []
    sft = recipes["dpo"].launch.stages_before().get("model_name_or_path")  # another recipe makes the model
    if sft and not recipes["dpo"].launch.is_given("model_name_or_path"):
        start = [Stage("sft", sft.recipe.stem, sft, Path("outputs") / sft.recipe.stem)]
    stages = [*start]

    def add(kind: str, name: str, *flags: str, needs: Sequence[Stage] = (), **point: Any) -> Stage:
        of = recipes[kind].launch
        launch = replace(of, flags=(*of.flags, *flags, "--output_dir", str(root / name)))
        stages.append(Stage(kind, name, launch, root / name, (*start, *needs), **point))
        return stages[-1]

    if "judge" in recipes:
        add("judge", "judge", "--part", "judge", "--seed", str(JUDGE_SEED), seed=JUDGE_SEED)
    for seed in seeds:
        drawn = ["--seed", str(seed), *(["--part", "learn"] if "judge" in recipes else [])]
        for beta in betas:
            add("dpo", f"dpo-{beta}-{seed}", "--beta", beta, *drawn, beta=beta, seed=seed)
        online = [kind for kind in ONLINE if kind in recipes]
        reward = [add("reward", f"reward-{seed}", *drawn, seed=seed)] if online else []
        for kind, beta in itertools.product(online, betas):
            flags = ["--beta", beta, *drawn, "--reward_model_name_or_path", str(reward[0].folder)]
            flags += ["--num_prompts" if kind == "rounds" else "--max_steps", str(amounts[kind])]
            add(kind, f"{kind}-{beta}-{seed}", *flags, needs=reward, beta=beta, seed=seed)
    return stages


def is_done(stage: Stage) -> bool:
    """Returns True if the folder holds this stage, finished, with the same settings of all stages that it needs."""
    is_same = stage.kind == "sft" or stage.read("stage.json").get("key") == stage.key()
    return is_same and stage.launch.is_done(stage.folder)
