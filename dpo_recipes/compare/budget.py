"""How much an online algorithm may learn from, so that DPO had as much; and whether the match was a fair one."""

import itertools
import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from dpo_recipes.compare.plan import ALGORITHMS, ONLINE, Recipe, Stage
from dpo_recipes.errors import RecipeError
from dpo_recipes.files import read_json
from dpo_recipes.preflight.cost import count_updates
from dpo_recipes.runs.model_card import weights_hash

PRESET = ("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "load_in_4bit", "dtype")
SAMPLED_AS = {"temperature": "temperature", "max_new_tokens": "max_completion_length"}
# Passes forward through a model of this size; one backward counts as two.
DPO_PAIR = 2 * (3 + 1)  # two sequences, each trained on and read by the reference
REWARD_PAIR = 2 * 3


def updates_within(recipe: Recipe, *, kind: str, recipes: Mapping[str, Recipe], pairs: int) -> int:
    """The updates of an online algorithm's recipe, whole rollouts.

    Args:
        recipe: Of PPO or RLOO.
        kind: `samples`: it samples as many answers as DPO sees pairs. `compute`: its passes through the model, and
            those of the reward model's training, are as many as DPO's.
        recipes: All of them.
        pairs: That DPO and the reward model learn from.

    Raises:
        RecipeError: If the reward model takes all of it.
    """
    seen = {name: _pairs_seen(recipes[name], pairs) for name in ("dpo", "reward")}
    answers = seen["dpo"]
    if kind == "compute":
        answers = (DPO_PAIR * seen["dpo"] - REWARD_PAIR * seen["reward"]) // passes_per_answer(recipe)
    rollout = recipe.training_args.generation_batch_size
    if answers < rollout:
        raise RecipeError(
            f"An equal budget in {kind} leaves {recipe.kind} {max(0, answers)} answers, and one rollout has {rollout}. "
            "Give DPO more (--dpo.num_train_epochs 4) or the reward model less, or take --budget samples."
        )
    of_rollout = rollout // recipe.script_args.pairs_per_update * recipe.training_args.num_iterations
    return int(math.ceil(answers / rollout) * of_rollout)


def samples_of(stage: Stage) -> int:
    """What a finished stage learned from: pairs, or the answers that it sampled."""
    settings, done = (read_json(stage.folder / name) for name in ("settings.json", "done.json"))
    epochs = settings["num_iterations"] if stage.kind in ONLINE else 1  # over each answer
    return int(done["updates"] * settings["pairs_per_update"] / epochs)


def passes_per_answer(recipe: Recipe) -> int:
    """Generation, reference, reward model, the log-probs that a ratio is taken to, and training, PPO's critic too."""
    epochs: int = recipe.training_args.num_iterations
    return 3 + (epochs > 1) + 3 * epochs * (2 if recipe.kind == "ppo" else 1)


def _pairs_seen(recipe: Recipe, pairs: int) -> int:
    script_args, training_args = recipe.script_args, recipe.training_args
    updates = count_updates(script_args, training_args, pairs)
    of_epochs = math.ceil(pairs * training_args.num_train_epochs)
    seen = updates * script_args.pairs_per_update
    return int(seen if training_args.max_steps > 0 else min(seen, of_epochs))


def budget_in_words(kind: str, recipes: Mapping[str, Recipe], pairs: int, updates: Mapping[str, int]) -> str:
    """What was equal, with numbers."""
    said = [f"DPO sees {_pairs_seen(recipes['dpo'], pairs):,} pairs a seed, of {pairs:,} different ones"]
    for name, count in updates.items():
        recipe = recipes[name]
        answers = count * recipe.script_args.pairs_per_update // recipe.training_args.num_iterations
        said.append(f"{name.upper()} samples {answers:,} answers")
    if updates and kind == "samples":
        said.append("that is one for each pair, in whole rollouts; the pairs of the reward model come on top")
    elif updates:
        passes = [f"{passes_per_answer(recipes[name])} an answer of {name.upper()}" for name in updates]
        said.append(
            "that is as many passes forward through the model, the training of the reward model included: "
            + ", ".join([f"{DPO_PAIR} a pair of DPO", f"{REWARD_PAIR} a pair of the reward model", *passes])
        )
    return "; ".join(said) + "."


def check_match(
    stages: Sequence[Stage], *, betas: Sequence[str], prompts: Mapping[str, str | None], sampling: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """What makes a match fair, each `held` or not, read from what the finished stages say they did.

    Args:
        stages: The finished ones.
        betas: That were asked for.
        prompts: Hashes of the different prompts of the parts `learn` and `judge` (None where none is trained).
        sampling: Temperature and token limit of the answers that are compared.

    Raises:
        RuntimeError: If the judge learned from other prompts than its part, or is what PPO or RLOO optimised.
    """
    settings = {stage.name: read_json(stage.folder / "settings.json") for stage in stages}
    seen = {stage.name: read_json(stage.folder / "preflight.json").get("prompts", {}).get("train") for stage in stages}
    compared = [stage for stage in stages if stage.kind in ALGORITHMS]
    learners = [stage for stage in stages if stage.kind in (*ALGORITHMS, "reward")]
    starts = {read_json(stage.folder / "done.json").get("start_hash") for stage in learners}
    presets = {str([settings[stage.name].get(key) for key in PRESET]) for stage in compared}
    apart = ", ".join(stage.name for stage in learners if seen[stage.name] != prompts["learn"])
    own = [settings[stage.name] for stage in compared if stage.kind in ONLINE]
    alike = [{key: each.get(name) for key, name in SAMPLED_AS.items()} == sampling for each in own]
    points = [{(stage.beta, stage.seed) for stage in compared if stage.kind == kind} for kind in ALGORITHMS]
    tried = [of_kind for of_kind in points if of_kind]
    checks = [
        (len(starts) == 1, "All started from the same weights."),
        (len(presets) == 1, "All were trained with the same LoRA settings."),
        (not apart, f"All learned from the same prompts{', but for ' if apart else ''}{apart}."),
        (all(alike), "All answered the same prompts, by the temperature, token limit and seeds of the training."),
        (
            tried[1:] == tried[:-1],
            f"All had the same tuning budget: beta {', '.join(betas)}, each with the same seeds.",
        ),
    ]
    raised = [read_json(stage.folder / "done.json").get("reward_model_hashes", []) for stage in compared]
    for stage in stages:
        if stage.kind == "judge":
            if seen[stage.name] != prompts["judge"]:
                raise RuntimeError(f"{stage.folder} learned from other prompts than the judge's part.")
            if weights_hash(SimpleNamespace(name_or_path=str(stage.folder))) in itertools.chain(*raised):
                raise RuntimeError(f"{stage.folder} is the reward model that was optimised: it cannot judge.")
            checks.append(
                (True, "The judge learned from prompts that no learner saw, and is no model that PPO optimised.")
            )
    return [{"held": held, "detail": detail} for held, detail in checks]
