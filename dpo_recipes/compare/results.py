"""Numbers of a comparison for results.json and the report, made of the numbers of its runs."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpo_recipes import estimates
from dpo_recipes.compare.budget import answers_scored
from dpo_recipes.compare.plan import ALGORITHMS, NAMES, ONLINE, Stage
from dpo_recipes.evaluate.measures import against, of_model
from dpo_recipes.terminal import duration


def stage_cost(stage: Stage) -> dict[str, Any]:
    """Time, memory and samples of a finished stage. The time of a resumed run is scaled up from its last part."""
    settings, done = stage.read("settings.json"), stage.read("done.json")
    updates, since = done["updates"], done["updates"] - done["resumed_from_update"]
    seconds = (done["train_seconds"] or 0.0) * updates / max(1, since)
    on_gpu = "peak_gpu_memory_mib" in done
    return {
        "seconds": seconds,
        "gpu_hours": seconds / 3600 * int(done["hardware"].partition(" x ")[0]) if on_gpu else None,
        "memory_mib": done["peak_gpu_memory_mib" if on_gpu else "peak_memory_mib"],
        "samples": answers_scored(stage) if stage.kind in ONLINE else updates * settings["pairs_per_update"],
        "tokens": done.get("tokens"),
    }


def model_cost(costs: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Mean cost of a model for one seed, with all stages that are trained for it alone; of memory the maximum.

    Args:
        costs: For each seed the costs of its stages. The algorithm's own is the last, and its samples alone count.
    """
    found = {name: [cost[name] for seed in costs for cost in seed] for name in costs[0][0]}
    mean = {name: None if None in values else sum(values) / len(costs) for name, values in found.items()}
    samples = sum(seed[-1]["samples"] for seed in costs) / len(costs)
    return mean | {"memory_mib": max(found["memory_mib"]), "samples": samples}


def collect(
    stages: Sequence[Stage], runs: Mapping[str, Any], costs: Mapping[str, Any], *, betas: Sequence[str]
) -> dict[str, Any]:
    """Measures of each model and its rates against others, with the numbers that these are made of.

    Args:
        stages: Stages whose models were evaluated.
        runs: By the name of a stage, and `sft-SEED` for the reference model: numbers as `columns` returns them.
        costs: By the name of each finished stage, as `stage_cost` returns them.
        betas: In their order.
    """
    starts = {int(name.removeprefix("sft-")): name for name in runs if name.startswith("sft-")}
    models = [_model("sft", None, starts, runs) | {"cost": None}]
    for kind, beta in itertools.product(ALGORITHMS, betas):
        of = {int(stage.seed or 0): stage for stage in stages if (stage.kind, stage.beta) == (kind, beta)}
        if of:
            # The SFT model is trained for all; a reward model for this stage alone.
            spent = [[costs[part.name] for part in (*one.needs, one) if part.kind != "sft"] for one in of.values()]
            names = {seed: stage.name for seed, stage in of.items()}
            models.append(_model(kind, beta, names, runs) | {"cost": model_cost(spent)})
    # With several betas, even prompts choose the beta, and odd prompts compare the chosen models.
    chosen_by, compared_by = (slice(None, None, 2), slice(1, None, 2)) if len(betas) > 1 else (slice(None), slice(None))

    def reward(model: Mapping[str, Any]) -> float:
        return float(np.mean([runs[name]["judge"][chosen_by] for name in model["names"].values()]))

    by_algorithm = itertools.groupby(models[1:], key=lambda model: model["algorithm"])
    best = [max(of_betas, key=reward) for _, of_betas in by_algorithm]
    duels = [_compare(one, other, runs, rows=compared_by) for one, other in itertools.combinations(best, 2)]
    return {
        "models": models,
        "duels": _corrected([duel for duel in duels if duel["seeds"]]),
        "against_start": _corrected([_compare(model, models[0], runs) for model in models[1:]]),
        "runs": dict(runs),
        "costs": dict(costs),
    }


def _model(kind: str, beta: str | None, names: Mapping[int, str], runs: Mapping[str, Any]) -> dict[str, Any]:
    label = NAMES[kind] + (f", beta {beta}" if beta else "")
    measured = of_model([runs[name] for name in names.values()], [runs[f"sft-{seed}"] for seed in names])
    return {"algorithm": kind, "beta": beta, "label": label, "names": dict(names), **measured}


def _compare(
    one: Mapping[str, Any], other: Mapping[str, Any], runs: Mapping[str, Any], *, rows: slice = slice(None)
) -> dict[str, Any]:
    """Rates of a model against another over the `seeds` that both have; no rates where there is none."""
    seeds = [seed for seed in one["names"] if seed in other["names"]]
    sides = ([runs[model["names"][seed]] for seed in seeds] for model in (one, other))
    rates = against(*sides, rows=rows) if seeds else {}
    return {"one": one["label"], "other": other["label"], "seeds": seeds, "every_other_prompt": rows.step == 2, **rates}


def _corrected(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pairs with `p_value`, the win rate's after Holm's correction for their number."""
    p_values = estimates.holm([pair["win_rate"]["p_value"] for pair in pairs])
    return [pair | {"p_value": value} for pair, value in zip(pairs, p_values, strict=True)]


def _is_noise(pair: Mapping[str, Any]) -> bool:
    return bool(pair["p_value"] >= estimates.ALPHA)


def verdict(results: Mapping[str, Any]) -> list[str]:
    """A headline of one line, then paragraphs on who won, whether that is more than noise, and at what cost.

    If there are several pairs of contenders, the last paragraphs are one for each pair.
    """
    said = []
    if failed := results["failed"]:
        said.append(f"This is a part of the comparison, as some stages failed: {', '.join(failed)}.")
    said += [f"Not an equal match: {check['detail']}" for check in results["fairness"] if not check["held"]]
    models, pairs = {model["label"]: model for model in results["models"]}, results["duels"] or results["against_start"]
    said.insert(0, ("With reservations: " if said else "") + _headline(models, pairs))
    temperature = results["sampling"]["temperature"]
    in_words = [_in_words(pair, models[pair["one"]], models[pair["other"]], temperature) for pair in pairs]
    if results["duels"]:
        rates = [f"{pair['one']} {_percent(pair['win_rate']['mean'])}" for pair in results["against_start"]]
        in_words.append(f"Against the reference model: {'; '.join(rates)} of the prompts.")
    said += [_ranking(pairs), in_words[-1], *in_words[:-1]] if len(results["duels"]) > 1 else in_words
    return said if pairs else [*said, "No model was trained, so that there is nothing to compare."]


def _headline(models: Mapping[str, Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]]) -> str:
    """The algorithm that won all of its pairs, with its smallest lead: the difference between two win rates."""
    leads: dict[str, list[float]] = {}
    for pair in pairs:
        lead = 0.0 if _is_noise(pair) else 200 * pair["win_rate"]["mean"] - 100
        for side, won_by in (("one", lead), ("other", -lead)):
            leads.setdefault(NAMES[models[pair[side]]["algorithm"]], []).append(won_by)
    winners = [f"{name}, by {min(found):.0f} points of win rate" for name, found in leads.items() if min(found) > 0]
    return winners[0] if len(winners) == 1 else "No clear winner"


def _ranking(pairs: Sequence[Mapping[str, Any]]) -> str:
    """Says which contender is better than which other one, as far as the corrected p-values show it."""
    over, open_ = [], []
    for pair in pairs:
        names = [pair[side].partition(", beta ")[0] for side in ("one", "other")]
        ahead, behind = names[:: 1 if pair["win_rate"]["mean"] >= 0.5 else -1]
        if _is_noise(pair):
            open_.append(f"{ahead} and {behind}")
        else:
            over.append(f"{ahead} over {behind}")
    won = f"Better by more than noise: {'; '.join(over)}." if over else "No contender is better by more than noise."
    rest = f" Not told apart: {'; '.join(open_)}." if over and open_ else ""
    return f"{won}{rest} All {len(pairs)} pairs were compared, at 95 % with Holm's correction for their number."


def _in_words(pair: Mapping[str, Any], one: Mapping[str, Any], other: Mapping[str, Any], temperature: float) -> str:
    rate, noise = pair["win_rate"], _is_noise(pair)
    turned = rate["mean"] < 0.5 and not noise
    winner, loser = (pair["other"], pair["one"]) if turned else (pair["one"], pair["other"])

    def share(found: float) -> float:
        """The winner's share."""
        return 1 - found if turned else found

    def interval(low: float, high: float) -> str:
        return "{} to {}".format(*(_percent(end) for end in sorted((share(low), share(high)))))

    won = f"Neither won: {winner} is no better than noise against {loser}" if noise else f"{winner} won against {loser}"
    over_seeds = "; one seed, so that another training might say otherwise"
    if rate["seeds_low"] is not None:
        over_seeds = f", {interval(rate['seeds_low'], rate['seeds_high'])} over {len(rate['by_seed'])} seeds"
    lead = "" if noise else f", a lead of {200 * share(rate['mean']) - 100:.0f} points"
    more = "no more" if estimates.is_noise(pair["difference"], 0.0) else "more"
    words = (
        f"{won}: the judge prefers its answer to {_percent(share(rate['mean']))} of {rate['n']} prompts, ties "
        f"counting one half (95 % interval {interval(rate['low'], rate['high'])} over prompts{over_seeds}; "
        f"p = {pair['p_value']:.3f} after Holm's correction){lead}. "
        f"At equal length it would be {_percent(share(pair['length_controlled']['mean']))}. "
        f"At temperature {temperature} the judge's reward is {one['judge']['mean']:.3f} for {pair['one']} and "
        f"{other['judge']['mean']:.3f} for {pair['other']}, {more} than noise apart, at a KL to the reference model of "
        f"{one['kl']['mean']:.1f} and {other['kl']['mean']:.1f} nats."
    )
    if one["cost"] and other["cost"]:
        spent = [duration(model["cost"]["seconds"]) for model in (one, other)]
        words += f" Training took {spent[0]} and {spent[1]} a seed, reward models included."
    return words


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
