"""Rules: functions of the trainer's logs, of facts about the run, and of their limits, which are in rules.toml.

Each returns the sign with its number, or None if the rule is not broken.
"""

import math
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from statistics import fmean, median
from typing import Any

from dpo_recipes.estimates import wilson
from dpo_recipes.files import read_json

RULES: dict[str, dict[str, Any]] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
HEALTH_FILE = "health.json"
REPEATED = 4  # tokens of a run that counts as repeated if an answer has it twice

Points = list[tuple[int, float]]  # (update, value), in order
Logged = Mapping[str, Points]  # by metric


@dataclass(frozen=True)
class Facts:
    """Facts about a run that its logs do not hold; 0 where the run has no such thing."""

    pairs_per_update: int
    max_steps: int
    eval_pairs: int = 0
    chosen_tokens: float = 0.0  # mean over DPO's training pairs
    rejected_tokens: float = 0.0  # likewise
    rejected_spread: float = 0.0  # standard deviation of the rejected tokens
    beta: float = 0.0  # DPO's
    starts_at_ln2: bool = False  # DPO's loss
    critic_warmup: int = 0  # updates
    kl_of_answers: bool = False  # the logged KL is in nats an answer (PPOTrainer), not nats a token
    scaled: bool = False  # fp16's loss scale skips updates that overflow
    baselines: Callable[[], Mapping[str, float]] = dict  # accuracy of rules that read no answer


@dataclass(frozen=True)
class Finding:
    """A rule that was broken."""

    rule: str
    fatal: bool
    step: int
    sign: str  # with its number
    cause: str
    remedy: str

    def __str__(self) -> str:
        """The finding on one line."""
        kind = "Health, fatal" if self.fatal else "Health"
        return f"{kind} ({self.rule}), update {self.step}: {self.sign}. Likely: {self.cause}. Do: {self.remedy}."


def read_findings(output_dir: str | Path) -> list[Finding]:
    """Findings of a run, from its health.json."""
    return [Finding(**finding) for finding in read_json(Path(output_dir) / HEALTH_FILE).get("findings", [])]


def read_logs(log_history: Iterable[Mapping[str, Any]]) -> dict[str, Points]:
    """The trainer's log by metric, as (update, value) in order."""
    logged: dict[str, Points] = {}
    for entry in log_history:
        for name, value in entry.items():
            if name != "step" and value is not None:
                logged.setdefault(name, []).append((entry["step"], value))
    return logged


def not_finite(logged: Logged, facts: Facts, *, updates: int) -> str | None:
    """Finds NaN in the log; HealthCallback reads the gradients of every update, but not those of sharded models."""
    for name in ("loss", "eval_loss", "grad_norm", "logps/chosen", "mean_reward"):
        value = logged.get(name, [(0, 0.0)])[-1][1]
        if not math.isfinite(value) and not (facts.scaled and name == "grad_norm"):
            return f"{name} is {value}"
    return None


def loss_spike(
    logged: Logged, facts: Facts, *, times: float, nats: float, deviations: float, stretches: int, pairs: int
) -> str | None:
    """Compares the last logs with earlier stretches of the same length.

    Losses are skewed, so the median of single pairs is below the median of means. The loss of PPO, GRPO and RLOO
    stays near 0, so the rule does not apply to them.
    """
    if (now := _recent(logged.get("loss", []), facts, pairs)) is None:
        return None
    losses, long = _values(logged, "loss"), now[1]
    ends = range(len(losses) - long, (long - 1) // 4, -long)[:stretches]  # the first may be a quarter as long
    before = [fmean(losses[max(0, end - long) : end]) for end in ends]
    before = before or [math.log(2) if facts.starts_at_ln2 else math.inf]
    usual = median(before)
    spread = median(abs(loss - usual) for loss in before)
    if not now[0] > max(times * usual, usual + max(nats, deviations * spread)):
        return None
    return f"the loss is {now[0]:.3g}, and the median before was {usual:.3g}"


def no_signal(logged: Logged, facts: Facts, *, accuracy: float, pairs: int, updates: int) -> str | None:
    """Finds an accuracy no better than 50 %."""
    points, tied = _accuracy(logged), _tied(logged)
    if facts.beta and tied >= min(updates, facts.max_steps):
        return f"no reward differs from another in {tied} updates"
    if not points or points[-1][0] < min(updates, facts.max_steps / 2):
        return None
    now = _recent(points, facts, pairs, after=tied)
    return f"training accuracy is {now[0]:.3f}" if now and now[0] <= accuracy else None


def overfitting(logged: Logged, facts: Facts, *, train: float, gap: float, evaluations: int, pairs: int) -> str | None:
    """Finds training pairs that were learned by heart."""
    held_out = [value for _, value in _accuracy(logged, "eval_")][-evaluations:]
    now = _recent(_accuracy(logged), facts, pairs, after=_tied(logged))
    if now is None or len(held_out) < evaluations or not facts.eval_pairs:
        return None
    if max(held_out[1:]) > held_out[0] + (held_out[0] * (1 - held_out[0]) / facts.eval_pairs) ** 0.5:
        return None  # still learning
    highest = wilson(held_out[-1] * facts.eval_pairs, facts.eval_pairs).high
    if now[0] <= train or now[0] - highest < gap:
        return None
    return f"accuracy is {now[0]:.3f} in training and {held_out[-1]:.3f} held out, {held_out[0]:.3f} before"


def leak(logged: Logged, facts: Facts, *, accuracy: float, pairs: int, updates: int, baseline: float) -> str | None:
    """Finds pairs that were learned at once because a mark gives the chosen answer away."""
    points = _accuracy(logged)
    now = _recent(points, facts, pairs, after=_tied(logged))
    if now is None or now[0] < accuracy or points[-1][0] > updates:
        return None
    name, best = max(facts.baselines().items(), key=lambda item: item[1], default=("", 0.0))
    return f"training accuracy is {now[0]:.3f}, and {name!r} alone has {best:.3f}" if best >= baseline else None


def likelihood_collapse(logged: Logged, facts: Facts, *, nats: float, pairs: int) -> str | None:
    """Finds chosen answers that lose probability: their implicit reward is beta times their summed log-ratio."""
    chosen, margin = (_recent(logged.get(f"rewards/{name}", []), facts, pairs) for name in ("chosen", "margins"))
    if not (chosen and margin and facts.beta and facts.chosen_tokens) or margin[0] <= 0:
        return None
    lost = -chosen[0] / facts.beta / facts.chosen_tokens
    return f"chosen answers lost {lost:.2f} nats a token" if lost > nats else None


def longer_answers(logged: Logged, facts: Facts, *, times: float, growth: float, online: float) -> str | None:
    """Finds answers that grow, because people and reward models prefer length."""
    probed = _values(logged, "probe/answer_tokens")
    if probed and facts.chosen_tokens and probed[-1] > max(times * facts.chosen_tokens, growth * probed[0]):
        return f"answers have {probed[-1]:.0f} tokens, chosen ones {facts.chosen_tokens:.0f}"
    sampled = _values(logged, "completions/mean_length")
    if sampled and fmean(sampled[-3:]) > online * fmean(sampled[:3]):
        return f"answers have {fmean(sampled[-3:]):.0f} tokens, at the start {fmean(sampled[:3]):.0f}"
    return None


def off_distribution(logged: Logged, facts: Facts, *, nats: float) -> str | None:
    """Finds rejected answers that surprise the policy by more than its entropy, the mean surprise of its own answers.

    The change that DPO made before the first log is subtracted. The length of the logged answers is not known; the
    rule takes the mean length of all rejected answers plus two standard errors.
    """
    names = ("logps/rejected", "rewards/rejected", "entropy")
    if len(logged.get(names[0], [])) != 1 or not (all(map(logged.get, names)) and facts.rejected_tokens and facts.beta):
        return None
    logps, reward, entropy = (logged[name][0][1] for name in names)
    pairs = logged["entropy"][0][0] * facts.pairs_per_update
    longest = facts.rejected_tokens + 2 * facts.rejected_spread / pairs**0.5
    surplus = -(logps - reward / facts.beta) / longest - entropy
    return f"rejected answers surprise the policy by {surplus:.2f} nats a token too much" if surplus > nats else None


def kl_runaway(logged: Logged, facts: Facts, *, nats: float, logs: int) -> str | None:
    """Finds a policy far from the reference model, in nats a token."""
    away = _values(logged, "probe/log_ratio")[-1:] or _values(logged, "kl")[-logs:]
    if not away:
        return None
    tokens = fmean(_values(logged, "completions/mean_length")[-logs:]) if facts.kl_of_answers else 1.0
    drift = fmean(away) / max(tokens, 1.0)
    return f"the policy is {drift:.2f} nats a token from the reference model" if drift > nats else None


def degenerate_text(logged: Logged, facts: Facts, *, share: float) -> str | None:
    """Finds repeats that the initial model did not have."""
    repeated = _values(logged, "probe/repeated")
    if not repeated or repeated[-1] < share or repeated[0] >= share / 2:
        return None
    return f"{repeated[-1]:.0%} of the {REPEATED}-grams of the answers are repeats, at the start {repeated[0]:.0%}"


def no_end(logged: Logged, facts: Facts, *, fall: float) -> str | None:
    """Finds answers without an EOS token."""
    sampled = [1 - cut for cut in _values(logged, "completions/clipped_ratio")]
    for ended, logs in ((_values(logged, "probe/ended"), 1), (sampled, 3)):
        if ended and fmean(ended[:logs]) - fmean(ended[-logs:]) > fall:
            return f"{fmean(ended[-logs:]):.0%} of the answers end, at the start {fmean(ended[:logs]):.0%}"
    return None


def value_loss(logged: Logged, facts: Facts, *, times: float, logs: int, explained: float) -> str | None:
    """Finds a critic that diverges. Its loss alone also grows where rewards become rarer or larger."""
    losses, shares = _values(logged, "value/loss"), _values(logged, "value/explained_variance")[-logs:]
    before = losses[:-logs]
    if len(before) < logs or fmean(losses[-logs:]) <= times * median(before) or median(shares) > explained:
        return None
    return f"the value loss is {fmean(losses[-logs:]):.3g}, and the median before was {median(before):.3g}"


def explained_variance(logged: Logged, facts: Facts, *, share: float, logs: int, after: int) -> str | None:
    """Finds a critic that predicts nothing although scores differ."""
    explained = [value for step, value in logged.get("value/explained_variance", []) if step > facts.critic_warmup]
    spreads = [_values(logged, name) for name in logged if name.startswith("rewards/") and name.endswith("/std")]
    differ = any(spread[-1] > spread[0] / 10 for spread in spreads)
    if not differ or len(explained) < after or fmean(explained[-logs:]) > share:
        return None
    return f"the critic's explained variance is {fmean(explained[-logs:]):.2f}"


def policy_jump(logged: Logged, facts: Facts, *, nats: float) -> str | None:
    """Finds updates that are too large."""
    moved = _values(logged, "policy/approx_kl")
    return f"the policy moved {moved[-1]:.2f} nats a token from its rollout" if moved and moved[-1] >= nats else None


def reward_hacking(logged: Logged, facts: Facts, *, logs: int, deviations: float) -> str | None:
    """Finds a reward that rises while one of its parts falls."""
    total = _values(logged, "reward")
    if len(total) < 2 * logs or fmean(total[-logs:]) <= fmean(total[:logs]):
        return None
    for name in logged:
        if name.startswith("rewards/") and name.endswith("/mean"):
            means, spreads = _values(logged, name), _values(logged, f"{name[:-4]}std")
            spread = fmean([*spreads[:logs], *spreads[-logs:]] or [0])
            if (fall := fmean(means[:logs]) - fmean(means[-logs:])) > deviations * spread:
                judge = name.removeprefix("rewards/").removesuffix("/mean")
                return f"the reward rose to {fmean(total[-logs:]):.3g}, and {judge} fell by {fall:.3g}"
    return None


def _values(logged: Logged, name: str) -> list[float]:
    return [value for _, value in logged.get(name, [])]


def _recent(points: Points, facts: Facts, pairs: int, *, after: int = 0) -> tuple[float, int] | None:
    """The mean of the last logs that hold so many pairs, all after update `after`, and their number; None: too few."""
    steps = [after, *(step for step, _ in points)]
    for logs in range(1, len(points) + 1):
        if (steps[-1] - steps[-1 - logs]) * facts.pairs_per_update >= pairs:
            return fmean(value for _, value in points[-logs:]), logs
    return None


def _accuracy(logged: Logged, prefix: str = "") -> Points:
    """Accuracy of a reward model, or of DPO's implicit rewards after the updates that left them equal."""
    points = logged.get(f"{prefix}rewards/accuracies") or logged.get(f"{prefix}accuracy") or []
    return [(step, value) for step, value in points if step > _tied(logged)]


def _tied(logged: Logged) -> int:
    """The last update up to which all of DPO's rewards were equal: no accuracy is known until then."""
    return max((step for step, _ in takewhile(lambda log: log[1] == 0, logged.get("rewards/margins", []))), default=0)
