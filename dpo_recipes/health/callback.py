"""Says when a run goes wrong, and what to do: rules over the metrics that TRL logs, and a probe of a few answers.

`start_run` puts a HealthCallback on every recipe (`--health warn`, `stop` or `off`); a trainer of one's own takes

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
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from trl import DPOTrainer
from trl.data_utils import is_conversational

from dpo_recipes.errors import UnhealthyRunError
from dpo_recipes.files import write_json
from dpo_recipes.health import rules
from dpo_recipes.health.guards import ReferenceGuard, WrongReferenceError
from dpo_recipes.health.probe import probe, read_facts
from dpo_recipes.health.rules import HEALTH_FILE, RULES, Facts, Finding, read_findings, read_logs
from dpo_recipes.models.checkpoints import latest_checkpoint
from dpo_recipes.models.likelihood import sharded
from dpo_recipes.terminal import shown
from dpo_recipes.trl_patches import method_name

_PROBED = 4  # held-out prompts
_LONGEST_PROBE = 256  # tokens; a probe goes up to twice the chosen answers


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
        guarded = any(isinstance(each, ReferenceGuard) for each in trainer.callback_handler.callbacks)
        self.reference = ReferenceGuard(trainer) if isinstance(trainer, DPOTrainer) and not guarded else None
        self.rules = [name for name, rule in RULES.items() if method_name(trainer) in rule["for"]]
        self.facts: Facts | None = None  # known when training begins
        self._forget()

    def _forget(self) -> None:
        self.watching: list[str] = []  # the rules that have something to look at
        self.findings: list[Finding] = []
        self.fatal: Finding | None = None
        self.logged: dict[str, list[tuple[int, float]]] = {}
        self.read = 0  # logs
        self.overflows = 0  # updates in a row
        self.healthy = 0  # the last update after which nothing fatal was found
        self.prompts: list[Any] = []
        self.probed = -1  # the last update

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Probe the start; a resumed run remembers what was found before, another call of `train` nothing."""
        self._forget()
        self.facts, self.healthy = read_facts(self.trainer), state.global_step
        found = read_findings(args.output_dir) if state.global_step else []
        self.findings = [each for each in found if each.step <= state.global_step]
        rows, tokenizer = self.trainer.eval_dataset, self.trainer.processing_class
        rows = next(iter(rows.values())) if isinstance(rows, dict) else rows
        probed = "degenerate_text" in self.rules and args.eval_strategy != "no" and not sharded(self.trainer)
        if probed and isinstance(rows, Dataset) and isinstance(tokenizer, PreTrainedTokenizerBase):
            drawn = rows.select(range(0, len(rows), max(1, len(rows) // _PROBED))[:_PROBED])
            self.prompts = [row["prompt"] for row in drawn if is_conversational({"prompt": row.get("prompt")})]
        there = {
            "probe": bool(self.prompts),
            "answers": bool(self.prompts) or not isinstance(self.trainer, DPOTrainer),
            "held_out": self.facts.eval_pairs > 0 and args.eval_strategy != "no",
            "tokens": self.facts.rejected_tokens > 0 and self.facts.beta > 0,
            "rows": isinstance(self.trainer.train_dataset, Dataset),
        }
        self.watching = [name for name in self.rules if there.get(RULES[name].get("needs", ""), True)]
        if not state.global_step:
            self._probe(state)
        self._write()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the gradients and at the reference model; `stop` drops the update, so that the weights stay good."""
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
                    self._found("wrong_reference", str(error).partition(": ")[2].partition(". ")[0], 1, control)
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
            kept = "There is no checkpoint yet."
            if newest is not None:
                kept = f"No checkpoint is proven good, for lack of a log or an evaluation after it; try {newest}."
            if good is not None:
                kept = f"The last good checkpoint is {good}: --resume_from_checkpoint goes on from it."
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
        for name, points in read_logs(state.log_history[self.read :]).items():
            self.logged.setdefault(name, []).extend(points)
        self.read = len(state.log_history)
        for name in self.watching:
            rule = getattr(rules, name, None)  # a wrong reference is seen elsewhere
            if rule and (sign := rule(self.logged, self.facts, **RULES[name]["limits"])):
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
            tqdm.write(shown(str(finding)))
            if "wandb" in self.trainer.args.report_to:
                import wandb

                if wandb.run is not None:
                    wandb.run.alert(title=f"{name}, update {step}", text=str(finding))

    def _write(self) -> None:
        if self.trainer.is_world_process_zero():
            state = self.trainer.state
            data = {"mode": self.mode, "stopped": self.fatal is not None, "updates": state.global_step}
            data |= {"findings": [asdict(finding) for finding in self.findings]}
            blind = [name for name in self.rules if name not in self.watching]
            data |= {"rules": self.watching, "nothing_to_look_at": blind}
            data |= {"probes": [entry for entry in state.log_history if "probe/ended" in entry]}
            try:
                write_json(Path(self.trainer.args.output_dir) / HEALTH_FILE, data)
            except OSError as error:  # a full disk: training goes on
                tqdm.write(f"{HEALTH_FILE} could not be written: {error}")
