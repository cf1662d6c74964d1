"""The numbers of a comparison, from the records of its answers: what results.json holds and the report shows."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpo_recipes import estimates
from dpo_recipes.compare.plan import ALGORITHMS, ONLINE, Stage
from dpo_recipes.evaluate.measures import against, of_model
from dpo_recipes.files import read_json
from dpo_recipes.terminal import duration

NAMES = {"sft": "SFT", "dpo": "DPO", "ppo": "PPO", "rloo": "RLOO"}
COSTS = {
    "seconds": "seconds",
    "gpu_hours": "GPU hours",
    "memory_mib": "peak memory, MiB",
    "samples": "samples",
    "tokens": "tokens",
}


def stage_cost(stage: Stage, samples: int) -> dict[str, Any]:
    """What a finished stage took. A run that was resumed knows the seconds since; the rest is put in by its updates."""
    done = read_json(stage.folder / "done.json")
    updates, since = done["updates"], done["updates"] - done["resumed_from_update"]
    seconds = (done["train_seconds"] or 0.0) * updates / max(1, since)
    on_gpu = "peak_gpu_memory_mib" in done
    return {
        "seconds": seconds,
        "gpu_hours": seconds / 3600 * int(done["hardware"].partition(" x ")[0]) if on_gpu else None,
        "memory_mib": done["peak_gpu_memory_mib" if on_gpu else "peak_memory_mib"],
        "samples": samples,
        "tokens": done.get("tokens"),
    }


def model_cost(costs: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Of a model, for one seed on average: all that was trained for it alone; of memory the most.

    Args:
        costs: For each seed those of its stages, the algorithm's own last, whose samples are the ones that count.
    """
    totals: list[dict[str, Any]] = []
    for seed in costs:
        known = {name: [cost[name] for cost in seed] for name in COSTS}
        totals.append({name: None if None in values else sum(values) for name, values in known.items()})
        totals[-1]["samples"] = seed[-1]["samples"]
    mean = {
        name: None if totals[0][name] is None else sum(total[name] for total in totals) / len(totals) for name in COSTS
    }
    return mean | {"memory_mib": max(cost["memory_mib"] for seed in costs for cost in seed)}


def collect(
    stages: Sequence[Stage],
    runs: Mapping[str, Mapping[str, Any]],
    costs: Mapping[str, Mapping[str, Any]],
    *,
    betas: Sequence[str],
) -> dict[str, Any]:
    """Models, comparisons and what they are made of.

    Args:
        stages: Those whose models were evaluated.
        runs: By the name of a stage, and `sft-SEED` for the start: as `columns` returns them.
        costs: By the name of every finished stage, as `stage_cost` returns them.
        betas: In their order.
    """
    starts = {int(name.removeprefix("sft-")): name for name in runs if name.startswith("sft-")}
    models = [_model("sft", None, starts, runs, [])]
    for kind, beta in itertools.product(ALGORITHMS, betas):
        of = {int(stage.seed or 0): stage for stage in stages if (stage.kind, stage.beta) == (kind, beta)}
        if of:
            spent = [[costs[part.name] for part in stage.chain()] for stage in of.values()]
            models.append(_model(kind, beta, {seed: stage.name for seed, stage in of.items()}, runs, spent))
    best = {kind: _best(kind, models, runs, several=len(betas) > 1) for kind in ALGORITHMS}
    # Where a beta was chosen, it was by the even prompts: what is said of the chosen ones is said of the odd ones.
    rest = slice(1, None, 2) if len(betas) > 1 else slice(None)
    pairs = [(one, other) for kind in ONLINE if (one := best["dpo"]) and (other := best[kind])]
    duels = [_compare(*pair, runs, rows=rest) for pair in pairs]
    against_start = [_compare(model, models[0], runs) for model in models[1:]]
    return {
        "models": models,
        "duels": [duel for duel in duels if duel],
        "against_start": against_start,
        "runs": dict(runs),
        "costs": dict(costs),
    }


def _model(
    kind: str,
    beta: str | None,
    names: Mapping[int, str],
    runs: Mapping[str, Any],
    spent: Sequence[Sequence[Mapping[str, Any]]],
) -> dict[str, Any]:
    measured = of_model([runs[name] for name in names.values()], [runs[f"sft-{seed}"] for seed in names])
    label = NAMES[kind] + (f", beta {beta}" if beta else "")
    cost = model_cost(spent) if spent else None
    return {"algorithm": kind, "beta": beta, "label": label, "names": dict(names), "cost": cost, **measured}


def _compare(
    one: Mapping[str, Any], other: Mapping[str, Any], runs: Mapping[str, Any], *, rows: slice = slice(None)
) -> dict[str, Any]:
    """The rates of a model against another over the seeds that both have; nothing where there are none."""
    seeds = [seed for seed in one["names"] if seed in other["names"]]
    if not seeds:
        return {}
    sides = ([runs[model["names"][seed]] for seed in seeds] for model in (one, other))
    rates = against(*sides, rows=rows)
    return {"one": one["label"], "other": other["label"], "seeds": seeds, "every_other_prompt": rows.step == 2, **rates}


def _best(
    kind: str, models: Sequence[Mapping[str, Any]], runs: Mapping[str, Any], *, several: bool
) -> Mapping[str, Any] | None:
    """The model of an algorithm with the highest judge's reward on the even prompts."""

    def reward(model: Mapping[str, Any]) -> float:
        return float(np.mean([runs[name]["judge"][:: 2 if several else 1] for name in model["names"].values()]))

    return max((model for model in models if model["algorithm"] == kind), key=reward, default=None)


def verdict(results: Mapping[str, Any]) -> list[str]:
    """In plain words: which won, by how much, whether that is more than noise, and at what cost."""
    said = []
    if failed := results["failed"]:
        said.append(f"This is a part of the comparison, as some stages failed: {', '.join(failed)}.")
    said += [f"Not an equal match: {check['detail']}" for check in results["fairness"] if not check["held"]]
    models = {model["label"]: model for model in results["models"]}
    pairs = results["duels"] or results["against_start"]
    said += [_in_words(pair, models[pair["one"]], models[pair["other"]]) for pair in pairs]
    if results["duels"]:
        rates = [f"{pair['one']} {_percent(pair['win_rate']['mean'])}" for pair in results["against_start"]]
        said.append(f"Against the model that all started from: {', '.join(rates)} of the prompts.")
    return said if pairs else [*said, "No model was trained, so that there is nothing to compare."]


def _in_words(pair: Mapping[str, Any], one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    rate, noise = pair["win_rate"], estimates.is_noise(pair["win_rate"])
    turned = rate["mean"] < 0.5 and not noise
    winner, loser = (pair["other"], pair["one"]) if turned else (pair["one"], pair["other"])

    def share(found: float) -> float:
        return min(1.0, max(0.0, 1 - found if turned else found))

    def interval(low: float, high: float) -> str:
        return "{} to {}".format(*(_percent(end) for end in sorted((share(low), share(high)))))

    over_seeds = "; one seed, so that another training might say otherwise"
    if rate["seeds_low"] is not None:
        over_seeds = f", {interval(rate['seeds_low'], rate['seeds_high'])} over {len(rate['by_seed'])} seeds"
    result = (
        f"Neither won: {winner} is no better than noise against {loser}" if noise else f"{winner} won against {loser}"
    )
    more = "no more" if estimates.is_noise(pair["difference"], 0.0) else "more"
    words = [
        f"{result}: the judge prefers its answer to {_percent(share(rate['mean']))} of {rate['n']} prompts, ties "
        f"counting one half (95 % interval {interval(rate['low'], rate['high'])} over prompts{over_seeds}).",
        f"At equal length it would be {_percent(share(pair['length_controlled']['mean']))}.",
        f"The judge's reward is {one['judge']['mean']:.3f} for {pair['one']} and {other['judge']['mean']:.3f} for "
        f"{pair['other']}, {more} than noise apart, at a KL to the start of {one['kl']['mean']:.1f} "
        f"and {other['kl']['mean']:.1f} nats.",
    ]
    if one["cost"] and other["cost"]:
        spent = [duration(model["cost"]["seconds"]) for model in (one, other)]
        words.append(f"Training took {spent[0]} and {spent[1]} a seed, reward models included.")
    return " ".join(words)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
