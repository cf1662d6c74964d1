"""A tuned model beside the one it started from: held-out pairs, answers to held-out prompts, and a judge of those."""

import re
import runpy
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from trl import RewardConfig

from dpo_recipes.errors import RecipeError
from dpo_recipes.evaluate.answers import Entry, Sampling, answer_all, draw_prompts
from dpo_recipes.evaluate.general import find_tasks, general_tasks
from dpo_recipes.evaluate.judges import Judged, expected_cost, open_judge
from dpo_recipes.evaluate.report import write_report
from dpo_recipes.evaluate.results import SIDES, answer_pairs, judging, measures, preference
from dpo_recipes.files import MANIFEST, check_writable, read_json
from dpo_recipes.manifest import claim
from dpo_recipes.models.open import (
    changes_layers,
    check_weights,
    find_start,
    identify,
    read_adapter,
    run_settings,
)
from dpo_recipes.preflight.inspect import dataset_recipe, parse_namespace
from dpo_recipes.preflight.prepare import measure_pairs
from dpo_recipes.recipe import DONE_FILE, load_tokenizer
from dpo_recipes.runs.model_card import LIBRARIES, hardware, weights_hash
from dpo_recipes.terminal import say

OF_DATA = ("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "columns", "max_length")
SHOWN = 4  # prompts with both answers


@dataclass
class Subject:
    """What is evaluated, and on what."""

    name: str
    model: str
    start: str
    dataset: str
    beta: float | None
    pairs: Dataset  # held-out ones
    rule: Any  # the recipe's exact judge, where it has one
    folder: Path  # of the results
    trust_remote_code: bool  # whether code that comes with a model may run


def evaluate(
    name: str,
    *,
    recipe: Path | None,
    profile: Path,
    flags: Sequence[str],
    base: str | None = None,
    output_dir: str | None = None,
    prompts: int = 200,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
    seed: int = 0,
    judge: str | None = None,
    yes: bool = False,
    tasks: Sequence[str] = (),
    tasks_path: str | None = None,
    endpoint: Mapping[str, Any],
) -> Path:
    """The path of eval.json, beside which are eval.jsonl (the answers) and eval.html.

    The same call goes on where an earlier one was stopped: with the model whose answers are missing, and with the
    replies of an endpoint that are.

    Args:
        name: A recipe, or a model: a folder, a run's too, or a Hub name.
        recipe: The recipe's file; None for a model.
        profile: The machine's settings.
        flags: As `dpo-recipes train` takes them; a model needs `--dataset_name`.
        base: The start; by default the one that the recipe or the run names.
        output_dir: A recipe's run, as in `train`; of a model, where the results go.
        prompts: To answer, of the held-out pairs.
        temperature: Of the answers; at 0, which is greedy, there is no KL.
        max_new_tokens: Where an answer is cut.
        seed: Of the sampling.
        judge: As `open_judge` reads it.
        yes: Spend what an endpoint costs without asking.
        tasks: Of lm-evaluation-harness, before and after.
        tasks_path: A folder of task files of one's own.
        endpoint: Fields of `Endpoint` but the URL.

    Raises:
        RecipeError: If the call or the data is wrong.
    """
    if tasks_path and not tasks:
        raise RecipeError("--tasks_path is a folder of task files: name the tasks with --tasks.")
    manager = find_tasks(tasks, tasks_path) if tasks else None
    subject = _open_subject(name, recipe, profile=profile, flags=flags, base=base, output_dir=output_dir)
    kept = subject.folder / "eval"
    if (subject.folder / MANIFEST).exists():
        claim(subject.folder, kept.name)  # a run that is trained again keeps replies that were paid for
    check_writable(kept)
    asked = draw_prompts(subject.pairs, start=subject.start, most=prompts)
    if len(asked) < 2:
        raise RecipeError(
            f"{subject.start} can answer {len(asked)} of the held-out prompts, needs two: give more rows."
        )
    referee = open_judge(judge, rule=subject.rule, endpoint=endpoint, cache=kept / "judgements.jsonl", prompts=asked)
    if referee and referee.scorer is None:
        _confirm(expected_cost(endpoint, asked, max_new_tokens=max_new_tokens), yes=yes)
    models = dict(zip(SIDES, (subject.start, subject.model), strict=True))
    hashes = {side: _weights(model) for side, model in models.items()}
    begun = hashes[SIDES[0]] or subject.start  # the start's log-probs are kept with the tuned model's answers
    entries = [Entry(side, model, seed, f"{begun}-{hashes[side] or model}") for side, model in models.items()]
    sampling = Sampling(temperature, max_new_tokens)
    found = answer_all(
        entries,
        subject.start,
        prompts=asked,
        pairs=subject.pairs,
        sampling=sampling,
        folder=kept / "answers",
        trust_remote_code=subject.trust_remote_code,
    )
    texts = [[answer["text"] for answer in found[side]["answers"]] for side in SIDES]
    judged = referee.compare(asked, *texts) if referee else None
    answers = answer_pairs(found, asked, judged)
    at: dict[str, Any] = dict(hashes=hashes, folder=kept / "tasks", trust_remote_code=subject.trust_remote_code)
    general = general_tasks(tasks, manager, models=models, **at) if tasks else None
    results = {
        **{key: getattr(subject, key) for key in ("name", "model", "start", "dataset", "beta")},
        "made": datetime.now(UTC).isoformat(timespec="minutes"),
        "judge": referee.name if referee else None,
        "sampling": asdict(sampling) | {"seed": seed},
        "pairs": len(subject.pairs),
        "prompts": len(asked),
        "hashes": hashes,
        "warnings": _warnings(subject, judge, judged, hashes),
        **judging(found, subject.pairs, referee, judged),
        **preference(found, subject.beta),
        **measures(found, asked, judged, greedy=temperature == 0),
        "tasks": general,
        "samples": answers[:SHOWN],  # the prompts were drawn by seed
        "hardware": hardware(torch.device(torch.accelerator.current_accelerator() or "cpu")),
        "versions": [f"{library} {version(library)}" for library in LIBRARIES],
    }
    return write_report(subject.folder, results, answers)


def _open_subject(
    name: str, recipe: Path | None, *, profile: Path, flags: Sequence[str], base: str | None, output_dir: str | None
) -> Subject:
    named = {flag.partition("=")[0] for flag in flags}
    if recipe:
        namespace = runpy.run_path(str(recipe))
        model = output_dir or str(namespace["RECIPE"]["output_dir"])
        if not (read_adapter(model) or (Path(model) / "config.json").exists()):
            raise RecipeError(f"There is no trained model in {model}. Train it first: dpo-recipes train {name}")
        folder, settings = Path(model), run_settings(model)
        given = [(key, str(settings[key])) for key in OF_DATA if settings.get(key) is not None]
        flags = [*(word for key, value in given for word in (f"--{key}", value)), *flags]  # what it was trained on
    elif "--dataset_name" in named:
        namespace, model = dataset_recipe(""), name
        own = Path(name) if run_settings(name) else Path("outputs/evaluate") / re.sub(r"\W+", "_", name.strip("/."))
        folder = Path(output_dir or own)
    else:
        raise RecipeError(
            f"{name} is a model, whose pairs are not known. Name them with --dataset_name, or evaluate its recipe "
            "(dpo-recipes list)."
        )
    script = recipe or Path(folder.name)
    flags = [*flags, "--model_name_or_path", base or find_start(model)]
    script_args, training_args, model_args = parse_namespace(namespace, script, profile=profile, flags=flags)
    if isinstance(training_args, RewardConfig):
        raise RecipeError(f"{name} makes a reward model, which its training measures: see metrics.json in {model}.")
    start = str(model_args.model_name_or_path)
    tokenizer = load_tokenizer(model_args, training_args)
    _check_related(model, tokenizer, start, trust_remote_code=training_args.trust_remote_code)
    config = AutoConfig.from_pretrained(start, trust_remote_code=training_args.trust_remote_code).get_text_config()
    limits = getattr(training_args, "max_length", None), getattr(config, "max_position_embeddings", None)
    training_args.max_length = min(filter(None, limits), default=None)  # a profile's may be more than the model takes
    measured = measure_pairs(namespace["load_pairs"], script_args, training_args, tokenizer)
    say("\n".join(measured.lines))
    return Subject(
        name=recipe.stem if recipe else name,
        model=model,
        start=start,
        dataset=str(script_args.dataset_name),
        beta=training_args.beta if "--beta" in named else run_settings(model).get("beta"),  # of others it is not known
        pairs=measured.pairs["test"],
        rule=namespace.get("judge"),
        folder=folder,
        trust_remote_code=training_args.trust_remote_code,
    )


def _confirm(cost: str, *, yes: bool) -> None:
    """Nothing, if the cost may be spent."""
    say(cost)
    if not yes and sys.stdin.isatty():
        with suppress(EOFError):
            yes = input("Spend that? [y/N] ").strip().lower() in ("y", "yes")
    if not yes:
        raise RecipeError("Nothing was asked. To spend that, give --yes; fewer --prompts cost less.")


def _weights(model: str) -> str | None:
    return weights_hash(SimpleNamespace(name_or_path=model))


def _check_related(model: str, tokenizer: PreTrainedTokenizerBase, start: str, **options: Any) -> None:
    """Raises RecipeError unless the model writes text, in the tokens of its start's tokenizer."""
    artifact = identify(model, base=start, **options)
    if artifact.is_reward_model:
        merged = f"Merge it (dpo-recipes merge {model} --output_dir DIR), and DIR may judge: --judge DIR"
        way_out = merged if artifact.adapter else f"It may judge: --judge {model}"
        raise RecipeError(f"{model} is a reward model, which writes no answers. {way_out}.")
    if artifact.adapter and not changes_layers(artifact.adapter):
        raise RecipeError(
            f"{model} is an adapter of the kind {artifact.adapter['peft_type']}, which adds to the prompt: its "
            "log-probs are not compared. See its answers: dpo-recipes try, or sample."
        )
    check_weights(artifact, **options)
    if artifact.adapter or not (Path(model) / "tokenizer.json").exists():
        return  # the start's tokenizer is used
    own, tokens = AutoTokenizer.from_pretrained(model, **options).get_vocab(), tokenizer.get_vocab()
    alike = sum(own.get(token) == number for token, number in tokens.items())
    if alike < 0.9 * len(tokens):  # special tokens may have other names
        raise RecipeError(
            f"{model} has other tokens than {tokenizer.name_or_path}: it was not trained from it. Name its start with "
            "--base."
        )


def _warnings(
    subject: Subject, judge: str | None, judged: Judged | None, hashes: Mapping[str, str | None]
) -> list[str]:
    """What makes the numbers say less than they seem to."""
    said = []
    if judged and (unknown := int(np.isnan(judged.won).sum())):
        said.append(f"Of {len(judged.won)} prompts {unknown} have no verdict and are left out of the win rate.")
    judge = judge or (subject.rule if isinstance(subject.rule, str) else None)
    if hashes["before"] and hashes["before"] == hashes["after"]:
        said.append("The tuned model and its start have the same weights.")
    raised = read_json(Path(subject.model) / DONE_FILE).get("reward_model_hashes") or []
    if judge and Path(judge).is_dir() and _weights(judge) in raised:
        said.append("The judge is the reward model that this run raised: that it likes the answers says little.")
    return said
