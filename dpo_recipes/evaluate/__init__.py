"""A tuned model beside the one it started from: held-out pairs, answers to held-out prompts, and a judge of those."""

import re
import runpy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from transformers import AutoConfig
from trl import RewardConfig

from dpo_recipes import page, statistics
from dpo_recipes.answers import Entry, Sampling, answer_all, draw_prompts, records
from dpo_recipes.errors import RecipeError
from dpo_recipes.evaluation import PreferenceLogps, calibration
from dpo_recipes.files import read_json, write_json, write_jsonl, write_text
from dpo_recipes.intervals import Estimate, wilson
from dpo_recipes.judges import Judge, Judged, expected_cost, open_judge
from dpo_recipes.measures import MEASURES, columns, of_model
from dpo_recipes.preflight import measure_pairs
from dpo_recipes.preflight.inspect import dataset_recipe, parse_namespace
from dpo_recipes.preflight.tokens import MEASURES as OF_TOKENS
from dpo_recipes.recipe import DONE_FILE, load_tokenizer
from dpo_recipes.record import LIBRARIES, hardware, weights_hash
from dpo_recipes.report import table
from dpo_recipes.terminal import say
from dpo_recipes.tryout import find_start, lora_config, run_settings

WORKS, COIN = 0.55, 0.5  # win rates: above the first a run was worth it, below the second it did harm
SIDES = ("before", "after")
SECTION = "\n## Evaluation\n"
SHOWN = 4  # prompts with both answers


@dataclass
class Subject:
    """What is evaluated, and on what."""

    name: str
    model: str
    start: str
    dataset: str
    beta: float | None
    pairs: Dataset
    judge: Any  # the recipe's exact rule, where it has one
    folder: Path  # of the results
    account: dict[str, Any] = field(default_factory=dict)


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
        endpoint: Fields of `Endpoint` but the URL.

    Raises:
        RecipeError: If the call or the data is wrong.
    """
    subject = _open_subject(name, recipe, profile=profile, flags=flags, base=base, output_dir=output_dir)
    cache = subject.folder / "eval"
    chosen = open_judge(judge, rule=subject.judge, endpoint=endpoint, cache=cache / "judgements.jsonl")
    asked = draw_prompts(subject.pairs, start=subject.start, most=prompts)
    if not asked:
        raise RecipeError(
            f"{subject.start} can answer no prompt of the held-out pairs: none leaves room for an answer."
        )
    if judge and chosen and chosen.scorer is None:
        _confirm(expected_cost(endpoint, asked, max_new_tokens=max_new_tokens), yes=yes)
    hashes = {model: weights_hash(SimpleNamespace(name_or_path=model)) for model in (subject.start, subject.model)}
    entries = [
        Entry(side, model, seed, hashes[model] or model)
        for side, model in zip(SIDES, (subject.start, subject.model), strict=True)
    ]
    sampling = Sampling(temperature, max_new_tokens)
    found = answer_all(
        entries, subject.start, prompts=asked, pairs=subject.pairs, sampling=sampling, folder=cache / "answers"
    )
    texts = [[answer["text"] for answer in found[side]["answers"]] for side in SIDES]
    judged = chosen.compare(asked, *texts) if chosen else None
    results = _about(subject, sampling, seed, chosen) | {"prompts": len(asked), "hashes": hashes}
    results["warnings"] = _warnings(
        subject.model, judge, base_hash=hashes[subject.start], model_hash=hashes[subject.model]
    )
    results |= _judging(found, subject, chosen, judged) | _preference(found, subject.beta)
    results["measures"] = _measures(found, asked, judged, greedy=temperature == 0)
    results["samples"] = [
        {
            "prompt": asked[row] if isinstance(asked[row], str) else asked[row][-1]["content"],
            **_pair(found, judged, row),
        }
        for row in range(min(SHOWN, len(asked)))  # they were drawn by seed
    ]
    return _write(subject.folder, results, ({"prompt": p, **_pair(found, judged, row)} for row, p in enumerate(asked)))


def _open_subject(
    name: str, recipe: Path | None, *, profile: Path, flags: Sequence[str], base: str | None, output_dir: str | None
) -> Subject:
    named = any(flag.partition("=")[0] == "--dataset_name" for flag in flags)
    if recipe:
        namespace = runpy.run_path(str(recipe))
        model = output_dir or str(namespace["RECIPE"]["output_dir"])
        if not (lora_config(model) or (Path(model) / "config.json").exists()):
            raise RecipeError(f"There is no trained model in {model}. Train it first: dpo-recipes train {name}")
        folder, words = Path(model), ["--model_name_or_path", base] if base else []
    elif named:
        namespace, model = dataset_recipe(""), name
        own = Path(name) if run_settings(name) else Path("outputs/evaluate") / re.sub(r"\W+", "_", name.strip("/."))
        folder, words = Path(output_dir or own), ["--model_name_or_path", base or find_start(name)]
    else:
        raise RecipeError(
            f"{name} is a model, whose pairs are not known. Name them with --dataset_name, or evaluate its recipe "
            "(dpo-recipes list)."
        )
    script = recipe or Path(folder.name)
    script_args, training_args, model_args = parse_namespace(namespace, script, profile=profile, flags=[*flags, *words])
    if isinstance(training_args, RewardConfig):
        raise RecipeError(f"{name} makes a reward model, which its training measures: see metrics.json in {model}.")
    start = str(model_args.model_name_or_path)
    tokenizer = load_tokenizer(model_args, training_args)
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
        beta=run_settings(model).get("beta") or getattr(training_args, "beta", None),
        pairs=measured.pairs["test"].remove_columns(list(OF_TOKENS)),
        judge=namespace.get("judge"),
        folder=folder,
    )


def _confirm(cost: str, *, yes: bool) -> None:
    """Nothing, if the cost may be spent."""
    say(cost)
    if yes:
        return
    if not sys.stdin.isatty():
        raise RecipeError("Nothing was asked. To spend that, give --yes; fewer --prompts cost less.")
    if input("Spend that? [y/N] ").strip().lower() not in ("y", "yes"):
        raise RecipeError("Nothing was asked.")


def _about(subject: Subject, sampling: Sampling, seed: int, judge: Judge | None) -> dict[str, Any]:
    device = torch.device(torch.accelerator.current_accelerator() or "cpu")
    return {
        **{key: getattr(subject, key) for key in ("name", "model", "start", "dataset", "beta")},
        "made": datetime.now(UTC).isoformat(timespec="minutes"),
        "judge": judge and judge.name,
        "sampling": asdict(sampling) | {"seed": seed},
        "pairs": len(subject.pairs),
        "hardware": hardware(device),
        "versions": [f"{library} {version(library)}" for library in LIBRARIES],
    }


def _warnings(model: str, judge: str | None, *, base_hash: str | None, model_hash: str | None) -> list[str]:
    """What makes the numbers say less than they seem to."""
    said = []
    if model_hash and model_hash == base_hash:
        said.append("The tuned model and its start have the same weights.")
    raised = read_json(Path(model) / DONE_FILE).get("reward_model_hashes") or []
    if judge and Path(judge).is_dir() and weights_hash(SimpleNamespace(name_or_path=judge)) in raised:
        said.append("The judge is the reward model that this run raised: that it likes the answers says little.")
    return said


def _judging(found: Mapping[str, Any], subject: Subject, judge: Judge | None, judged: Judged | None) -> dict[str, Any]:
    """Win rates, how the judging went, and what that means in words."""
    if judge is None or judged is None:
        return {"verdict": verdict(None), "win_rate": None}
    known = ~np.isnan(judged.won)
    won = judged.won[known]
    if not len(won):
        raise RecipeError(f"{judge.name} gave no verdict that could be read. Its replies are in {subject.folder}/eval.")
    lengths = [np.array([float(answer["tokens"]) for answer in found[side]["answers"]])[known] for side in SIDES]
    rate = wilson(float(won.sum()), len(won))
    controlled = statistics.estimate(
        statistics.length_controlled, [[won, lengths[1] - lengths[0]]], resamples=statistics.RESAMPLES_OF_FITS
    )
    facts = judged.facts
    if judge.scorer and all(isinstance(side, str) or len(side) == 1 for side in subject.pairs["chosen"]):
        facts = facts | {"labels": asdict(_as_labelled(subject.pairs, judge.scorer))}
    return {
        "verdict": verdict(rate),
        "win_rate": asdict(rate),
        "length_controlled": asdict(_short(controlled)),
        "ties": asdict(wilson(float((won == 0.5).sum()), len(won))),
        "judging": facts | {"unknown": int((~known).sum())},
    }


def _as_labelled(pairs: Dataset, scorer: Any) -> Estimate:
    """The share of held-out pairs that the judge ranks as their labels do."""
    texts = [
        [side if isinstance(side, str) else side[0]["content"] for side in pairs[name]]
        for name in ("chosen", "rejected")
    ]
    one, other = np.split(scorer([*pairs["prompt"]] * 2, [*texts[0], *texts[1]]), 2)
    return wilson(float(statistics.wins(one, other).sum()), len(one))


def _short(found: Mapping[str, Any]) -> Estimate:
    return Estimate(*(found[key] for key in ("mean", "low", "high", "n")))


def verdict(rate: Estimate | None) -> dict[str, str]:
    """Whether the tuning was worth it: a `level`, and `words` that say no more than the whole interval does."""
    if rate is None:
        words = "Nobody judged the answers. Name a judge: --judge, as docs/evaluation.md says."
        return {"level": "unjudged", "words": words}
    found = (
        f"the judge prefers the tuned model's answer to {100 * rate.mean:.1f} % of {rate.n} prompts, ties counting one "
        f"half (95 % interval {100 * rate.low:.1f} to {100 * rate.high:.1f} %)"
    )
    if rate.low > WORKS:
        return {"level": "works", "words": f"It works: {found}, and all of the interval is above 55 %."}
    if rate.high < COIN:
        words = f"It is worse than its start: {found}, and all of the interval is below 50 %."
        return {"level": "worse", "words": words}
    why = {
        (True, True): "it is better than its start, but by less than the 55 % that would make it worth it",
        (True, False): "it is better than its start, but perhaps by less than the 55 % that would make it worth it",
        (False, True): "it does not reach 55 %, and may be worse than its start",
        (False, False): "it may be worse than its start (below 50 %) or work (above 55 %)",
    }[rate.low > COIN, rate.high < WORKS]
    return {"level": "not known", "words": f"Not known: {found}; {why}. More --prompts narrow the interval."}


def _preference(found: Mapping[str, Any], beta: float | None) -> dict[str, Any]:
    """Accuracy on the held-out pairs, within strata of length too, calibration, and perplexity on the chosen side."""
    names = [f"{side}{kind}" for kind in ("", "_tokens") for side in ("chosen", "rejected")]
    before, after = (PreferenceLogps(*(np.array(found[side][name], float) for name in names)) for side in SIDES)
    ratio = before.chosen_tokens / before.rejected_tokens
    strata = {
        "all": np.full(len(ratio), True),
        "chosen longer": ratio > 1.1,
        "about as long": (ratio <= 1.1) & (ratio >= 1 / 1.1),
        "chosen shorter": ratio < 1 / 1.1,
    }
    preference = {}
    for stratum, members in strata.items():
        if members.any():
            old, new = before[members], after[members]
            kinds = {"summed": False, "per token": True}
            preference[stratum] = {
                name: {
                    side: asdict(logps.accuracy(per_token=kind)) for side, logps in zip(SIDES, (old, new), strict=True)
                }
                for name, kind in kinds.items()
            } | {"implicit reward": {"after": asdict(new.accuracy_against(old))}}
    margins = (after.chosen - before.chosen) - (after.rejected - before.rejected)
    perplexity = {
        side: asdict(_short(statistics.estimate(_perplexity, [[logps.chosen, logps.chosen_tokens]])))
        for side, logps in zip(SIDES, (before, after), strict=True)
    }
    fit = calibration(beta * margins) if beta else None
    return {"preference_accuracy": preference, "calibration": fit, "perplexity": perplexity}


def _perplexity(logps: NDArray[np.float64], tokens: NDArray[np.float64]) -> float:
    return float(np.exp(-logps.sum() / tokens.sum()))


def _measures(
    found: Mapping[str, Any], prompts: Sequence[Any], judged: Judged | None, *, greedy: bool
) -> dict[str, Any]:
    """Of each side's answers, the measures of a comparison."""
    rows = records(found, prompts=prompts, judge=None, rewards={})
    of = {side: columns(rows[side], found[side]) for side in SIDES}
    if judged and judged.scores:
        for side, scores in zip(SIDES, judged.scores, strict=True):
            of[side]["judge"] = scores.tolist()
    measured = {side: of_model([of[side]], [of["before"]]) for side in SIDES}
    left_out = {"preference_accuracy", *(["kl"] if greedy else [])}  # the first is said in more detail elsewhere
    kept: dict[str, Any] = {}
    for name in [name for name in MEASURES if name in measured["after"] and name not in left_out]:
        kept[name] = {side: asdict(_short(measured[side][name])) for side in SIDES}
    if "kl" in kept:
        kept["kl"] = {"after": kept["kl"]["after"] | {"standard_error": measured["after"]["kl"]["standard_error"]}}
    return kept


def _pair(found: Mapping[str, Any], judged: Judged | None, row: int) -> dict[str, Any]:
    """Both answers to a prompt, and what the judge says of them."""
    both: dict[str, Any] = {side: dict(found[side]["answers"][row]) for side in SIDES}
    if judged is None:
        return both
    for at, side in enumerate(SIDES):
        both[side] |= {"score": float(judged.scores[at][row])} if judged.scores else {}
    return both | {"won": None if np.isnan(judged.won[row]) else float(judged.won[row])}


def _write(folder: Path, results: Mapping[str, Any], answers: Any) -> Path:
    written = write_json(folder / "eval.json", results)
    paths = [written, write_jsonl(folder / "eval.jsonl", answers)]
    template = Path(__file__).with_name("page.html.jinja")
    paths.append(page.write_page(folder / "eval.html", template, {**results, "labels": MEASURES}, {"number": _number}))
    shown = table(("", *SIDES), _rows(results))
    if (card := folder / "README.md").exists() and (folder / DONE_FILE).exists():  # a run's model card
        text = card.read_text(encoding="utf-8").partition(SECTION)[0]
        made = f"{results['pairs']} held-out pairs, {results['prompts']} prompts; judge: {results['judge'] or 'none'}"
        write_text(
            card, f"{text}{SECTION}\n{results['verdict']['words']}\n\n```\n{shown}\n```\n\n({made}. `eval.json`)\n"
        )
    notes = [results["verdict"]["words"], *(f"WARNING: {warning}" for warning in results["warnings"])]
    say("\n".join(["", shown, "(95 % intervals)", "", *notes, "", *map(str, paths)]))
    return written


def _rows(results: Mapping[str, Any]) -> list[list[Any]]:
    """The table for the terminal and the model card."""

    def cells(label: str, found: Mapping[str, Any], places: int = 3) -> list[Any]:
        def cell(side: str) -> str:
            if side not in found:
                return "-"
            mean, low, high = (f"{found[side][key]:.{places}f}" for key in ("mean", "low", "high"))
            return f"{mean} [{low}, {high}]"

        return [label, *map(cell, SIDES)]

    rows = []
    if results["win_rate"]:
        names = {"win_rate": "win rate", "length_controlled": "win rate at equal length", "ties": "ties"}
        rows += [cells(label, {"after": results[key]}) for key, label in names.items()]
    for stratum, kinds in results["preference_accuracy"].items():
        behind = "" if stratum == "all" else f", {stratum} ({kinds['summed']['after']['n']})"
        shown = kinds if stratum == "all" else {"summed": kinds["summed"]}
        rows += [cells(_accuracy(kind) + behind, found) for kind, found in shown.items()]
    if results["calibration"]:
        rows.append(
            [
                "calibration error of the implicit reward",
                "-",
                f"{results['calibration']['expected_calibration_error']:.3f}",
            ]
        )
    rows.append(cells("perplexity on chosen", results["perplexity"], 2))
    return rows + [cells(MEASURES[key][0], found, MEASURES[key][1]) for key, found in results["measures"].items()]


def _accuracy(kind: str) -> str:
    return "implicit-reward accuracy" if kind == "implicit reward" else f"preference accuracy, {kind}"


def _number(value: float, places: int = 3) -> str:
    return f"{value:,.{places}f}".replace("-", "\N{MINUS SIGN}")
