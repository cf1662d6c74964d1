"""DPO in rounds: the policy answers prompts, a reward model ranks the answers into pairs, and DPO learns from them.

A recipe holds the loop; these functions are its steps. Each round has a folder of its own within the run's, so that a
run that was stopped at any moment goes on from there:

    round-1/answers.jsonl, pairs.jsonl    what was sampled, and its best and worst answers
    round-1/preflight.json, checkpoint-*  the account of the pairs, and the training
    round-1/round.json                    numbers of the round; those of a finished one have `updates`
"""

import copy
import hashlib
import itertools
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from transformers import PreTrainedTokenizerBase, set_seed
from trl import DPOConfig, DPOTrainer, ModelConfig, get_peft_config, get_quantization_config
from trl.trainer.utils import create_model_from_path

from dpo_recipes.dataset_adapters import as_messages
from dpo_recipes.errors import RecipeError
from dpo_recipes.files import read_json, read_jsonl, write_json, write_jsonl
from dpo_recipes.health.rules import HEALTH_FILE
from dpo_recipes.manifest import declare, settle
from dpo_recipes.models.checkpoints import latest_checkpoint
from dpo_recipes.models.likelihood import completion_logps, sampled_kl
from dpo_recipes.models.open import evaluating
from dpo_recipes.models.rewards import Text, load_reward_model
from dpo_recipes.recipe import OnlineArguments
from dpo_recipes.runs.metrics import ROUND_FILE, rounds_of
from dpo_recipes.runs.page import LOG_FILE
from dpo_recipes.runs.run import start_run, take_folder
from dpo_recipes.sample.sampling import AT_A_TIME, Rows, answer, in_steps, ranked
from dpo_recipes.terminal import say
from dpo_recipes.trl_patches import first_update, prepare_inputs

BATCH = 64  # answers at a time
MEASURED = 64  # prompts for the KL, and answers for the share that is still the policy's own


@dataclass
class RoundsConfig(DPOConfig):
    """DPOConfig's fields, which hold for each round alone, and the fields of the rounds.

    Each round has its own optimizer and its own schedule of the learning rate, warm-up included; `max_steps` and
    `num_train_epochs` count within a round.

    Raises:
        ValueError: If there are too few rounds, answers or prompts.
    """

    num_rounds: int = field(default=3, metadata={"help": "Rounds: sample, rank, train."})
    num_generations: int = field(default=4, metadata={"help": "Answers to a prompt; best and worst become a pair."})
    num_prompts: int | None = field(
        default=None, metadata={"help": "Prompts of all rounds together; by default each prompt once."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the sampled answers."})
    max_completion_length: int = field(default=256, metadata={"help": "Tokens after which an answer is cut."})
    reference: str = field(
        default="first",
        metadata={"help": "Reference model: the first model, or the round's.", "choices": ["first", "round"]},
    )

    def __post_init__(self) -> None:
        """Checks the fields of the rounds."""
        super().__post_init__()
        if self.num_rounds < 1 or self.num_generations < 2:
            raise ValueError(
                f"Got num_rounds={self.num_rounds} and num_generations={self.num_generations}. A run takes at least "
                "one round, and a pair at least two answers."
            )
        if self.num_prompts is not None and self.num_prompts < self.num_rounds:
            raise ValueError(f"num_prompts={self.num_prompts} leaves a round of {self.num_rounds} without a prompt.")


@dataclass
class Round:
    """One round: its settings with a folder of its own, its prompts, and the checkpoint that it starts from."""

    number: int
    args: RoundsConfig
    prompts: list[Text]
    start: Path | None  # the last round's checkpoint; None: the initial model
    model_init_kwargs: dict[str, Any]
    at_start: torch.Tensor | None = None  # log-probs of the first pairs' answers under the policy that sampled them

    @property
    def folder(self) -> Path:
        """The round's own folder."""
        return Path(self.args.output_dir)

    def account(self) -> dict[str, Any]:
        """The numbers of the round that are known by now."""
        return read_json(self.folder / ROUND_FILE)

    def note(self, **numbers: Any) -> None:
        """Adds numbers to the round's account."""
        if PartialState().is_main_process:
            write_json(self.folder / ROUND_FILE, self.account() | numbers)
        PartialState().wait_for_everyone()


def begin_rounds(script_args: OnlineArguments, training_args: RoundsConfig, prompts: Dataset) -> Iterator[Round]:
    """Yields the rounds that are not finished yet, each with its own share of the prompts.

    The prompts are in an order drawn by seed. If `num_prompts` asks for more than there are, they begin again.

    Args:
        script_args: As `parse_recipe` returned them.
        training_args: Likewise; `output_dir` gets a folder for each round.
        prompts: As `prepare_prompts` returned them.

    Raises:
        RecipeError: If updates are to be timed, there are too few prompts, or the folder of a round was begun with
            other prompts, weights or settings.
    """
    folder, rounds = Path(training_args.output_dir), training_args.num_rounds
    if script_args.is_dry_run:
        raise RecipeError("A round samples its pairs first, so no updates can be timed. Give --dry_run true.")
    drawn = prompts["prompt"][:]
    random.Random(training_args.seed).shuffle(drawn)
    count = training_args.num_prompts or len(drawn)
    if count < rounds:
        raise RecipeError(f"{count} prompts are too few for {rounds} rounds. Lower --num_rounds, or give more rows.")
    asked = list(itertools.islice(itertools.cycle(drawn), count))
    state, start = PartialState(), None
    if state.is_main_process:
        take_folder(folder, script_args)
    state.wait_for_everyone()
    for number in range(1, rounds + 1):
        args = copy.copy(training_args)
        args.output_dir, args.model_init_kwargs = str(folder / f"round-{number}"), None
        share = asked[count * (number - 1) // rounds : count * number // rounds]
        this = Round(number, args, share, start, training_args.model_init_kwargs or {})
        if number == rounds or "updates" not in this.account():
            if state.is_main_process:
                declare(folder, this.folder.name)
            _refuse_another(this, script_args)
            say(f"\nRound {number} of {rounds}: {len(share):,} prompts, {len(share) * args.num_generations:,} answers")
            found = latest_checkpoint(this.folder)
            args.resume_from_checkpoint = str(found) if found else None
            yield this
            if state.is_main_process:
                settle(folder, this.folder.name)
        start = latest_checkpoint(this.folder)


def _refuse_another(this: Round, script_args: OnlineArguments) -> None:
    """Raises RecipeError if the folder holds a round of other prompts, weights or sampling."""
    args = this.args
    weights = None if this.start is None else hashlib.sha256((this.start / "adapter_model.safetensors").read_bytes())
    asked = [this.prompts, weights and weights.hexdigest(), script_args.reward_model_name_or_path, args.seed]
    asked += [args.num_generations, args.temperature, args.max_completion_length]
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    if this.account().get("key", key) != key:
        raise RecipeError(
            f"{this.folder} was begun with other prompts, weights or sampling. Begin anew with --overwrite true, or "
            "choose another --output_dir."
        )
    this.note(key=key, round=this.number, reference=args.reference)


def load_policy(this: Round, model_args: ModelConfig) -> PeftModel:
    """Loads the initial model with the LoRA adapter that the round starts from: a new one, or the last round's.

    Raises:
        RecipeError: If no LoRA adapter is to be trained.
    """
    if (peft_config := get_peft_config(model_args)) is None:
        raise RecipeError("The rounds train one LoRA adapter, and use_peft is false. Give --use_peft true.")
    set_seed(this.args.seed)  # of a new adapter
    how = {"quantization_config": get_quantization_config(model_args), "device_map": {"": PartialState().device}}
    model = create_model_from_path(str(model_args.model_name_or_path), **{**how, **this.model_init_kwargs})
    policy = get_peft_model(model, peft_config)
    if this.start:
        set_peft_model_state_dict(policy, load_peft_weights(str(this.start), device="cpu"))
    return policy


def sample(this: Round, policy: PeftModel, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """Lets the policy answer each prompt of the round `num_generations` times, and keeps the answers."""
    file, args, began = this.folder / "answers.jsonl", this.args, time.monotonic()
    if file.exists():
        return read_jsonl(file)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # as DPOTrainer does
    settings: dict[str, Any] = dict(num_samples=args.num_generations, max_new_tokens=args.max_completion_length)
    settings |= dict(temperature=args.temperature, batch_size=BATCH, seed=args.seed + 10_000 * this.number)
    ask = partial(answer, policy, tokenizer, **settings)
    step = max(1, AT_A_TIME * BATCH // args.num_generations)  # prompts between two writes
    with PartialState().split_between_processes([{"prompt": prompt} for prompt in this.prompts]) as mine:
        model = str(this.start or policy.config.name_or_path)
        with in_steps(ask, mine, file, step=step, model=model, settings=settings) as answered:
            lines = gather_object(answered)
            if PartialState().is_main_process:
                write_jsonl(file, lines)
            this.note(answers=len(lines) * args.num_generations, sampling_seconds=time.monotonic() - began)
    return read_jsonl(file)


def rank(this: Round, answers: Rows, reward_model: str) -> Dataset:
    """Makes a pair of the best and the worst answer to each prompt; equal texts and equal scores make no pair."""
    file, began = this.folder / "pairs.jsonl", time.monotonic()
    if PartialState().is_main_process and not file.exists():
        pairs = ranked(answers, reward_model, best_against_worst=True)
        equal = sum(len({*line["completions"]}) == 1 for line in answers)
        cut = sum(not ended for line in answers for ended in line["ended"])
        counts = {"prompts": len(answers), "pairs": len(pairs), "equal_texts": equal, "cut": cut}
        counts["not_ranked"] = len(answers) - equal - len(pairs)
        margin = fmean(pair["preference_strength"] for pair in pairs)
        more = {"margin": margin, "ranking_seconds": time.monotonic() - began}
        write_json(this.folder / ROUND_FILE, this.account() | counts | more)
        write_jsonl(file, pairs)
    PartialState().wait_for_everyone()
    return Dataset.from_list([_as_prompted(pair) for pair in read_jsonl(file)])


def _as_prompted(pair: dict[str, Any]) -> dict[str, Any]:
    """The pair with its answers as messages, where the prompt is a conversation."""
    if isinstance(pair["prompt"], str):
        return pair
    return pair | {side: as_messages(pair[side], role="assistant") for side in ("chosen", "rejected")}


def start_round(this: Round, trainer: DPOTrainer, script_args: OnlineArguments) -> None:
    """Sets the reference model, adds the guards, and takes the round's folder: call it before `trainer.train`.

    DPOTrainer's own reference model is a copy of the LoRA adapter that it is given, the round's. Without this copy it
    is the policy with the adapter switched off, the first model.
    """
    own = copy.copy(script_args)
    own.overwrite = False  # the rounds' folder was emptied before the first one
    if this.args.reference == "first":
        trainer.model.delete_adapter("ref")
    this.at_start = _pair_logps(trainer)
    start_run(trainer, own, reference_is_start=this.number == 1 or this.args.reference == "round")


def finish_round(this: Round, trainer: DPOTrainer, script_args: OnlineArguments) -> None:
    """Measures the round and writes its account. After the last one the trainer stands for all, for `finish_run`.

    The on-policy share is the mean of min(1, p_now / p_sampled) over the answers of some pairs: 1 if the policy has not
    moved from the one that sampled them, and 0 if it gives none of them any more.
    """
    if "ref" in trainer.model.peft_config:
        trainer.model.delete_adapter("ref")  # from now on the reference model is the first model
    ratios = (_pair_logps(trainer) - this.at_start).exp() if this.at_start is not None else torch.ones(1)
    share, margin = ratios.clamp(max=1).mean().item(), this.account()["margin"]
    trainer.log({"on_policy_share": share, "reward_model_margin": margin})
    prompts = list({str(prompt): prompt for prompt in trainer.eval_dataset["prompt"][:]}.values())[:MEASURED]
    kl = sampled_kl(trainer, prompts, max_new_tokens=this.args.max_completion_length)
    log, updates = trainer.state.log_history, trainer.state.global_step
    last = {name: value for entry in log for name, value in entry.items()}
    part = (updates - first_update(trainer)) / updates or 1.0  # of the updates that seconds and tokens were counted in
    spent = {"training_seconds": last.get("train_runtime", 0.0) / part, "tokens": (last.get("num_tokens") or 0) / part}
    if trainer.is_world_process_zero():
        write_json(this.folder / LOG_FILE, {"log_history": log})
    this.note(on_policy_share=share, kl=kl, updates=updates, **spent)
    say(f"Round {this.number}: on-policy share {share:.3f}, reward-model margin {margin:.3f}, KL {kl['nats']:.2f} nats")
    if this.number == this.args.num_rounds:
        _join(this.folder.parent, trainer, script_args)


def _pair_logps(trainer: DPOTrainer) -> torch.Tensor:
    """Log-probs of both answers of the first training pairs under the policy. Shape (answers,)."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    rows = list(itertools.islice(trainer.train_dataset, MEASURED // 2))
    found = []
    with evaluating(model), trainer.accelerator.autocast():
        for at in range(0, len(rows), 4):
            batch = prepare_inputs(trainer, trainer.data_collator(rows[at : at + 4]))
            found.append(completion_logps(model, batch).sum(dim=1).cpu())
    return torch.cat(found)


def _join(folder: Path, trainer: DPOTrainer, script_args: OnlineArguments) -> None:
    """Gives the last round's trainer the folder, the log, the findings and the reward model of the whole run."""
    log: list[dict[str, Any]] = []
    health: dict[str, Any] = {"findings": [], "probes": []}
    updates = 0
    for account in (accounts := rounds_of(folder)):
        part, name = folder / f"round-{account['round']}", f"round {account['round']}"
        found = read_json(part / HEALTH_FILE)
        for entry in (entries := read_json(part / LOG_FILE)["log_history"]):
            entry["step"] += updates
        for finding in found.get("findings", []):
            finding |= {"step": finding["step"] + updates, "sign": f"{name}: {finding['sign']}"}
        log += entries
        both = {key: health[key] + found.get(key, []) for key in ("findings", "probes")}
        updates += account["updates"]
        health = found | both | {"updates": updates}
    seconds = sum(sum(spent for key, spent in each.items() if key.endswith("_seconds")) for each in accounts)
    log.append({"train_runtime": seconds, "num_tokens": sum(each["tokens"] for each in accounts), "step": updates})
    if trainer.is_world_process_zero():
        write_json(folder / LOG_FILE, {"log_history": log})
        if script_args.health != "off":
            write_json(folder / HEALTH_FILE, health)
    trainer.args.output_dir, trainer.state.log_history, trainer.state.global_step = str(folder), log, updates
    model, tokenizer = load_reward_model(str(script_args.reward_model_name_or_path), labels=(1, 2))
    trainer.reward_funcs, trainer.reward_processing_classes = [model], [tokenizer]
    trainer.reward_func_names = [Path(str(script_args.reward_model_name_or_path)).name]
