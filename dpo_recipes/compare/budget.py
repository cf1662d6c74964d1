"""Gives the online algorithms as many samples as DPO, and checks that the match was a fair one."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_recipes.compare.plan import ALGORITHMS, NAMES, ONLINE, Recipe, Stage
from dpo_recipes.errors import RecipeError
from dpo_recipes.preflight.cost import count_updates
from dpo_recipes.runs.metrics import rounds_of
from dpo_recipes.runs.model_card import weights_hash

PRESET = ("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "load_in_4bit", "dtype")
SAMPLED_AS = {"temperature": "temperature", "max_new_tokens": "max_completion_length"}


def amount_within(recipe: Recipe, *, recipes: Mapping[str, Recipe], pairs: int) -> int:
    """The updates of PPO or RLOO, or the prompts of rounds, with as many sampled answers as DPO sees pairs.

    The number of answers is rounded up to whole rollouts; for rounds to those of PPO, if PPO is compared.

    Args:
        recipe: Of an online algorithm.
        recipes: Of all algorithms, by kind.
        pairs: Different pairs that DPO learns from.

    Raises:
        RecipeError: If that is less than one rollout.
    """
    answers = _pairs_seen(recipes["dpo"], pairs)
    args, rollout = recipe.training_args, _rollout(recipe, recipes)
    if answers < rollout:
        raise RecipeError(
            f"DPO sees {answers} pairs, and one rollout of {recipe.kind} has {rollout} answers. Give DPO more "
            "(--dpo.num_train_epochs 4)."
        )
    rollouts = math.ceil(answers / rollout)
    if recipe.kind == "rounds":
        return -(-rollouts * rollout // int(args.num_generations))
    return int(rollouts * (rollout // recipe.script_args.pairs_per_update * args.num_iterations))


def _rollout(recipe: Recipe, recipes: Mapping[str, Recipe]) -> int:
    """Answers of the smallest amount that the algorithm can sample; for rounds PPO's, if there is one."""
    if recipe.kind == "rounds":
        args = recipe.training_args
        return int(_rollout(recipes["ppo"], recipes) if "ppo" in recipes else args.num_rounds * args.num_generations)
    return int(recipe.training_args.generation_batch_size)


def _pairs_seen(dpo: Recipe, pairs: int) -> int:
    seen = count_updates(dpo.script_args, dpo.training_args, pairs) * dpo.script_args.pairs_per_update
    of_epochs = math.ceil(pairs * dpo.training_args.num_train_epochs)
    return int(seen if dpo.training_args.max_steps > 0 else min(seen, of_epochs))


def budget_in_words(recipes: Mapping[str, Recipe], pairs: int, amounts: Mapping[str, int]) -> str:
    """A sentence with the numbers of pairs and answers that the algorithms learn from."""
    said = [f"DPO sees {_pairs_seen(recipes['dpo'], pairs):,} pairs a seed, of {pairs:,} different ones"]
    for name, count in amounts.items():
        args, how = recipes[name].training_args, ""
        if name == "rounds":
            answers = count * args.num_generations
            how = f", {args.num_generations} to a prompt, in {args.num_rounds} rounds"
        else:
            answers = count * recipes[name].script_args.pairs_per_update // args.num_iterations
        said.append(f"{NAMES[name]} samples {answers:,} answers{how}")
    if amounts:
        said.append(
            "the reward model scores each of them, one for each pair that DPO sees, in whole rollouts; the pairs of "
            "the reward model come on top"
        )
    return "; ".join(said) + "."


def answers_scored(stage: Stage) -> int:
    """Answers that a finished stage of an online algorithm has sampled, each of which the reward model scored."""
    if stage.kind == "rounds":
        return sum(each["answers"] for each in rounds_of(stage.folder))
    settings = stage.read("settings.json")
    return int(stage.read("done.json")["updates"] * settings["pairs_per_update"] / settings["num_iterations"])


def check_match(
    stages: Sequence[Stage], *, betas: Sequence[str], prompts: Mapping[str, str | None], sampling: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Conditions of a fair match, each `held` or not, read from the files of the finished stages.

    Args:
        stages: The finished stages.
        betas: The betas that the user asked for.
        prompts: Hashes of the different prompts of the parts `learn` and `judge`; None for a part that nobody uses.
        sampling: Temperature and token limit of the answers that are compared.

    Raises:
        RuntimeError: If the judge learned from other prompts than its part, or was optimised by an online algorithm.
    """
    compared = [stage for stage in stages if stage.kind in ALGORITHMS]
    learners = [stage for stage in stages if stage.kind in (*ALGORITHMS, "reward")]
    online = [stage for stage in compared if stage.kind in ONLINE]
    settings = {stage.name: stage.read("settings.json") for stage in learners}
    starts = {
        stage.read("done.json").get("start_hash")  # a model at the Hub has none
        or tuple(settings[stage.name].get(key) for key in ("model_name_or_path", "model_revision"))
        for stage in learners
    }
    presets = {str([settings[stage.name].get(key) for key in PRESET]) for stage in compared}
    apart = ", ".join(stage.name for stage in learners if _prompts_of(stage) != prompts["learn"])
    sampled = [settings[stage.name] for stage in online]
    kinds = {stage.kind for stage in compared}
    tried = [{(stage.beta, stage.seed) for stage in compared if stage.kind == kind} for kind in kinds]
    checks = {
        "All started from the same weights.": len(starts) == 1,
        "All were trained with the same LoRA settings.": len(presets) == 1,
        f"All learned from the same prompts{', except ' if apart else ''}{apart}.": not apart,
        "All answered the same prompts, by the temperature, token limit and seeds of the training.": all(
            {key: own.get(name) for key, name in SAMPLED_AS.items()} == sampling for own in sampled
        ),
        f"All had the same tuning budget: beta {', '.join(betas)}, each with the same seeds.": tried[1:] == tried[:-1],
    }
    if len(kinds & {*ONLINE}) > 1:
        scored = [answers_scored(stage) for stage in online]
        rollouts = [own.get("generation_batch_size") or own["num_generations"] for own in sampled]
        is_even = max(scored) - min(scored) < max(rollouts)
        checks["The reward model scored as many answers of one as of the other, to within a rollout."] = is_even
    for judge in [stage for stage in stages if stage.kind == "judge"]:
        _check_judge(judge, compared, prompts=prompts["judge"])
        checks["The judge learned from prompts that no learner saw, and no model was optimised for its scores."] = True
    return [{"held": held, "detail": detail} for detail, held in checks.items()]


def _check_judge(judge: Stage, compared: Sequence[Stage], *, prompts: str | None) -> None:
    if _prompts_of(judge) != prompts:
        raise RuntimeError(f"{judge.folder} learned from other prompts than the judge's part.")
    optimised = {digest for stage in compared for digest in stage.read("done.json").get("reward_model_hashes", [])}
    if weights_hash(str(judge.folder)) in optimised:
        raise RuntimeError(f"{judge.folder} is the reward model that was optimised: it cannot judge.")


def _prompts_of(stage: Stage) -> object:
    """The hash of the different prompts that a stage learned from."""
    return stage.read("preflight.json").get("prompts", {}).get("train")
