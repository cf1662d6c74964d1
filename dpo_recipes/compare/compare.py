"""Compares DPO, DPO in rounds, PPO and RLOO on the same data: runs the stages, judges the answers, and reports."""

import random
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from dpo_recipes.compare.budget import amount_within, budget_in_words, check_match
from dpo_recipes.compare.plan import ALGORITHMS, NAMES, ONLINE, Recipe, Stage, plan_stages, read_recipes
from dpo_recipes.compare.report import write_report
from dpo_recipes.compare.results import collect, stage_cost, verdict
from dpo_recipes.compare.stages import Clock, run_stages
from dpo_recipes.estimates import Estimate
from dpo_recipes.evaluate.answers import Entry, answer_all, draw_prompts, exact_judge, score_answers
from dpo_recipes.evaluate.measures import columns
from dpo_recipes.evaluate.report import origin
from dpo_recipes.files import write_json, write_jsonl
from dpo_recipes.launch.launch import prepare
from dpo_recipes.launch.sweep import STOPPED
from dpo_recipes.loading import digest, prompt_hashes
from dpo_recipes.manifest import claim, refuse_strangers
from dpo_recipes.models.rewards import Text, check_reward_model, model_judge, read_reward_config
from dpo_recipes.preflight.prepare import measure_pairs
from dpo_recipes.recipe import load_tokenizer
from dpo_recipes.terminal import say

SHOWN = 4  # prompts with their answers side by side
RECORDED = ("judge", "reward_model", "kl", "repetition")  # numbers of each answer in records.jsonl
ORDER = "The judge scores each answer by itself, so that the order of two answers plays no part."


@dataclass
class Comparison:
    """The recipes of a comparison and its options."""

    root: Path
    recipes: Mapping[str, Recipe]
    seeds: Sequence[int]
    betas: Sequence[str]
    prompts: int
    judge: Callable[[Text, str], float] | str | None  # the exact reward, or a model's name; None: one is trained
    amounts: dict[str, int] = field(default_factory=dict)  # of the online algorithms: updates, or rounds' prompts
    parts: dict[str, Dataset] = field(default_factory=dict)

    @property
    def start(self) -> str:
        """The reference model, from which all are trained."""
        return str(self.recipes["dpo"].model_args.model_name_or_path)

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling of the online algorithms' training, which is the same for all of them."""
        online = next((self.recipes[kind].training_args for kind in ONLINE if kind in self.recipes), None)
        limit = getattr(online, "max_completion_length", 256)
        return {"temperature": getattr(online, "temperature", 1.0), "max_new_tokens": limit}


def compare(
    name: str,
    *,
    profile: str | None = None,
    accelerate: str | None = None,
    flags: Sequence[str] = (),
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    betas: Sequence[str] = (),
    quick: bool = False,
    prompts: int = 200,
    judge: str | None = None,
    output_dir: str | None = None,
) -> int:
    """Trains the stages that are missing, and writes results.json, records.jsonl, report.html, report.md and the plots.

    Args:
        name: A DPO recipe; the recipes of the reward model and of the other algorithms lie in the same folder.
        profile: As in `train`.
        accelerate: As in `train`.
        flags: As `read_recipes` reads them.
        methods: Algorithms to compare, as `read_recipes` reads them.
        seeds: Every stage but the SFT model and the judge is trained with each seed.
        betas: Each algorithm is trained with each beta; by default the DPO recipe's own.
        quick: Whether to take the first beta and the first seed alone.
        prompts: Number of prompts to answer, from the test split.
        judge: A reward model, or a classifier with two labels; by default the recipe's own judge.
        output_dir: `outputs/compare/RECIPE` by default.

    Returns:
        0; 1 if a stage failed, after the others; 128 + n if signal n came.

    Raises:
        RecipeError: If the call or the data is wrong.
    """
    launch = prepare(name, profile=profile, accelerate=accelerate)
    recipes = read_recipes(launch, methods, flags=flags, judge=judge)
    some = slice(1 if quick else None)
    comparison = Comparison(
        root=Path(output_dir or f"outputs/compare/{launch.recipe.stem}"),
        recipes=recipes,
        seeds=list(seeds)[some],
        betas=list(betas or [str(recipes["dpo"].training_args.beta)])[some],
        prompts=prompts,
        judge=judge or recipes["dpo"].namespace.get("judge"),
    )
    if isinstance(comparison.judge, str):
        check_reward_model(*read_reward_config(comparison.judge), [], labels=(1, 2))
    finished, failed = _train(comparison)
    if stopped := [status for status in failed.values() if status in STOPPED]:
        return stopped[0] or 1
    if not comparison.parts:
        return 1
    if "judge" in failed:
        say("The judge could not be trained, and there is nobody to judge: no report.", always=True)
        return 1
    _report(comparison, finished, failed)
    return int(bool(failed))


def _train(comparison: Comparison) -> tuple[list[Stage], dict[str, int | None]]:
    """Runs the stages and divides the data; returns the finished stages and, by name, the statuses of the others."""
    clock, root, recipes = Clock(), comparison.root, comparison.recipes
    plan = partial(plan_stages, recipes, betas=comparison.betas, seeds=comparison.seeds, root=root)
    planned = plan(amounts=dict.fromkeys(ONLINE, 0))  # they are known once SFT has left the tokenizer
    refuse_strangers(root)
    say("\n".join([f"{len(planned)} stages:", *(f"  {stage.name:<16} {stage.folder}" for stage in planned)]))
    claim(root, "answers", *(stage.name for stage in planned))
    statuses = run_stages([stage for stage in planned if stage.kind == "sft"], clock, total=len(planned))
    if not any(statuses.values()):
        comparison.parts = _divide(recipes["dpo"], with_judge=comparison.judge is None)
        budget = partial(amount_within, recipes=recipes, pairs=len(comparison.parts["learn"]))
        comparison.amounts = {kind: budget(recipes[kind]) for kind in ONLINE if kind in recipes}
        planned, done = plan(amounts=comparison.amounts), len(statuses)
        statuses |= run_stages(planned[done:], clock, done=done, total=len(planned))
    failed = {name: status for name, status in statuses.items() if status != 0}
    return [stage for stage in planned if stage.name not in failed], failed


def _divide(dpo: Recipe, *, with_judge: bool) -> dict[str, Dataset]:
    """The parts: pairs to `learn` from, pairs for the `judge`, and the `test` pairs, whose prompts are answered."""
    tokenizer = load_tokenizer(dpo.model_args, dpo.training_args)
    parts: dict[str, Dataset] = {}
    for part in ("learn", "judge") if with_judge else (None,):
        script_args = copy(dpo.script_args)  # dataclasses.replace would leave its settings out
        script_args.part = part
        pairs = measure_pairs(dpo.namespace["load_pairs"], script_args, dpo.training_args, tokenizer).pairs
        parts |= {part or "learn": pairs["train"], "test": pairs["test"]}
    check_parts(parts)
    return parts


def check_parts(parts: Mapping[str, Dataset]) -> None:
    """Raises RuntimeError if two parts share a prompt."""
    hashes = {name: set(prompt_hashes(pairs)) for name, pairs in parts.items()}
    for name, other in (("learn", "judge"), ("learn", "test"), ("judge", "test")):
        if shared := hashes.get(name, set()) & hashes.get(other, set()):
            raise RuntimeError(f"{len(shared)} prompts are in the parts {name} and {other}, which must share none.")


def _report(comparison: Comparison, finished: Sequence[Stage], failed: Mapping[str, int | None]) -> None:
    """Makes and writes the answers, records, results and report of the finished stages."""
    root, runs = comparison.root, [stage for stage in finished if stage.kind in ALGORITHMS]
    prompts = draw_prompts(comparison.parts["test"], start=comparison.start, most=comparison.prompts)
    made_by = next((stage.key() for stage in finished if stage.kind == "sft"), comparison.start)
    entries = [Entry(f"sft-{seed}", comparison.start, seed, made_by) for seed in comparison.seeds]
    entries += [Entry(stage.name, str(stage.folder), int(stage.seed or 0), stage.key()) for stage in runs]
    found = answer_all(
        entries,
        comparison.start,
        prompts=prompts,
        pairs=comparison.parts["test"],
        sampling=comparison.sampling,
        folder=root / "answers",
        trust_remote_code=comparison.recipes["dpo"].training_args.trust_remote_code,
    )
    judge = comparison.judge or root / "judge"
    scorer = exact_judge(judge) if callable(judge) else model_judge(judge)
    optimised = {stage.seed: model_judge(stage.folder) for stage in finished if stage.kind == "reward"}
    rewards = {entry.name: optimised[entry.seed] for entry in entries if entry.seed in optimised}
    scores = score_answers(found, prompts, judge=scorer, rewards=rewards)
    measured = {name: columns(found[name], **scores[name]) for name in found}
    records = {name: _records(found[name]["answers"], measured[name]) for name in found}
    write_jsonl(root / "records.jsonl", ({"run": name} | row for name, rows in records.items() for row in rows))
    costs = {stage.name: stage_cost(stage) for stage in finished}
    results = _about(comparison, finished, failed) | {"prompts": len(prompts)}
    results |= collect(runs, measured, costs, betas=comparison.betas)
    results["verdict"] = verdict(results)
    results["samples"] = _side_by_side(results, records, prompts)
    paths = [write_json(root / "results.json", results), *write_report(root, results)]
    headline, *paragraphs = results["verdict"]
    say("\n".join(["", *paragraphs, "", *map(str, paths), ""]))
    say(headline, always=True)


def _records(answers: Sequence[Mapping[str, Any]], measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each answer with its numbers; None for a number that nobody measured."""
    numbers = {name: measured[name] or [None] * len(answers) for name in RECORDED}
    return [
        {"prompt": row, **answer, **{name: values[row] for name, values in numbers.items()}}
        for row, answer in enumerate(answers)
    ]


def _about(comparison: Comparison, finished: Sequence[Stage], failed: Mapping[str, int | None]) -> dict[str, Any]:
    """The settings and conditions of the comparison: everything but its numbers."""
    parts, recipes, sampling = comparison.parts, comparison.recipes, comparison.sampling
    accuracies = {
        stage.name: stage.read("metrics.json")["reward_accuracy"]["all"]
        for stage in finished
        if stage.kind in ("judge", "reward")
    }
    hashes = {part: digest(parts[part]) if part in parts else None for part in ("learn", "judge")}
    compared = [NAMES[kind] for kind in ALGORITHMS if kind in recipes] + ([] if comparison.amounts else [NAMES["sft"]])
    return {
        "title": " against ".join(compared),
        "recipe": recipes["dpo"].launch.recipe.stem,
        "start": comparison.start,
        "seeds": comparison.seeds,
        "betas": comparison.betas,
        "budget": {"kind": "samples", "detail": budget_in_words(recipes, len(parts["learn"]), comparison.amounts)},
        "sampling": sampling,
        "judge": _about_judge(comparison.judge, accuracies) | {"order": ORDER},
        "reward_accuracy": accuracies,
        "failed": [
            f"{name} ({'not begun' if status is None else f'exit {status}'})" for name, status in failed.items()
        ],
        "parts": {
            part: {"pairs": len(pairs), "prompts": len(set(prompt_hashes(pairs)))} for part, pairs in parts.items()
        },
        "fairness": check_match(finished, betas=comparison.betas, prompts=hashes, sampling=sampling),
        "hardware": ", ".join(sorted({stage.read("done.json")["hardware"] for stage in finished})),
        **origin(),
    }


def _about_judge(judge: object, accuracies: Mapping[str, Any]) -> dict[str, str]:
    if isinstance(judge, str):
        return {"name": judge, "detail": f"The judge is {judge}, a model that was not trained here."}
    if judge is not None:
        return {"name": "the exact reward", "detail": "The judge is the recipe's exact reward, not a model."}
    right = Estimate(**accuracies["judge"])
    return {
        "name": "a reward model of its own",
        "detail": "The judge is a reward model, trained by another seed on prompts that no learner saw. It finds "
        f"chosen better in {right} of the {right.n} held-out pairs.",
    }


def _side_by_side(
    results: Mapping[str, Any], records: Mapping[str, Any], prompts: Sequence[Text], *, seed: int = 0
) -> list[dict[str, Any]]:
    """A few prompts, drawn by seed, with each algorithm's answer by the first seed of its chosen beta."""
    labels = [duel[side] for duel in results["duels"] for side in ("one", "other")]
    labels = labels or [pair["one"] for pair in results["against_start"]]
    shown = [model for model in results["models"] if model["algorithm"] == "sft" or model["label"] in labels]
    samples = []
    for number in sorted(random.Random(seed).sample(range(len(prompts)), min(SHOWN, len(prompts)))):
        prompt = prompts[number]
        answers = [
            {"label": model["label"], "algorithm": model["algorithm"]}
            | {key: records[next(iter(model["names"].values()))][number][key] for key in ("text", "judge", "ended")}
            for model in shown
        ]
        asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        samples.append({"number": number, "prompt": asked, "answers": answers})
    return samples
