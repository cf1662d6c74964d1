"""Says when a run goes wrong, and what to do: rules over the metrics that TRL logs, and a probe of a few answers.

`start_run` puts a HealthCallback on every recipe (`--health warn`, `stop` or `off`); a trainer of one's own takes

    trainer.add_callback(HealthCallback(trainer))

A rule is a function of what was logged, of a few facts about the run and of its limits, which are in health.toml with
their source, the likely cause and the remedy; docs/health.md shows them. It returns the sign with its number, or None.
"""

import math
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, DatasetDict
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from trl import DPOTrainer
from trl.data_utils import is_conversational

from dpo_recipes.checkpoints import latest_checkpoint
from dpo_recipes.errors import UnhealthyRunError
from dpo_recipes.evaluation import answer_logps, reference_model, sample_tokens, stop_tokens
from dpo_recipes.files import read_json, write_json
from dpo_recipes.guards import FirstLossGuard, WrongReferenceError
from dpo_recipes.intervals import wilson
from dpo_recipes.outcome import sharded
from dpo_recipes.ppo import PPOTrainer
from dpo_recipes.preflight.signals import find_signals

RULES: dict[str, dict[str, Any]] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
HEALTH_FILE = "health.json"

_PROBED = 4  # held-out prompts
_LONGEST_PROBE = 256  # tokens; a probe goes up to twice the chosen answers
_REPEATED = 4  # tokens of the runs that are looked for twice in an answer

Logged = Mapping[str, Sequence[tuple[int, float]]]  # by metric, (update, value) in order


@dataclass(frozen=True)
class Facts:
    """What the rules know of a run beside its logs; 0 is for what it does not have."""

    pairs_per_update: int
    max_steps: int
    eval_pairs: int = 0
    chosen_tokens: float = 0.0  # of DPO's training pairs, on average
    rejected_tokens: float = 0.0
    rejected_spread: float = 0.0  # standard deviation of their tokens
    beta: float = 0.0  # DPO's
    starts_at_ln2: bool = False
    critic_warmup: int = 0  # updates
    kl_of_answers: bool = False  # nats an answer, as PPOTrainer logs them, not nats a token
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
        """One line."""
        kind = "Health, fatal" if self.fatal else "Health"
        return f"{kind} ({self.rule}), update {self.step}: {self.sign}. Likely: {self.cause}. Do: {self.remedy}."


def read_findings(output_dir: str | Path) -> list[Finding]:
    """What was found in a run."""
    return [Finding(**finding) for finding in read_json(Path(output_dir) / HEALTH_FILE).get("findings", [])]


def read_logs(
    log_history: Iterable[Mapping[str, Any]], logged: dict[str, list[tuple[int, float]]] | None = None
) -> dict[str, list[tuple[int, float]]]:
    """The trainer's log by metric, after what was read before."""
    logged = {} if logged is None else logged
    for entry in log_history:
        for name, value in entry.items():
            if name != "step" and value is not None:
                logged.setdefault(name, []).append((entry["step"], value))
    return logged


# The rules. The limits are those of health.toml.


def _accuracy(logged: Logged, prefix: str = "") -> Sequence[tuple[int, float]]:
    """Of DPO's implicit rewards since they differ, or of a reward model."""
    points = logged.get(f"{prefix}rewards/accuracies") or logged.get(f"{prefix}accuracy") or []
    return [(step, value) for step, value in points if step > _tied(logged)]


def _tied(logged: Logged) -> int:
    """The last update up to which DPO's rewards were all equal, as they are before the first: no accuracy is that."""
    return max((step for step, _ in takewhile(lambda log: log[1] == 0, logged.get("rewards/margins", []))), default=0)


def _values(logged: Logged, name: str) -> list[float]:
    return [value for _, value in logged.get(name, [])]


def _recent(
    points: Sequence[tuple[int, float]], facts: Facts, pairs: int, *, after: int = 0
) -> tuple[float, int] | None:
    """The mean of the last logs, all after that update, that hold so many pairs, and their number; None: too few."""
    steps = [after, *(step for step, _ in points)]
    for logs in range(1, len(points) + 1):
        if (steps[-1] - steps[-1 - logs]) * facts.pairs_per_update >= pairs:
            return fmean(value for _, value in points[-logs:]), logs
    return None


def not_finite(logged: Logged, facts: Facts, *, updates: int) -> str | None:
    """What HealthCallback sees in the gradients of every update, where it cannot: in sharded models."""
    for name in ("loss", "eval_loss", "grad_norm", "logps/chosen", "mean_reward"):
        value = logged.get(name, [(0, 0.0)])[-1][1]
        if not math.isfinite(value) and not (facts.scaled and name == "grad_norm"):
            return f"{name} is {value}"
    return None


def loss_spike(
    logged: Logged, facts: Facts, *, times: float, nats: float, deviations: float, stretches: int, pairs: int
) -> str | None:
    """Against stretches as long: losses are skewed, so single pairs have a lower median than means have.

    The loss of PPO and its like hovers around 0.
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
    """Accuracy no better than a coin's."""
    points, tied = _accuracy(logged), _tied(logged)
    if facts.beta and tied >= min(updates, facts.max_steps):
        return f"no reward differs from another in {tied} updates"
    if not points or points[-1][0] < min(updates, facts.max_steps / 2):
        return None
    now = _recent(points, facts, pairs, after=tied)
    return f"training accuracy is {now[0]:.3f}" if now and now[0] <= accuracy else None


def overfitting(logged: Logged, facts: Facts, *, train: float, gap: float, evaluations: int, pairs: int) -> str | None:
    """Learned by heart."""
    held_out = [value for _, value in _accuracy(logged, "eval_")][-evaluations:]
    now = _recent(_accuracy(logged), facts, pairs, after=_tied(logged))
    if now is None or len(held_out) < evaluations or not facts.eval_pairs or max(held_out[1:]) > held_out[0]:
        return None
    highest = wilson(held_out[-1] * facts.eval_pairs, facts.eval_pairs).high
    if now[0] <= train or now[0] - highest < gap:
        return None
    return f"accuracy is {now[0]:.3f} in training and {held_out[-1]:.3f} held out, {held_out[0]:.3f} before"


def leak(logged: Logged, facts: Facts, *, accuracy: float, pairs: int, updates: int, baseline: float) -> str | None:
    """Learned at once, and by a mark."""
    points = _accuracy(logged)
    now = _recent(points, facts, pairs, after=_tied(logged))
    if now is None or now[0] < accuracy or points[-1][0] > updates:
        return None
    name, best = max(facts.baselines().items(), key=lambda item: item[1], default=("", 0.0))
    return f"training accuracy is {now[0]:.3f}, and {name!r} alone has {best:.3f}" if best >= baseline else None


def likelihood_collapse(logged: Logged, facts: Facts, *, nats: float, pairs: int) -> str | None:
    """The implicit reward of chosen is beta times its log-ratio, summed over its tokens."""
    chosen, margin = (_recent(logged.get(f"rewards/{name}", []), facts, pairs) for name in ("chosen", "margins"))
    if not (chosen and margin and facts.beta and facts.chosen_tokens) or margin[0] <= 0:
        return None
    lost = -chosen[0] / facts.beta / facts.chosen_tokens
    return f"chosen answers lost {lost:.2f} nats a token" if lost > nats else None


def longer_answers(logged: Logged, facts: Facts, *, times: float, growth: float, online: float) -> str | None:
    """Length, which all rewards of people prefer."""
    probed = _values(logged, "probe/answer_tokens")
    if probed and facts.chosen_tokens and probed[-1] > max(times * facts.chosen_tokens, growth * probed[0]):
        return f"answers have {probed[-1]:.0f} tokens, chosen ones {facts.chosen_tokens:.0f}"
    sampled = _values(logged, "completions/mean_length")
    if sampled and fmean(sampled[-3:]) > online * fmean(sampled[:3]):
        return f"answers have {fmean(sampled[-3:]):.0f} tokens, at the start {fmean(sampled[:3]):.0f}"
    return None


def off_distribution(logged: Logged, facts: Facts, *, nats: float) -> str | None:
    """What a policy writes has a surprise of its entropy, on average. What DPO did before the log is taken off.

    How long the logged answers are is not known: as long as all are on average, within two standard errors.
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
    """Drift, per token."""
    away = _values(logged, "probe/log_ratio")[-1:] or _values(logged, "kl")[-logs:]
    if not away:
        return None
    tokens = fmean(_values(logged, "completions/mean_length")[-logs:]) if facts.kl_of_answers else 1.0
    drift = fmean(away) / max(tokens, 1.0)
    return f"the policy is {drift:.2f} nats a token from the reference" if drift > nats else None


def degenerate_text(logged: Logged, facts: Facts, *, share: float) -> str | None:
    """Repeats, which the start did not have."""
    repeated = _values(logged, "probe/repeated")
    if not repeated or repeated[-1] < share or repeated[0] >= share / 2:
        return None
    return f"{repeated[-1]:.0%} of the {_REPEATED}-grams of greedy answers are repeats, at the start {repeated[0]:.0%}"


def no_end(logged: Logged, facts: Facts, *, fall: float) -> str | None:
    """No EOS token."""
    sampled = [1 - cut for cut in _values(logged, "completions/clipped_ratio")]
    for ended, logs in ((_values(logged, "probe/ended"), 1), (sampled, 3)):
        if ended and fmean(ended[:logs]) - fmean(ended[-logs:]) > fall:
            return f"{fmean(ended[-logs:]):.0%} of the answers end, at the start {fmean(ended[:logs]):.0%}"
    return None


def value_loss(logged: Logged, facts: Facts, *, times: float, logs: int, explained: float) -> str | None:
    """A critic that diverges; where rewards grow rarer or larger, its loss grows with them."""
    losses, shares = _values(logged, "value/loss"), _values(logged, "value/explained_variance")[-logs:]
    before = losses[:-logs]
    if len(before) < logs or fmean(losses[-logs:]) <= times * median(before) or median(shares) > explained:
        return None
    return f"the value loss is {fmean(losses[-logs:]):.3g}, and the median before was {median(before):.3g}"


def explained_variance(logged: Logged, facts: Facts, *, share: float, logs: int, after: int) -> str | None:
    """A critic that knows nothing, though there is something to know."""
    explained = [value for step, value in logged.get("value/explained_variance", []) if step > facts.critic_warmup]
    spreads = [_values(logged, name) for name in logged if name.startswith("rewards/") and name.endswith("/std")]
    differ = any(spread[-1] > spread[0] / 10 for spread in spreads)
    if not differ or len(explained) < after or fmean(explained[-logs:]) > share:
        return None
    return f"the critic's explained variance is {fmean(explained[-logs:]):.2f}"


def policy_jump(logged: Logged, facts: Facts, *, nats: float) -> str | None:
    """Updates that are too large."""
    moved = _values(logged, "policy/approx_kl")
    return f"the policy moved {moved[-1]:.2f} nats a token from its rollout" if moved and moved[-1] >= nats else None


def reward_hacking(logged: Logged, facts: Facts, *, logs: int, deviations: float) -> str | None:
    """Of two numbers that should agree one is gamed."""
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


_FUNCTIONS: dict[str, Callable[..., str | None]] = {
    each.__name__: each
    for each in (
        *(not_finite, loss_spike, no_signal, overfitting, leak, likelihood_collapse, longer_answers, off_distribution),
        *(kl_runaway, degenerate_text, no_end, value_loss, explained_variance, policy_jump, reward_hacking),
    )
}


# The run


def read_facts(trainer: Trainer) -> Facts:
    """Those of a built trainer."""
    args, rows, held_out = trainer.args, trainer.train_dataset, trainer.eval_dataset
    given: dict[str, Any] = {}
    if isinstance(trainer, DPOTrainer):
        plain = trainer.loss_types == ["sigmoid"] and not args.label_smoothing
        given = dict(beta=trainer.beta, starts_at_ln2=plain and args.disable_dropout)
        if isinstance(rows, Dataset) and "chosen_ids" in rows.column_names:  # not those of images
            chosen, rejected = ([*map(len, _some(rows)[f"{side}_ids"])] for side in ("chosen", "rejected"))
            given |= {"chosen_tokens": fmean(chosen), "rejected_tokens": fmean(rejected)}
            given["rejected_spread"] = pstdev(rejected)
    if isinstance(trainer, PPOTrainer):
        given = dict(kl_of_answers=True, critic_warmup=args.critic_warmup_steps)

    @cache
    def baselines() -> dict[str, float]:
        columns = ["prompt", "chosen", "rejected"]
        if not isinstance(rows, Dataset) or not set(columns) <= set(rows.column_names):
            return {}
        part = _some(rows.select_columns(columns))
        if not all(isinstance(text, str) for column in columns for value in part[column] for text in _contents(value)):
            return {}  # images
        found = find_signals(DatasetDict(train=part, test=part))["baselines"]
        found.pop("bag_of_words", None)  # which does read
        return {name: max(rule["accuracy"], 1 - rule["accuracy"]) for name, rule in found.items()}

    return Facts(
        pairs_per_update=args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        max_steps=trainer.state.max_steps,
        eval_pairs=len(held_out) if isinstance(held_out, Dataset) else 0,
        scaled=args.fp16,
        baselines=baselines,
        **given,
    )


def _some(rows: Dataset) -> Dataset:
    """At most a thousand, evenly spread: data may be sorted."""
    return rows.select(range(0, len(rows), len(rows) // 1000 + 1))


def _contents(text: Any) -> list[Any]:
    return [message["content"] for message in text] if isinstance(text, list) else [text]


def probe(trainer: Trainer, prompts: Sequence[Any], *, max_new_tokens: int) -> dict[str, float]:
    """A look at the policy's greedy answers; neither weights nor random state change.

    Returns:
        `probe/answer_tokens` (the end token aside), `probe/ended` (share with an end token), `probe/repeated` (share of
        the runs of four tokens that an answer had before) and, where DPO's reference is in memory, `probe/log_ratio`
        (log p_policy - log p_reference of the answers, nats a token).
    """
    policy, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
    stops = stop_tokens(policy, tokenizer)
    sampled = sample_tokens(policy, tokenizer, prompts, max_new_tokens=max_new_tokens)
    sampled = [both for both in sampled if both[1]]  # a prompt may leave no room
    if not sampled:
        return {}
    answers = [answer for _, answer in sampled]
    ended = [answer[-1] in stops for answer in answers]
    found = {
        "probe/answer_tokens": fmean(len(answer) - end for answer, end in zip(answers, ended, strict=True)),
        "probe/ended": fmean(ended),
        "probe/repeated": fmean(map(_repeated, answers)),
    }
    if isinstance(trainer, DPOTrainer) and (
        isinstance(policy, PeftModel) or (trainer.ref_model is not None and not trainer.args.sync_ref_model)
    ):
        nats = answer_logps(policy, sampled).sum()
        with reference_model(trainer) as reference:
            nats -= answer_logps(trainer.accelerator.unwrap_model(reference), sampled).sum()
        found["probe/log_ratio"] = float(nats) / sum(map(len, answers))
    return found


def _repeated(answer: Sequence[int]) -> float:
    runs = [tuple(answer[start : start + _REPEATED]) for start in range(len(answer) - _REPEATED + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


class HealthCallback(TrainerCallback):
    """Looks at every log, at the gradients of every update, and at a few answers whenever the trainer evaluates.

    A rule that is broken is said once, in one line, and written to health.json in the output folder; wandb, where it
    is reported to, gets an alert. Nothing of the training changes but where a fatal finding ends it.

    Args:
        trainer: Any trainer of TRL's, or PPOTrainer. Rules that do not apply to it are silent.
        mode: `stop` ends the run at a fatal finding with UnhealthyRunError, without an update by a broken gradient
            and without another checkpoint; `warn` goes on.
        on_stop: Called by the main process before that error.
    """

    def __init__(self, trainer: Trainer, mode: str = "warn", on_stop: Callable[[], object] | None = None) -> None:
        self.trainer = trainer
        self.mode = mode
        self.on_stop = on_stop
        self.rules: list[str] = []  # that watch; known when training begins, as all below
        self.blind: list[str] = []  # that have nothing to look at
        self.findings: list[Finding] = []
        self.fatal: Finding | None = None
        self.facts: Facts | None = None
        self.logged: dict[str, list[tuple[int, float]]] = {}
        self.read = 0  # logs
        self.healthy = 0  # the last update after which nothing fatal was found
        self.overflows = 0  # updates in a row
        self.prompts: list[Any] = []
        self.probed = -1  # the last update
        self.first_loss = FirstLossGuard(trainer) if isinstance(trainer, DPOTrainer) else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Probe the start; a resumed run remembers what was found before, another call of `train` nothing."""
        self.facts, self.healthy = read_facts(self.trainer), state.global_step
        self.fatal, self.overflows, self.logged, self.read, self.prompts, self.probed = None, 0, {}, 0, [], -1
        found = read_findings(args.output_dir) if state.global_step else []
        self.findings = [each for each in found if each.step <= state.global_step]
        rules = [name for name, rule in RULES.items() if self.trainer._name in rule["for"]]
        rows, tokenizer = self.trainer.eval_dataset, self.trainer.processing_class
        rows = next(iter(rows.values())) if isinstance(rows, dict) else rows
        probed = "degenerate_text" in rules and args.eval_strategy != "no" and not sharded(self.trainer)
        if probed and isinstance(rows, Dataset) and isinstance(tokenizer, PreTrainedTokenizerBase):
            places = range(0, len(rows), max(1, len(rows) // _PROBED))[:_PROBED]
            drawn = [rows[place].get("prompt") for place in places]
            self.prompts = [prompt for prompt in drawn if is_conversational({"prompt": prompt})]
        there = {
            "probe": bool(self.prompts),
            "answers": bool(self.prompts) or not isinstance(self.trainer, DPOTrainer),
            "held_out": self.facts.eval_pairs > 0 and args.eval_strategy != "no",
            "tokens": self.facts.rejected_tokens > 0 and self.facts.beta > 0,
            "rows": isinstance(self.trainer.train_dataset, Dataset),
        }
        self.rules = [name for name in rules if there.get(RULES[name].get("needs", ""), True)]
        self.blind = [name for name in rules if name not in self.rules]
        if not state.global_step:
            self._probe(state)
        self._write()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the gradients and the first loss; `stop` drops the update, so that the weights stay good."""
        gradients = [weight.grad for weight in self.trainer.model.parameters() if weight.grad is not None]
        if gradients and not sharded(self.trainer) and not torch.nn.utils.get_total_norm(gradients).isfinite():
            self.overflows += 1
            if self.overflows > (RULES["not_finite"]["limits"]["updates"] if args.fp16 else 0):
                self._found("not_finite", "the gradient is NaN or infinite", state.global_step + 1, control)
        else:
            self.overflows = 0
            try:
                if self.first_loss is not None:
                    self.first_loss.on_pre_optimizer_step(args, state, control)
            except WrongReferenceError as error:
                self._found("wrong_reference", str(error).partition(":")[0], 1, control)
        if self.fatal is not None and not args.fp16:  # whose loss scale skips an update that overflows itself
            self.trainer.model.zero_grad()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Apply the rules."""
        self._look(state, control, proven=not self.prompts)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Probe, and apply the rules."""
        self._probe(state)
        self._look(state, control, proven=True)
        self._write()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """No checkpoint of a broken state."""
        if self.fatal is not None:
            control.should_save = control.should_evaluate = False

    on_epoch_end = on_step_end

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write what was found; a stopped run ends in an error.

        Raises:
            UnhealthyRunError: If a fatal finding has stopped the run.
        """
        self._write()
        if self.fatal is not None and self.facts is not None:
            if self.on_stop is not None and state.is_world_process_zero:
                self.on_stop()
            PartialState().wait_for_everyone()  # torch's launcher ends the others as soon as one has left
            pairs = RULES["loss_spike"]["limits"]["pairs"] if self.fatal.rule == "loss_spike" else 1  # seen so late
            begun = self.fatal.step - math.ceil(pairs / self.facts.pairs_per_update)
            good = latest_checkpoint(args.output_dir, before=min(self.healthy, begun) + 1)
            newest = latest_checkpoint(args.output_dir, before=self.fatal.step)
            if good is not None:
                kept = f"The last good checkpoint is {good}: --resume_from_checkpoint goes on from it."
            elif newest is not None:
                kept = f"No checkpoint is proven good, for lack of a log or an evaluation after it; try {newest}."
            else:
                kept = "There is no checkpoint yet."
            raise UnhealthyRunError(
                f"Stopped at update {self.fatal.step} ({self.fatal.rule}). {kept} --health warn would go on."
            )

    def _probe(self, state: Any) -> None:
        """Put a probe's numbers into the log of all processes."""
        if self.prompts and self.facts is not None and self.probed != state.global_step:  # of several held-out sets
            self.probed = state.global_step
            most = min(_LONGEST_PROBE, max(64, math.ceil(2 * self.facts.chosen_tokens)))
            found = [probe(self.trainer, self.prompts, max_new_tokens=most) if state.is_world_process_zero else {}]
            state.log_history.append(broadcast_object_list(found)[0] | {"step": state.global_step})

    def _look(self, state: Any, control: Any, *, proven: bool) -> None:
        if self.facts is None:  # an evaluation before training
            return
        logged = read_logs(state.log_history[self.read :], self.logged)
        self.read = len(state.log_history)
        for name in self.rules:
            if (rule := _FUNCTIONS.get(name)) and (sign := rule(logged, self.facts, **RULES[name]["limits"])):
                self._found(name, sign, state.global_step, control)
        if proven and self.fatal is None:
            self.healthy = state.global_step

    def _found(self, name: str, sign: str, step: int, control: Any) -> None:
        rule = RULES[name]
        finding = Finding(name, rule["fatal"], step, sign, rule["cause"], rule["remedy"])
        if finding.fatal and self.mode == "stop":
            self.fatal = self.fatal or finding
            control.should_training_stop = True
            control.should_save = control.should_evaluate = False
        if name in {each.rule for each in self.findings}:
            return
        self.findings.append(finding)
        self._write()
        if self.trainer.is_world_process_zero():
            tqdm.write(str(finding))
            if "wandb" in self.trainer.args.report_to:
                import wandb

                if wandb.run is not None:
                    wandb.run.alert(title=f"{name}, update {step}", text=str(finding))

    def _write(self) -> None:
        if self.trainer.is_world_process_zero():
            state = self.trainer.state
            data = {"mode": self.mode, "stopped": self.fatal is not None, "updates": state.global_step}
            data |= {"findings": [asdict(finding) for finding in self.findings]}
            data |= {"rules": self.rules, "nothing_to_look_at": self.blind}
            data |= {"probes": [entry for entry in state.log_history if "probe/ended" in entry]}
            write_json(Path(self.trainer.args.output_dir) / HEALTH_FILE, data)
