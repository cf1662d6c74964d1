"""Says when a run goes wrong and what to do, by rules over the metrics that TRL logs and a probe of a few answers.

`start_run` puts a HealthCallback on every recipe (`--health warn`, `stop` or `off`); your own trainer takes

    trainer.add_callback(HealthCallback(trainer))

The rules are in rules.py, their limits with source, likely cause and remedy in rules.toml; docs/health.md shows them.
"""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import DPOTrainer

from dpo_recipes.errors import UnhealthyRunError
from dpo_recipes.files import write_json
from dpo_recipes.health import rules
from dpo_recipes.health.guards import ReferenceGuard, WrongReferenceError
from dpo_recipes.health.probe import draw_prompts, probe, read_facts
from dpo_recipes.health.rules import HEALTH_FILE, RULES, Facts, Finding, Points, read_findings, read_logs
from dpo_recipes.models.checkpoints import latest_checkpoint
from dpo_recipes.models.likelihood import sharded
from dpo_recipes.terminal import say
from dpo_recipes.trl_patches import method_name

_LONGEST_PROBE = 256  # tokens; a probe's answer has at most this many, and at most twice those of a chosen answer


class HealthCallback(TrainerCallback):
    """Looks at every log, at the gradients of every update, and at a few answers whenever the trainer evaluates.

    A rule that is broken is reported once, in one line, and written to health.json in the output folder; a run that
    reports to wandb sends an alert too. Training itself is unchanged, unless a fatal finding ends it.

    Args:
        trainer: Any trainer of TRL's, or PPOTrainer. Rules that do not apply to it are silent.
        mode: `stop` ends the run at a fatal finding with UnhealthyRunError, without an update by a broken gradient
            and without another checkpoint; `warn` goes on.
        on_stop: The main process calls it before that error.
    """

    def __init__(self, trainer: Trainer, mode: str = "warn", on_stop: Callable[[], object] | None = None) -> None:
        self.trainer = trainer
        self.mode = mode
        self.on_stop = on_stop
        guarded = any(isinstance(each, ReferenceGuard) for each in trainer.callback_handler.callbacks)
        self.reference = ReferenceGuard(trainer) if isinstance(trainer, DPOTrainer) and not guarded else None
        self.rules = [name for name, rule in RULES.items() if method_name(trainer) in rule["for"]]
        self._forget()

    def _forget(self) -> None:
        self.watching: list[str] = []  # rules that have something to look at; none before training
        self.findings: list[Finding] = []
        self.fatal: Finding | None = None
        self.logged: dict[str, Points] = {}
        self.read = 0  # entries of the log that `logged` holds
        self.overflows = 0  # updates in a row with a broken gradient
        self.healthy = 0  # the last update after which no fatal rule was broken
        self.prompts: list[Any] = []
        self.probed = -1  # the last update

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Probes the initial model. A resumed run keeps its findings; another call of `train` begins without any."""
        self._forget()
        self.facts: Facts = read_facts(self.trainer)
        self.healthy = state.global_step
        found = read_findings(args.output_dir) if state.global_step else []
        self.findings = [each for each in found if each.step <= state.global_step]
        evaluates = args.eval_strategy != "no"
        if evaluates and "degenerate_text" in self.rules and not sharded(self.trainer):
            self.prompts = draw_prompts(self.trainer)
        there = {
            "probe": bool(self.prompts),
            "answers": bool(self.prompts) or not isinstance(self.trainer, DPOTrainer),
            "held_out": self.facts.eval_pairs > 0 and evaluates,
            "tokens": self.facts.rejected_tokens > 0 and self.facts.beta > 0,
            "rows": isinstance(self.trainer.train_dataset, Dataset),
        }
        self.watching = [name for name in self.rules if there.get(RULES[name].get("needs", ""), True)]
        if not state.global_step:
            self._probe(state)
        self._write()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Checks the gradients and the reference model. `stop` drops a broken update, so the weights stay good."""
        gradients = [weight.grad for weight in self.trainer.model.parameters() if weight.grad is not None]
        if gradients and not sharded(self.trainer) and not torch.nn.utils.get_total_norm(gradients).isfinite():
            self.overflows += 1
            if self.overflows > (RULES["not_finite"]["limits"]["updates"] if args.fp16 else 0):
                self._found("not_finite", "the gradient is NaN or infinite", state.global_step + 1, control)
        else:
            self.overflows = 0
            if self.reference is not None and state.global_step == 0:
                try:
                    self.reference.check()
                except WrongReferenceError as error:
                    self._found("wrong_reference", error.sign, 1, control)
        if self.fatal is not None and not args.fp16:  # with fp16 the loss scale itself skips an update that overflows
            self.trainer.model.zero_grad()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Applies the rules."""
        self._look(state, control, proven=not self.prompts)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Probes the policy and applies the rules."""
        self._probe(state)
        self._look(state, control, proven=True)
        self._write()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Prevents a checkpoint of a broken state."""
        if self.fatal is not None:
            control.should_save = control.should_evaluate = False

    on_epoch_end = on_step_end

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Writes the findings.

        Raises:
            UnhealthyRunError: If a fatal finding has stopped the run.
        """
        self._write()
        if self.fatal is not None:
            if self.on_stop is not None and state.is_world_process_zero:
                self.on_stop()
            PartialState().wait_for_everyone()  # torch's launcher ends the others as soon as one has exited
            kept = _good_checkpoint(args.output_dir, self.fatal, self.facts, healthy=self.healthy)
            raise UnhealthyRunError(
                f"Stopped at update {self.fatal.step} ({self.fatal.rule}). {kept} --health warn would go on."
            )

    def _probe(self, state: TrainerState) -> None:
        """Puts a probe's numbers into the log of all processes, once an update even with several evaluation sets."""
        if self.prompts and self.probed != state.global_step:
            self.probed = state.global_step
            most = min(_LONGEST_PROBE, max(64, math.ceil(2 * self.facts.chosen_tokens)))
            found = [probe(self.trainer, self.prompts, max_new_tokens=most) if state.is_world_process_zero else {}]
            state.log_history.append(broadcast_object_list(found)[0] | {"step": state.global_step})

    def _look(self, state: TrainerState, control: TrainerControl, *, proven: bool) -> None:
        """Applies the rules; `proven` says that a healthy look now proves the checkpoint of this update."""
        for name, points in read_logs(state.log_history[self.read :]).items():
            self.logged.setdefault(name, []).extend(points)
        self.read = len(state.log_history)
        for name in self.watching:
            rule = getattr(rules, name, None)  # wrong_reference has no function: the guard checks it
            if rule and (sign := rule(self.logged, self.facts, **RULES[name]["limits"])):
                self._found(name, sign, state.global_step, control)
        if proven and self.fatal is None:
            self.healthy = state.global_step

    def _found(self, name: str, sign: str, step: int, control: TrainerControl) -> None:
        """Keeps a finding, reports it the first time, and stops the run if it is fatal and the mode is `stop`."""
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
            with tqdm.external_write_mode():  # no bar on its line
                say(str(finding), always=True)
            if "wandb" in self.trainer.args.report_to:
                import wandb

                if wandb.run is not None:
                    wandb.run.alert(title=f"{name}, update {step}", text=str(finding))

    def _write(self) -> None:
        """Writes health.json. A full disk is reported, and training goes on."""
        if not self.trainer.is_world_process_zero():
            return
        state = self.trainer.state
        data = {
            "mode": self.mode,
            "stopped": self.fatal is not None,
            "updates": state.global_step,
            "findings": [asdict(finding) for finding in self.findings],
            "rules": self.watching,
            "nothing_to_look_at": [name for name in self.rules if name not in self.watching],
            "probes": [entry for entry in state.log_history if "probe/ended" in entry],
        }
        try:
            write_json(Path(self.trainer.args.output_dir) / HEALTH_FILE, data)
        except OSError as error:
            with tqdm.external_write_mode():
                say(f"{HEALTH_FILE} could not be written: {error}", always=True)


def _good_checkpoint(output_dir: str | Path, fatal: Finding, facts: Facts, *, healthy: int) -> str:
    """Names the checkpoint to resume from after a fatal finding; `healthy` is the last update that was proven good."""
    pairs = RULES["loss_spike"]["limits"]["pairs"] if fatal.rule == "loss_spike" else 1  # a spike shows that much later
    begun = fatal.step - math.ceil(pairs / facts.pairs_per_update)
    if good := latest_checkpoint(output_dir, before=min(healthy, begun) + 1):
        return f"The last good checkpoint is {good}: --resume_from_checkpoint goes on from it."
    if newest := latest_checkpoint(output_dir, before=fatal.step):
        return f"No checkpoint is proven good, because no log or evaluation came after it; try {newest}."
    return "There is no checkpoint yet."
