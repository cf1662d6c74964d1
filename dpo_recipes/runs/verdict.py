"""The verdict on a run in one sentence: better, worse, not known or destroyed, by which number and interval."""

from collections.abc import Mapping
from typing import Any

from dpo_recipes.health import rules
from dpo_recipes.health.rules import RULES, Facts
from dpo_recipes.runs.metrics import LABELS, NAMES, REWARD_SCORE

FEW = 30  # prompts or pairs; with fewer the bootstrap gives an interval that is too narrow
_SIGNS = ("degenerate_text", "kl_runaway", "likelihood_collapse", "no_end")  # rules of text that is lost, worst first


def verdict(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The verdict on a finished run, from what metrics.json holds.

    The number that decides is the first of: the gain of the best of N answers over a random one, for the largest N; a
    reward model's accuracy against a coin; the first score of the caller's
    own, at the highest temperature, as the paired difference of both models' answers to the same prompts; the paired
    difference of the preference accuracy on the held-out pairs. The score that PPO or RLOO raises directly can show a
    run to be worse, and never to be better. A model whose text is lost is destroyed, whatever the number says.

    Returns:
        `word` (better, worse, not known, destroyed) and `sentence`, which begins with it.
    """
    if signs := collapse(metrics):
        return destroyed(signs)
    if sizes := metrics.get("best_of", {}).get("by_size"):
        return _of_best(*list(sizes.items())[-1])
    if accuracy := metrics.get("reward_accuracy", {}).get("all"):
        worse = "chosen and rejected may be exchanged in the data"
        return of_share(LABELS["reward_accuracy"], accuracy, "held-out pairs", equal="a coin has 0.5", worse=worse)
    if found := metrics.get("differences"):
        # The caller's own scores come first, then the accuracy, then the score that training raises directly.
        name = min(found, key=lambda name: (name.startswith(REWARD_SCORE), found[name]["of"] != "prompts"))
        return _of_difference(name, found[name])
    if "preference_accuracy" in metrics:
        return said("not known", "there are no held-out pairs and no scores to compare both models by")
    loss = metrics.get("held_out", {}).get("eval_loss")
    told = "" if loss is None else f"; its last held-out {NAMES['loss']} is {loss:.4f}"
    return said("not known", f"no measurement compares this model with the initial one{told}")


def collapse(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Signs by which the text of a model is lost, by health rule; empty if it is not lost.

    The rules and limits are those that watch the training, here over all measured answers; a score of the caller's own
    that falls as far as `no_end` allows the share of ended answers to fall is a sign too. One fatal sign is enough; of
    the other ones it takes two, because each alone may be meant (longer answers, say, that are cut). At twice the limit
    of the KL the other rules take half of theirs.
    """
    answers, kl, chosen = (metrics.get(name) or {} for name in ("answers", "kl", "chosen_logps"))
    logged = {f"probe/{name}": [(0, both["before"]), (1, both["after"])] for name, both in answers.items()}
    away = kl["nats"] * kl["n"] / kl["tokens"] if kl.get("tokens") else 0.0  # nats a token
    logged["probe/log_ratio"] = [(1, away)]
    if chosen.get("tokens"):
        logged |= {"rewards/chosen": [(1, chosen["after"] - chosen["before"])], "rewards/margins": [(1, 1.0)]}
    facts = Facts(pairs_per_update=1000, max_steps=1, chosen_tokens=chosen.get("tokens", 0.0), beta=1.0)
    is_far = away > 2 * RULES["kl_runaway"]["limits"]["nats"]
    found = {}
    for name in _SIGNS:
        limits = RULES[name]["limits"].items()
        limits = {key: most / 2 if is_far and isinstance(most, float) else most for key, most in limits}
        found[name] = getattr(rules, name)(logged, facts, **limits)
    signs = {name: sign for name, sign in found.items() if sign} | _fallen(metrics.get("scores", {}))
    return signs if len(signs) > 1 or any(RULES[name]["fatal"] for name in signs if name in RULES) else {}


def _fallen(scores: Mapping[str, Any]) -> dict[str, str]:
    """The score of the caller's own that fell furthest, at any temperature, if it fell too far."""
    falls = [(0.0, "")]
    for label, group in scores.items():
        for name, both in group.items():
            before, after = both["before"]["mean"], both["after"]["mean"]
            if not name.startswith(REWARD_SCORE) and name not in ("tokens", "ended"):
                falls.append((before - after, f"{name}, {label}, fell from {before:.3f} to {after:.3f}"))
    furthest, sign = max(falls)
    return {"score": sign} if furthest > RULES["no_end"]["limits"]["fall"] else {}


def destroyed(signs: Mapping[str, str]) -> dict[str, str]:
    """The verdict on a model with signs of `collapse`: the signs, and what the worst rule says to do."""
    remedy = next(RULES[name] for name in signs if name in RULES)["remedy"].replace("; ", ", ")
    return said("destroyed", f"{'; '.join(signs.values())}; for another run, {remedy}")


def said(word: str, *told: str) -> dict[str, str]:
    """A verdict of the word, and of a sentence that begins with it and joins what is told, without empty parts."""
    return {"word": word, "sentence": f"{word.capitalize()}: {'; '.join(filter(None, told))}."}


def of_share(
    name: str, share: Mapping[str, Any], unit: str, *, equal: str, besides: str = "", worse: str = ""
) -> dict[str, str]:
    """The verdict by a share, which is compared with one half.

    Args:
        name: Name of the share.
        share: `mean`, `low`, `high` and `n`.
        unit: What `n` counts.
        equal: What 0.5 means, after "where".
        besides: Told after `n` and its unit.
        worse: Told if the share is below one half.
    """
    told = f"{name} {share['mean']:.3f}, where {equal} (95 % interval {_interval(share, '.3f')}, {share['n']} {unit}"
    word = _by_interval(share, 0.5)
    return said(word, f"{told}{besides})", {"worse": worse, "not known": _narrowed(share, unit)}.get(word, ""))


def _by_interval(found: Mapping[str, Any], equal: float = 0.0) -> str:
    """The word for a number, by where its 95 % interval lies: above what equal models have, or below."""
    if found["n"] < FEW:
        return "not known"
    return "better" if found["low"] > equal else "worse" if found["high"] < equal else "not known"


def _narrowed(found: Mapping[str, Any], unit: str) -> str:
    """Returns the width of an interval in words, with the remedy that would narrow it."""
    if found["n"] < FEW:
        return f"{found['n']} {unit} are too few for an interval, so take {FEW} or more"
    if found["low"] == found["high"]:
        return f"none of the {unit} changed, so train longer or at a higher learning rate"
    return f"the interval is {found['high'] - found['low']:.3f} wide, and four times the {unit} would halve it"


def _of_difference(name: str, found: Mapping[str, Any]) -> dict[str, str]:
    word, unit, more = _by_interval(found), found["of"], ""
    if word == "better" and name.startswith(REWARD_SCORE):
        word, more = "not known", "training raises this score directly, and no other one judged the answers"
    elif word == "not known":
        more = _narrowed(found, unit)
    elif unit != "prompts":
        more = "nobody judged the answers themselves"
    told = (
        f"{name}: {found['before']:.3f} -> {found['after']:.3f} "
        f"(95 % interval of the difference {_interval(found, '+.3f')}, {found['n']} {unit})"
    )
    return said(word, told, more)


def _of_best(size: str, ways: Mapping[str, Any]) -> dict[str, str]:
    found, why = ways["over_chance"], []
    if (word := _by_interval(found)) == "not known":
        why = ["no better than chance as far as this shows", _narrowed(found, "questions")]
    told = (
        f"{LABELS['best_of'].format(n=size)} {ways['best_of']['mean']:.3f}, where a random one has "
        f"{ways['chance']['mean']:.3f} (95 % interval of the difference {_interval(found, '+.3f')}, {found['n']} "
        "questions)"
    )
    return said(word, told, *why)


def _interval(found: Mapping[str, Any], form: str) -> str:
    return f"[{found['low']:{form}}, {found['high']:{form}}]"
