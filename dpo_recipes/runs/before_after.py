"""What a finished run is worth: the tuned model beside its start, a reward model on the held-out pairs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedModel, Trainer
from trl import DPOTrainer, RewardTrainer

from dpo_recipes.estimates import Estimate, mean_with_interval
from dpo_recipes.health.guards import ReferenceGuard
from dpo_recipes.models import rewards
from dpo_recipes.models.generation import generate
from dpo_recipes.models.likelihood import (
    pair_scores,
    preference_logps,
    reference_model,
    sampled_kl,
    sharded,
    share_ahead,
)
from dpo_recipes.models.rewards import Text, calibration
from dpo_recipes.recipe import OnlineArguments, RecipeArguments

Score = Callable[[Text, str], dict[str, float]]

KL_PROMPTS = 64  # answers at temperature 1 that the divergence is estimated by
SMALL = 100e6  # weights of a model that has room for more answers at a time
REWARD_SCORE = "reward-model score"


@dataclass
class Outcome:
    """What was measured, as it is shown and as it is kept."""

    metrics: dict[str, Any]  # for metrics.json
    header: Sequence[str] = ("", "before", "after")
    rows: list[list[Any]] = field(default_factory=list)  # of the table
    answers: list[dict[str, Any]] = field(default_factory=list)  # prompts, each with an answer before and after
    note: str = ""  # below the table
    warnings: list[str] = field(default_factory=list)


def not_measured(trainer: Trainer) -> Outcome:
    """Returns what the trainer logged last, and no measurement."""
    return Outcome({"train": _last_logged(trainer, "loss"), "held_out": _last_logged(trainer, "eval_loss")})


def measure(
    trainer: Trainer,
    script_args: RecipeArguments,
    *,
    strata: str | None,
    score: Score | None,
    prompts: Sequence[Text] | None,
    max_new_tokens: int,
    temperatures: Sequence[float],
) -> Outcome:
    """What can be measured of the run: the arguments are those of `finish_run`. Runs on all processes."""
    outcome = not_measured(trainer)
    if isinstance(trainer, RewardTrainer):
        _measure_reward_model(trainer, strata, outcome)
        return outcome
    online = isinstance(script_args, OnlineArguments)
    if trainer.eval_dataset is not None and not _held_out(trainer):
        outcome.warnings.append("The evaluation set is empty, a stream or several sets: nothing was measured on it.")
    if isinstance(trainer, DPOTrainer):
        _measure_preference(trainer, strata, outcome)
    if not (online or isinstance(trainer, DPOTrainer)) or not trainer.is_world_process_zero() or sharded(trainer):
        return outcome
    if not (drawn := _draw_prompts(trainer, prompts)):
        return outcome
    shown = len(drawn) if prompts else KL_PROMPTS if online else 16
    for temperature in temperatures:
        outcome.answers += _answers(trainer, drawn[:shown], temperature, max_new_tokens, score)
    kl = outcome.metrics["kl"] = sampled_kl(trainer, drawn[:KL_PROMPTS], max_new_tokens=max_new_tokens)
    error = math.nan if kl["standard_error"] is None else kl["standard_error"]  # of a single prompt
    outcome.rows.append(["KL to the start, nats", "-", f"{kl['nats']:.2f} ± {error:.2f}"])
    if online:
        _add_reward_scores(trainer, outcome.answers)
        outcome.note = (
            f"(95 % intervals. The {REWARD_SCORE} is what training raised: that it went up says little, what reads the "
            "answers otherwise says more.)"
        )
    if outcome.answers and "scores" in outcome.answers[0]["after"]:
        outcome.metrics["scores"] = _scores(outcome.answers, outcome.rows)
    return outcome


def _last_logged(trainer: Trainer, key: str) -> dict[str, float]:
    """The last log entry with this key; each evaluation set's metrics are its own."""
    return next((dict(entry) for entry in reversed(trainer.state.log_history) if key in entry), {})


def _held_out(trainer: Trainer) -> Any:
    """The evaluation pairs; nothing where there are none, or where they are a stream or several sets."""
    return trainer.eval_dataset if isinstance(trainer.eval_dataset, Dataset) else []


def _strata(trainer: Trainer, strata: str | None) -> dict[str, NDArray[np.bool_]]:
    """The held-out pairs, and those of each value of the column, under what is put behind a row's name."""
    groups = {"": np.full(len(trainer.eval_dataset), True)}
    if strata is not None:
        column = np.array(trainer.eval_dataset[strata])
        groups |= {f", {strata} = {value}": column == value for value in np.unique(column).tolist()}
    return groups


def _measure_preference(trainer: DPOTrainer, strata: str | None, outcome: Outcome) -> None:
    """Accuracy of the log-probs before and after; of the implicit reward after only.

    At step 0 every implicit reward is exactly 0, so a "before" would show a gain that is not there.
    """
    guards = [each for each in trainer.callback_handler.callbacks if isinstance(each, ReferenceGuard)]
    outcome.warnings += [moved for guard in guards if (moved := guard.moved())]
    result: dict[str, Any] = {}
    outcome.metrics["preference_accuracy"] = result
    if not _held_out(trainer):
        return
    before, after = preference_logps(trainer, reference=True), preference_logps(trainer)
    for group, members in _strata(trainer, strata).items():
        old, new = before[members], after[members]
        for name, per_token in (("summed", False), ("per token", True)):
            pair = old.accuracy(per_token=per_token), new.accuracy(per_token=per_token)
            result[name + group] = {"before": asdict(pair[0]), "after": asdict(pair[1])}
            if not (group and per_token):
                outcome.rows.append([f"preference accuracy, {name}{group}", *pair])
        result["implicit reward" + group] = {"after": asdict(new.accuracy_against(old))}
    outcome.rows.append(["implicit-reward accuracy", "-", after.accuracy_against(before)])
    outcome.rows.append(["chosen log-prob, nats", f"{before.chosen.mean():.2f}", f"{after.chosen.mean():.2f}"])
    result["chosen_logps"] = {"before": before.chosen.mean(), "after": after.chosen.mean()}
    ranked = result["summed"]["before"]["mean"]
    outcome.note = (
        f"(95 % intervals; {len(trainer.eval_dataset)} held-out pairs. The likelihood before ranks "
        f"{ranked:.0%} of them right already: accuracy alone says little, the answers say more.)"
    )


def _measure_reward_model(trainer: RewardTrainer, strata: str | None, outcome: Outcome) -> None:
    """Accuracy, calibration and spread of the scores of the held-out pairs."""
    if not _held_out(trainer):
        return
    chosen, rejected = pair_scores(trainer)
    margins = chosen - rejected
    groups = _strata(trainer, strata)
    accuracy = {group: share_ahead(margins[members]) for group, members in groups.items()}
    outcome.header = ("", "held-out pairs")
    outcome.rows += [[f"reward accuracy{group}", share] for group, share in accuracy.items()]
    fit = calibration(margins)
    kinds = {"score of chosen": chosen, "score of rejected": rejected, "margin": margins}
    spread = {name: {"mean": float(values.mean()), "std": float(values.std())} for name, values in kinds.items()}
    outcome.rows += [
        *([f"{name}, mean ± std", "{mean:+.2f} ± {std:.2f}".format(**spread[name])] for name in spread),
        ["log-loss, nats (a coin: 0.693)", f"{fit['log_loss']:.3f}"],
        ["Brier score (a coin: 0.250)", f"{fit['brier']:.3f}"],
        ["expected calibration error", f"{fit['expected_calibration_error']:.3f}"],
        *(
            [f"  right, where it says {row['low']:.2f} to {row['high']:.2f}", f"{row['right']:.3f} of {row['n']}"]
            for row in fit["reliability"]
        ),
    ]
    named = {group.removeprefix(", ") or "all": asdict(share) for group, share in accuracy.items()}
    outcome.metrics |= {"reward_accuracy": named, "calibration": fit, "reward_scores": spread}
    outcome.note = f"(95 % intervals; {len(margins)} held-out pairs.)"
    outcome.warnings = _chance_warning(accuracy[""])


def _chance_warning(accuracy: Estimate) -> list[str]:
    if accuracy.low > 0.5:
        return []
    what = "ranks the held-out pairs no better than a coin would"
    if accuracy.high < 0.5:
        what = "ranks the held-out pairs worse than a coin would: chosen and rejected may be exchanged in the data"
    return [
        f"The reward model {what} (accuracy {accuracy}). Optimise nothing with it: look at the pairs (make inspect), "
        "give it more of them, or raise the learning rate."
    ]


def _draw_prompts(trainer: Trainer, prompts: Sequence[Text] | None) -> list[Text]:
    """The prompts, by default those of the held-out pairs if there are any, in an order drawn by seed."""
    held_out = _held_out(trainer)["prompt"] if _held_out(trainer) else []
    distinct = list(prompts or {str(prompt): prompt for prompt in held_out}.values())
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(trainer.args.seed)).tolist()
    return [distinct[index] for index in order]


def _answers(
    trainer: Trainer, drawn: Sequence[Text], temperature: float, max_new_tokens: int, score: Score | None
) -> list[dict[str, Any]]:
    """The prompts, each with the answer before and after."""
    unwrap, tokenizer = trainer.accelerator.unwrap_model, trainer.processing_class
    options = dict(max_new_tokens=max_new_tokens, temperature=temperature, seed=trainer.args.seed)
    if not temperature and unwrap(trainer.model).num_parameters() < SMALL:
        options["batch_size"] = 64  # greedy answers do not depend on it
    after = generate(unwrap(trainer.model), tokenizer, drawn, **options)
    with reference_model(trainer) as reference:
        before = generate(unwrap(reference), tokenizer, drawn, **options)
    answers = []
    for prompt, old, new in zip(drawn, before, after, strict=True):
        answer = {"prompt": prompt, "temperature": temperature, "before": old, "after": new}
        if score is not None:
            answer["before"] = old | {"scores": score(prompt, old["text"])}
            answer["after"] = new | {"scores": score(prompt, new["text"])}
        answers.append(answer)
    return answers


def _add_reward_scores(trainer: Any, answers: Sequence[dict[str, Any]]) -> None:
    """What each reward model thinks of the answers, and whether they ended, beside their other scores."""
    judges = [
        (name, model, tokenizer)
        for name, model, tokenizer in zip(
            trainer.reward_func_names, trainer.reward_funcs, trainer.reward_processing_classes, strict=True
        )
        if isinstance(model, PreTrainedModel)
    ]
    prompts = [answer["prompt"] for answer in answers]
    for side in ("before", "after"):
        texts = [answer[side]["text"] for answer in answers]
        columns = {
            REWARD_SCORE if len(judges) == 1 else f"{REWARD_SCORE} ({name})": rewards.score(
                model, tokenizer, prompts, texts
            )
            for name, model, tokenizer in judges
        }
        for row, answer in enumerate(answers):
            given = {name: float(values[row]) for name, values in columns.items()}
            length = {"tokens": float(answer[side]["tokens"]), "ended": float(answer[side]["ended"])}
            answer[side]["scores"] = answer[side].get("scores", {}) | given | length


def _scores(answers: Sequence[dict[str, Any]], rows: list[list[Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for temperature in sorted({answer["temperature"] for answer in answers}, reverse=True):
        group = [answer for answer in answers if answer["temperature"] == temperature]
        label = f"temperature {temperature:g}" if temperature else "greedy"
        for name in group[0]["after"]["scores"]:
            pair = [
                mean_with_interval([answer[side]["scores"][name] for answer in group]) for side in ("before", "after")
            ]
            rows.append([f"{name}, {label}", *pair])
            result.setdefault(label, {})[name] = {"before": asdict(pair[0]), "after": asdict(pair[1])}
    return result


def readable(answers: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Prompt and answers as text."""
    return [
        {
            "prompt": answer["prompt"] if isinstance(answer["prompt"], str) else answer["prompt"][-1]["content"],
            "before": answer["before"]["text"],
            "after": answer["after"]["text"],
        }
        for answer in answers
    ]
