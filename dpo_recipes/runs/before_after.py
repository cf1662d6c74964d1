"""Measures a finished run: the tuned model against the reference model, or a reward model on the held-out pairs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedModel, Trainer
from trl import DPOTrainer, RewardTrainer

from dpo_recipes.estimates import Array, Estimate, mean_with_interval, wins
from dpo_recipes.health.guards import ReferenceGuard
from dpo_recipes.health.probe import repeated
from dpo_recipes.models import rewards
from dpo_recipes.models.best_of import best_of
from dpo_recipes.models.generation import generate
from dpo_recipes.models.likelihood import (
    PreferenceLogps,
    pair_scores,
    preference_logps,
    reference_model,
    sampled_kl,
    sharded,
    share_ahead,
)
from dpo_recipes.models.rewards import Text, calibration
from dpo_recipes.recipe import OnlineArguments, RecipeArguments
from dpo_recipes.runs.metrics import LABELS, REWARD_SCORE

Score = Callable[[Text, str], dict[str, float]]

SIDES = ("before", "after")  # the reference model and the tuned model
ALL = "all"  # the stratum that holds every held-out pair
KL_PROMPTS = 64  # prompts that are answered at temperature 1 to estimate the KL
EASY = 0.8  # accuracy of the reference model above which little is left to learn about the pairs
SMALL = 100e6  # weights; a smaller model leaves room for more answers at a time


@dataclass
class Questions:
    """Prompts, sampling and scores of both models' answers, and marked answers. `finish_run` explains each field."""

    score: Score | None
    prompts: Sequence[Text] | None
    max_new_tokens: int
    temperatures: Sequence[float]
    candidates: Sequence[Mapping[str, Any]] | Dataset | None = None


@dataclass
class Outcome:
    """Measurements of a run, as metrics.json keeps them and as the terminal shows them."""

    metrics: dict[str, Any]
    header: Sequence[str] = ("", *SIDES)
    rows: list[list[Any]] = field(default_factory=list)  # of the table
    answers: list[dict[str, Any]] = field(default_factory=list)  # prompts, each with both models' answers
    note: str = ""  # below the table
    warnings: list[str] = field(default_factory=list)


def not_measured(trainer: Trainer) -> Outcome:
    """Returns an outcome that holds the last training log and the last evaluation log, and no measurement."""
    names = {"train": "loss", "held_out": "eval_loss"}
    logs = trainer.state.log_history
    return Outcome({part: next((dict(log) for log in reversed(logs) if key in log), {}) for part, key in names.items()})


def measure(trainer: Trainer, script_args: RecipeArguments, strata: str | None, questions: Questions) -> Outcome:
    """Returns all measurements that suit the trainer. Runs on all processes; the main one asks both models.

    Args:
        trainer: After `trainer.train`.
        script_args: As `parse_recipe` returned them.
        strata: A column of the held-out pairs, or None.
        questions: How the models are asked.
    """
    outcome = not_measured(trainer)
    if isinstance(trainer, RewardTrainer):
        _measure_reward_model(trainer, strata, outcome)
        if questions.candidates and trainer.is_world_process_zero() and not sharded(trainer):
            _measure_best_of(trainer, questions.candidates, outcome)
        return outcome
    online, preference = isinstance(script_args, OnlineArguments), isinstance(trainer, DPOTrainer)
    if trainer.eval_dataset is not None and not _held_out(trainer):
        outcome.warnings.append("The evaluation set is empty, a stream or several sets: nothing was measured on it.")
    if preference:
        _measure_preference(trainer, strata, outcome)
    if (online or preference) and trainer.is_world_process_zero() and not sharded(trainer):
        _measure_answers(trainer, questions, outcome, online=online)
    return outcome


def _held_out(trainer: Trainer) -> Any:
    """The evaluation pairs, or an empty list where they are missing, a stream or several sets."""
    return trainer.eval_dataset if isinstance(trainer.eval_dataset, Dataset) else []


def _measure_reward_model(trainer: RewardTrainer, strata: str | None, outcome: Outcome) -> None:
    """Adds accuracy, calibration and spread of the scores of the held-out pairs."""
    if not _held_out(trainer):
        return
    chosen, rejected = pair_scores(trainer)
    margins = chosen - rejected
    accuracy = {stratum: share_ahead(margins[members]) for stratum, members in _strata(trainer, strata).items()}
    scores = {"score of chosen": chosen, "score of rejected": rejected, "margin": margins}
    spread = {name: {"mean": float(values.mean()), "std": float(values.std())} for name, values in scores.items()}
    fit = calibration(margins)
    outcome.metrics |= {
        "reward_accuracy": {stratum: asdict(share) for stratum, share in accuracy.items()},
        "calibration": fit,
        "reward_scores": spread,
    }
    outcome.header = ("", "held-out pairs")
    outcome.rows += [[_label("reward_accuracy", stratum), share] for stratum, share in accuracy.items()]
    outcome.rows += [[f"{name}, mean ± std", "{mean:+.2f} ± {std:.2f}".format(**spread[name])] for name in spread]
    outcome.rows += [[LABELS[name], f"{fit[name]:.3f}"] for name in ("log_loss", "brier", "expected_calibration_error")]
    for row in fit["reliability"]:
        said = f"  right, where it says {row['low']:.2f} to {row['high']:.2f}"
        outcome.rows.append([said, f"{row['right']:.3f} of {row['n']}"])
    outcome.note = f"(95 % intervals; {len(margins)} held-out pairs.)"
    outcome.warnings = _chance_warning(accuracy[ALL])


def _measure_best_of(
    trainer: RewardTrainer, candidates: Sequence[Mapping[str, Any]] | Dataset, outcome: Outcome
) -> None:
    """Adds how often the answer that the model scores highest is right, against other ways to choose one."""
    model, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
    asked = [(row["prompt"], text) for row in candidates for text in row["completions"]]
    scores = iter(rewards.score(model, tokenizer, *zip(*asked, strict=True)).tolist())
    given = [[next(scores) for _ in row["completions"]] for row in candidates]
    votes = [row["votes"] for row in candidates] if "votes" in candidates[0] else None
    found = outcome.metrics["best_of"] = best_of(given, [row["right"] for row in candidates], votes)
    if found["pairs"]:
        outcome.rows.append([LABELS["right_ahead"], Estimate(**found["pairs"])])
    for size, ways in found["by_size"].items():
        named = {LABELS[way].format(n=size): Estimate(**share) for way, share in ways.items()}
        one = {LABELS["one_answer"]: Estimate(**ways["chance"])}  # of one answer all ways choose the same
        outcome.rows += [[name, share] for name, share in (one if size == "1" else named).items()]
    outcome.note += f" Best of N: {found['questions']} held-out questions, bootstrap over them."
    outcome.warnings += _best_of_warning(found["by_size"])


def _best_of_warning(by_size: Mapping[str, Any]) -> list[str]:
    size, ways = list(by_size.items())[-1]
    gain = Estimate(**ways["over_chance"])
    if size == "1" or gain.low > 0:
        return []
    return [
        f"The best of {size} answers by this reward model is {'worse' if gain.high < 0 else 'no better'} than a random "
        f"one, as far as {gain.n} questions show (difference in right answers {gain}). Choose no answers with it."
    ]


def _strata(trainer: Trainer, strata: str | None) -> dict[str, NDArray[np.bool_]]:
    """Masks of the held-out pairs by stratum: all pairs, and the pairs of each value of the column."""
    masks = {ALL: np.full(len(trainer.eval_dataset), True)}
    if strata is not None:
        column = np.array(trainer.eval_dataset[strata])
        masks |= {f"{strata} = {value}": column == value for value in np.unique(column).tolist()}
    return masks


def _label(metric: str, *parts: str) -> str:
    """The metric's label, followed by the parts it is about; the stratum of all pairs goes without saying."""
    return ", ".join([LABELS[metric], *(part for part in parts if part != ALL)])


def _chance_warning(accuracy: Estimate) -> list[str]:
    if accuracy.low > 0.5:
        return []
    what = "ranks the held-out pairs no better than a coin would"
    if accuracy.high < 0.5:
        what = "ranks the held-out pairs worse than a coin would: chosen and rejected may be exchanged in the data"
    return [
        f"The reward model {what} (accuracy {accuracy}). Optimise nothing with it: look at its pairs (preflight.json), "
        "give it more of them, or raise the learning rate."
    ]


def _measure_preference(trainer: DPOTrainer, strata: str | None, outcome: Outcome) -> None:
    """Adds the accuracy of both models' log-probs within each stratum."""
    guards = [each for each in trainer.callback_handler.callbacks if isinstance(each, ReferenceGuard)]
    outcome.warnings += [moved for guard in guards if (moved := guard.moved())]
    result: dict[str, Any] = {}
    outcome.metrics["preference_accuracy"] = result
    if not _held_out(trainer):
        return
    before, after = preference_logps(trainer, reference=True), preference_logps(trainer)
    for stratum, members in _strata(trainer, strata).items():
        found = accuracies(before[members], after[members])
        result[stratum] = {kind: _plain(sides) for kind, sides in found.items()}
        for kind in ("summed", "per token") if stratum == ALL else ("summed",):
            outcome.rows.append([_label("preference_accuracy", kind, stratum), *found[kind].values()])
    outcome.rows.append([LABELS["implicit reward"], "-", after.accuracy_against(before)])
    chosen = {"before": before.chosen.mean(), "after": after.chosen.mean()}
    outcome.metrics["chosen_logps"] = chosen | {"tokens": before.chosen_tokens.mean()}
    outcome.rows.append([LABELS["chosen_logps"], *(f"{value:.2f}" for value in chosen.values())])
    ahead = [wins(each.chosen, each.rejected) for each in (before, after)]
    _add_difference(outcome, _label("preference_accuracy", "summed"), *ahead, of="held-out pairs")
    outcome.note = f"(95 % intervals; {len(trainer.eval_dataset)} held-out pairs.{_easy(before.accuracy())})"


def _easy(ranked: Estimate) -> str:
    """A sentence about pairs that the reference model ranks correctly almost always; empty if it does not."""
    told = f"The reference model already ranks {100 * ranked.mean:.0f} % of them correctly"
    return f" {told}, so look at the sampled answers rather than at accuracy." if ranked.low > EASY else ""


def _add_difference(
    outcome: Outcome, name: str, before: Sequence[float] | Array, after: Sequence[float] | Array, *, of: str
) -> None:
    """Adds both means of a number, and the paired difference with its interval, for the verdict."""
    change = mean_with_interval(np.subtract(after, before))
    both = {"before": float(np.mean(before)), "after": float(np.mean(after))}
    outcome.metrics.setdefault("differences", {})[name] = asdict(change) | both | {"of": of}


def accuracies(before: PreferenceLogps, after: PreferenceLogps) -> dict[str, dict[str, Estimate]]:
    """Accuracy of both models' log-probs, summed and per token, and of the tuned model's implicit reward.

    At step 0 every implicit reward is exactly 0, so a "before" would show a gain that is not there.
    """
    return {
        "summed": {"before": before.accuracy(), "after": after.accuracy()},
        "per token": {"before": before.accuracy(per_token=True), "after": after.accuracy(per_token=True)},
        "implicit reward": {"after": after.accuracy_against(before)},
    }


def _plain(sides: Mapping[str, Estimate]) -> dict[str, dict[str, Any]]:
    return {side: asdict(found) for side, found in sides.items()}


def _measure_answers(trainer: Trainer, questions: Questions, outcome: Outcome, *, online: bool) -> None:
    """Adds both models' answers to the same prompts, their scores, and the KL between the models."""
    if not (drawn := _draw_prompts(trainer, questions.prompts)):
        return
    asked = len(drawn) if questions.prompts else KL_PROMPTS if online else 16
    for temperature in questions.temperatures:
        outcome.answers += _answer(trainer, drawn[:asked], temperature, questions)
    kl = outcome.metrics["kl"] = sampled_kl(trainer, drawn[:KL_PROMPTS], max_new_tokens=questions.max_new_tokens)
    error = "" if kl["standard_error"] is None else f" ± {kl['standard_error']:.2f}"  # a single prompt has none
    outcome.rows.append([LABELS["kl"], "-", f"{kl['nats']:.2f}{error}"])
    if online:
        _add_reward_scores(trainer, outcome.answers)
        told = f"Training raises the {REWARD_SCORE} directly, so look at the other scores and at the answers"
        outcome.note = f"{outcome.note[:-1] or '(95 % intervals.'} {told} rather than at it.)"
    if outcome.answers:
        _add_shares(trainer, outcome)
    if outcome.answers and "scores" in outcome.answers[0]["after"]:
        _tabulate_scores(outcome)


def _draw_prompts(trainer: Trainer, prompts: Sequence[Text] | None) -> list[Text]:
    """The prompts, by default the different ones of the held-out pairs, in an order drawn by seed."""
    held_out = _held_out(trainer)["prompt"] if _held_out(trainer) else []
    distinct = list(prompts or {str(prompt): prompt for prompt in held_out}.values())
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(trainer.args.seed)).tolist()
    return [distinct[index] for index in order]


def _answer(
    trainer: Trainer, prompts: Sequence[Text], temperature: float, questions: Questions
) -> list[dict[str, Any]]:
    """The prompts, each with the reference model's answer and the tuned model's."""
    unwrap, tokenizer = trainer.accelerator.unwrap_model, trainer.processing_class
    options = dict(max_new_tokens=questions.max_new_tokens, temperature=temperature, seed=trainer.args.seed)
    if not temperature and unwrap(trainer.model).num_parameters() < SMALL:
        options["batch_size"] = 64  # greedy answers do not depend on it
    after = generate(unwrap(trainer.model), tokenizer, prompts, **options)
    with reference_model(trainer) as reference:
        before = generate(unwrap(reference), tokenizer, prompts, **options)
    answers = []
    for prompt, *both in zip(prompts, before, after, strict=True):
        if questions.score is not None:
            both = [each | {"scores": {**questions.score(prompt, each["text"])}} for each in both]
        answers.append({"prompt": prompt, "temperature": temperature, "before": both[0], "after": both[1]})
    return answers


def _add_reward_scores(trainer: Any, answers: Sequence[dict[str, Any]]) -> None:
    """Adds each reward model's score, the tokens and the ended flag to the scores of each answer."""
    parts = zip(trainer.reward_func_names, trainer.reward_funcs, trainer.reward_processing_classes, strict=True)
    judges = [part for part in parts if isinstance(part[1], PreTrainedModel)]
    prompts = [answer["prompt"] for answer in answers]
    for side in SIDES:
        given = [answer[side] for answer in answers]
        columns: dict[str, Any] = {}
        for name, model, tokenizer in judges:
            label = REWARD_SCORE if len(judges) == 1 else f"{REWARD_SCORE} ({name})"
            columns[label] = rewards.score(model, tokenizer, prompts, [each["text"] for each in given])
        columns |= {name: [each[name] for each in given] for name in ("tokens", "ended")}
        for row, each in enumerate(given):
            each["scores"] = each.get("scores", {}) | {name: float(columns[name][row]) for name in columns}


def _add_shares(trainer: Trainer, outcome: Outcome) -> None:
    """Adds the share of answers that end and the share of repeats, by which lost text shows.

    Repeats are those of the answers at the lowest temperature, as in the health probe, whose answers are greedy.
    """
    lowest = min(answer["temperature"] for answer in outcome.answers)
    encode, shares = trainer.processing_class, outcome.metrics.setdefault("answers", {"ended": {}, "repeated": {}})
    for side in SIDES:
        group = [answer[side] for answer in outcome.answers if answer["temperature"] == lowest]
        shares["ended"][side] = float(np.mean([answer[side]["ended"] for answer in outcome.answers]))
        shares["repeated"][side] = float(np.mean([repeated(encode(each["text"])["input_ids"]) for each in group]))


def _tabulate_scores(outcome: Outcome) -> None:
    """Adds the means of the scores by temperature, the highest temperature first."""
    result = outcome.metrics["scores"] = {}
    for temperature in sorted({answer["temperature"] for answer in outcome.answers}, reverse=True):
        group = [answer for answer in outcome.answers if answer["temperature"] == temperature]
        label = f"temperature {temperature:g}" if temperature else "greedy"
        result[label] = {}
        for name in group[0]["after"]["scores"]:
            found = {side: mean_with_interval([answer[side]["scores"][name] for answer in group]) for side in SIDES}
            outcome.rows.append([f"{name}, {label}", *found.values()])
            result[label][name] = _plain(found)
        first = next(iter(result[label]))
        both = ([answer[side]["scores"][first] for answer in group] for side in SIDES)
        _add_difference(outcome, f"{first}, {label}", *both, of="prompts")
