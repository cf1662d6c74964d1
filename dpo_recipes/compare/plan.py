"""What a comparison runs: its stages, each a recipe with its flags, in an order in which each finds what it needs."""

import hashlib
import itertools
import runpy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from dpo_recipes.catalog import find_recipe
from dpo_recipes.errors import RecipeError
from dpo_recipes.files import read_json
from dpo_recipes.flags import grouped
from dpo_recipes.launch.launch import Launch
from dpo_recipes.preflight.inspect import parse_namespace
from dpo_recipes.recipe import argument_classes

ONLINE = ("ppo", "rloo")
ALGORITHMS = ("dpo", *ONLINE)  # those that are compared
KINDS = ("sft", "judge", *ALGORITHMS, "reward")
JUDGE_SEED = 1000  # of the judge's training, unlike any learner's
RESERVED = {
    **{"output_dir": "--output_dir of the comparison", "seed": "--seeds 0,1,2", "beta": "--betas 0.05,0.1"},
    **{"part": "nothing: the comparison divides the data", "config": "--profile FILE", "sweep": "--betas and --seeds"},
    **{"reward_model_name_or_path": "nothing: the comparison trains one", "max_steps": "--budget, or --dpo.max_steps"},
    **{"overwrite": "nothing: remove the folder to begin anew", "resume_from_checkpoint": "nothing: it goes on itself"},
    **{"dry_run": "nothing: the plan is printed first", "eval_pairs": "--prompts"},
    **dict.fromkeys(
        ("max_prompt_length", "max_pair_length"), "--max_length: all learn from the prompts of DPO's pairs"
    ),
}
"""Settings that are the comparison's own, and what to give in their place."""


@dataclass(frozen=True)
class Recipe:
    """One of the recipes of a comparison, as it is run there."""

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
        """A hash of what is asked for, of this stage and of those that it starts from."""
        asked = [self.launch.request(), *(stage.key() for stage in self.needs)]
        return hashlib.sha256(" ".join(asked).encode()).hexdigest()

    def chain(self) -> list["Stage"]:
        """What has to be trained for this one alone: itself, and the reward model but not the SFT model it needs."""
        return [*(stage for stage in self.needs if stage.kind == "reward"), self]


def find_siblings(recipe: Path, kinds: Sequence[str]) -> dict[str, Path]:
    """The file of each kind: hh_rlhf_lora has hh_rlhf_reward, hh_rlhf_ppo and hh_rlhf_rloo beside it.

    Raises:
        RecipeError: If some are missing; the message names them.
    """
    found, missing = {"dpo": recipe}, []
    bases = [base for base in (recipe.stem, recipe.stem.rpartition("_")[0]) if base]
    for kind in [kind for kind in kinds if kind != "dpo"]:
        for base in bases:
            with suppress(RecipeError):
                found.setdefault(kind, find_recipe(f"{base}_{kind}", beside=recipe.parent))
        if kind not in found:
            missing.append(" or ".join(f"{base}_{kind}.py" for base in bases))
    if missing:
        raise RecipeError(
            f"To compare {recipe.stem} takes {', '.join(missing)} beside it, which is not there. Write it from that of "
            "hh-rlhf (dpo-recipes copy hh-rlhf-reward), or compare others: --stages dpo."
        )
    return found


def read_recipes(
    launch: Launch, stages: Sequence[str], *, flags: Sequence[str], judge: str | None = None
) -> dict[str, Recipe]:
    """The recipes that a comparison takes, by kind, their settings read and found valid.

    `reward` is among them where something optimises it, `judge` where the DPO recipe has no exact reward of that name:
    the same file, another run.

    Args:
        launch: Of the DPO recipe, without flags.
        stages: Kinds that are asked for.
        flags: `--key value` goes to every recipe that has such a setting, `--ppo.key value` to that one,
            `--reward.key value` to the judge too.
        judge: A model that was named for it; none is trained then.

    Raises:
        RecipeError: If a recipe is missing, a stage or flag is none of theirs, or a value is refused.
    """
    kinds = [kind for kind in ALGORITHMS if kind in stages]
    if not kinds or not {*stages} <= {*ALGORITHMS, "sft", "reward"}:
        raise RecipeError(f"Got --stages {','.join(stages)}, which needs some of {', '.join(ALGORITHMS)}.")
    given = grouped(flags)
    free = ("dpo.max_steps", "reward.max_steps", "judge.max_steps")
    if taken := [name for name, _ in given if name.rpartition(".")[2] in RESERVED and name not in free]:
        raise RecipeError(f"--{taken[0]} is for the comparison to set. Give {RESERVED[taken[0].rpartition('.')[2]]}.")
    is_judged = judge is None and "judge" not in runpy.run_path(str(launch.recipe))
    needs_reward = is_judged or {*ONLINE} & {*kinds}
    files = find_siblings(launch.recipe, [*kinds, *(["reward"] if needs_reward else [])])
    files |= {"judge": files["reward"]} if is_judged else {}
    namespaces = {kind: runpy.run_path(str(file)) for kind, file in files.items()}
    known = {
        kind: {entry.name for part in argument_classes(namespace) for entry in fields(part)}
        for kind, namespace in namespaces.items()
    }
    recipes: dict[str, Recipe] = {}
    taken_by: set[str] = set()
    for kind, namespace in namespaces.items():
        own = []
        for name, values in given:
            of, _, key = name.rpartition(".")
            if of in ("", kind, "reward" if kind == "judge" else kind) and key in known[kind]:
                own += [f"--{key}", *values]
                taken_by.add(name)
        if kind != "dpo":  # all start from the same model
            own += ["--model_name_or_path", str(recipes["dpo"].model_args.model_name_or_path)]
        longest = recipes["dpo"].training_args.max_length if kind in ONLINE else None
        if longest and "max_pair_length" in known[kind]:
            own += ["--max_pair_length", str(longest)]
        parsed = parse_namespace(namespace, files[kind], profile=launch.profile, flags=own)
        recipes[kind] = Recipe(kind, namespace, replace(launch, recipe=files[kind], flags=tuple(own)), *parsed)
    if unknown := [name for name, _ in given if name not in taken_by]:
        raise RecipeError(
            f"--{unknown[0]} is a setting of none of the recipes {', '.join(known)}. One alone gets, for example, "
            "--ppo.learning_rate 1e-5."
        )
    return recipes


def plan_stages(
    recipes: Mapping[str, Recipe], *, betas: Sequence[str], seeds: Sequence[int], root: Path, updates: Mapping[str, int]
) -> list[Stage]:
    """The stages in their order: the SFT model and the judge once, then for each seed everything else.

    Args:
        recipes: As `read_recipes` returns them; where there is a judge among them, all learn from the part `learn`.
        betas: Each algorithm is trained with each of them.
        seeds: Each is trained with each of them.
        root: The folder of the stages' folders.
        updates: Of each online algorithm, within its budget.
    """
    start = [*start_stage(recipes["dpo"])]
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
            flags += ["--max_steps", str(updates[kind])]
            add(kind, f"{kind}-{beta}-{seed}", *flags, needs=reward, beta=beta, seed=seed)
    return stages


def start_stage(recipe: Recipe) -> Iterator[Stage]:
    """The SFT stage, where the recipe's model is one that a recipe makes, and not one that a flag names."""
    before = recipe.launch.stages_before().get("model_name_or_path")
    if before and not recipe.launch.is_given("model_name_or_path"):
        yield Stage("sft", before.recipe.stem, before, Path("outputs") / before.recipe.stem)


def is_done(stage: Stage) -> bool:
    """Whether the folder holds the finished stage that is asked for, made from the stages that are asked for."""
    if stage.kind == "sft":
        return stage.launch.is_done(stage.folder)
    return stage.launch.is_done(stage.folder) and read_json(stage.folder / "stage.json").get("key") == stage.key()
