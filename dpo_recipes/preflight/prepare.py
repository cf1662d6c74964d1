"""Accounts for every pair before a model is loaded, and shortens pairs that are too long for it."""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, DatasetDict, Value
from trl import SFTConfig

from dpo_recipes.dataset_adapters.adapting import ROW, keep_rows
from dpo_recipes.dataset_adapters.ledger import HELD_OUT, Ledger
from dpo_recipes.errors import RecipeError
from dpo_recipes.files import write_json
from dpo_recipes.loading import drop_prompts_in_test, keep_part, prompt_hashes
from dpo_recipes.manifest import claim
from dpo_recipes.models.rewards import check_reward_model, context_length, read_reward_config
from dpo_recipes.preflight import account
from dpo_recipes.preflight.cost import plan_lines, task_of
from dpo_recipes.preflight.decide import decide
from dpo_recipes.preflight.findings import Finding, judged, refuse_failures, set_thresholds, show_findings
from dpo_recipes.preflight.memory import load_config
from dpo_recipes.preflight.tokens import MEASURES, Unit, as_plain_text, fit, rendered_pairs
from dpo_recipes.recipe import RecipeArguments, check_start
from dpo_recipes.terminal import say

LoadPairs = Callable[[Any], DatasetDict]
"""The `load_pairs` of a recipe: takes its script_args, returns the splits `train` and `test`."""


@dataclass
class Measured:
    """The rows that a recipe can train on, and their account."""

    pairs: DatasetDict  # with the columns that `fit` adds
    lines: list[str]  # the account for the screen
    data: dict[str, Any]  # for preflight.json
    findings: list[Finding]


def prepare_pairs(
    load_pairs: LoadPairs, script_args: RecipeArguments, training_args: Any, tokenizer: Any
) -> DatasetDict:
    """`train` and `test` pairs that TRL can take as they are, every row of the dataset accounted for.

    Pairs over `max_length` tokens lose their oldest turns, and are dropped where that does not help: TRL then truncates
    and drops nothing. The test split is cut to `eval_pairs`, drawn by seed 0. The account and the findings are printed
    and written to `preflight.json` in the output folder.

    Args:
        load_pairs: The recipe's own.
        script_args: Passed to load_pairs.
        training_args: A TRL config; `max_length` (None: any) and `output_dir` are read.
        tokenizer: The one that the trainer is given, with its chat template: `load_tokenizer` puts SFT's in.

    Raises:
        RecipeError: If the tokenizer has no chat template or EOS token, no pair is left to train or to test on, or a
            finding is a failure.
        SystemExit: With status 0 after a dry run without updates, which writes nothing.
    """
    return _prepare(load_pairs, script_args, training_args, tokenizer, prompts_only=False)


def prepare_prompts(
    load_pairs: LoadPairs, script_args: RecipeArguments, training_args: Any, tokenizer: Any
) -> DatasetDict:
    """`train` and `test` prompts for an online trainer, each once, every row of the dataset accounted for.

    A prompt over `max_prompt_length` tokens loses its oldest turns, and is dropped where that does not help; with
    `max_pair_length` the prompts are exactly those that `prepare_pairs` keeps at that `max_length`. Reward functions
    get every column except chosen and rejected. The rest is as in `prepare_pairs`. For SFT the prompts are texts, each
    with room for an end token within `max_length`, and their answers are not looked at.

    Args:
        load_pairs: The recipe's own.
        script_args: OnlineArguments, or RecipeArguments for SFT, passed to load_pairs. The reward model that they name
            is checked.
        training_args: A TRL config. `max_length` is read for SFT, else `max_completion_length`,
            `generation_batch_size` (which RoundsConfig lacks) and `num_generations`; `output_dir`.
        tokenizer: The one that the trainer is given.

    Raises:
        RecipeError: If the tokenizer has no chat template or EOS token, no prompt is left to train or to test on, a
            prompt leaves no room for an answer, there are too few for a rollout, or the reward model cannot score.
        SystemExit: With status 0 after a dry run, which writes nothing.
    """
    return _prepare(load_pairs, script_args, training_args, tokenizer, prompts_only=True)


def _prepare(
    load_pairs: LoadPairs, script_args: RecipeArguments, training_args: Any, tokenizer: Any, *, prompts_only: bool
) -> DatasetDict:
    if script_args.dataset_streaming:
        raise RecipeError(
            "dataset_streaming is true, but every row is counted before training, which needs them all. Leave it out; "
            f"a part of a large dataset is {script_args.dataset_name}:50000."
        )
    state = PartialState()
    measured: Measured | RecipeError
    # One process fills the map caches, first of all nodes and then of each; the others read them. An error waits until
    # every process has come by: otherwise the others would hang.
    with state.main_process_first(), state.local_main_process_first():
        try:
            if state.is_main_process and not script_args.is_dry_run:
                check_start(script_args.settings, training_args)
            measured = measure_pairs(load_pairs, script_args, training_args, tokenizer, prompts_only=prompts_only)
        except RecipeError as error:
            measured = error
    if isinstance(measured, RecipeError):
        raise measured
    pairs, extra = DatasetDict(measured.pairs), {*MEASURES, ROW}
    for split, rows in measured.pairs.items():
        pairs[split] = rows.remove_columns([*extra.intersection(rows.column_names)])
    name = script_args.settings.get("model_name_or_path") or tokenizer.name_or_path
    task, decided = task_of(training_args), None
    if not (prompts_only and task == "preference"):  # rounds decide when they have made pairs of the prompts
        decided = decide(script_args, training_args, measured.pairs["train"], name=name, task=task)
    if script_args.is_dry_run or state.is_main_process:
        say("\n".join(measured.lines))
        show_findings(measured.findings)
        if decided:
            say(f"Memory: {decided}.")
    if script_args.is_dry_run:
        say("\n".join([*plan_lines(script_args, training_args, tokenizer, measured.pairs)]))
        if not script_args.timed_updates:
            raise SystemExit(0)
        training_args.report_to = []
        return pairs
    if state.is_main_process:
        claim(training_args.output_dir)
        path = write_json(Path(training_args.output_dir) / "preflight.json", measured.data)
        say(f"The first rows of each kind: {path}")
    refuse_failures(measured.findings)
    return pairs


def measure_pairs(
    load_pairs: LoadPairs,
    script_args: RecipeArguments,
    training_args: Any,
    tokenizer: Any,
    *,
    prompts_only: bool = False,
) -> Measured:
    """The rows that a recipe can train on, with the account of all rows and tokens and the findings.

    The arguments are those of `prepare_pairs`. With `prompts_only` the rows are those that `prepare_prompts` returns.
    With a `held_out` of 1 there is no train split: all rows are held out, as `evaluate` needs them.

    Raises:
        RecipeError: If the tokenizer has no chat template or EOS token, no row is left to train or to test on, or the
            model or the reward model cannot take what is left.
    """
    # A base model's EOS token is often not the one that its chat template writes: SFT can change that.
    lenient = {"without_eos_failure": 1.0} if isinstance(training_args, SFTConfig) else {}
    thresholds = set_thresholds(script_args.threshold, **lenient)
    unit, limit, longest = _limit(script_args, training_args, prompts_only=prompts_only)
    with Ledger(script_args.held_out) as ledger:
        pairs = _load(load_pairs, script_args, ledger)
        tokenizer = tokenizer_to_measure(tokenizer, pairs=pairs["test"])
        for split, rows in pairs.items():
            pairs[split] = _fit_split(rows, tokenizer, script_args, ledger, split=split, unit=unit, longest=longest)
        if "train" in pairs:
            pairs = drop_prompts_in_test(pairs, stage="preflight")  # shortened prompts may have become equal
        pairs["test"] = _draw_eval_pairs(pairs["test"], script_args.eval_pairs, ledger)
    for split, rows in pairs.items():
        ledger.accounts[split].shortened = sum(tokens > 0 for tokens in rows["cut_tokens"][:])
    lines = account.account_lines(ledger, limit=f"{limit} {longest}" if longest else "", kept=f"{unit}s")
    lines += account.reader_lines(ledger)
    account.refuse_empty(pairs, ledger, lines)
    data = {"dataset": script_args.dataset_name, "max_length": None, limit: longest, "model": tokenizer.name_or_path}
    data |= {"chat_template": tokenizer.chat_template is not None, **account.account_data(ledger, pairs)}
    if unit == "prompt":
        _check_prompts(pairs, script_args, training_args, tokenizer)
        data["reward_model"] = script_args.reward_model_name_or_path
    else:
        _check_model(tokenizer, training_args, script_args.settings, data["tokens"])
    if unit == "pair":
        split = next(iter(pairs))
        data["rendered"] = rendered_pairs(pairs[split], tokenizer, split=split)
    lines += account.token_lines(data["tokens"], unit=unit)
    findings = account.account_findings(ledger, data, thresholds)
    return Measured(pairs, lines, data | {"thresholds": thresholds} | judged(findings), findings)


def _limit(script_args: Any, training_args: Any, *, prompts_only: bool) -> tuple[Unit, str, int | None]:
    """The unit that is measured, the setting that limits its tokens, and the value of this setting."""
    if not prompts_only or isinstance(training_args, SFTConfig):
        return "text" if prompts_only else "pair", "max_length", training_args.max_length
    limit = "max_pair_length" if script_args.max_pair_length else "max_prompt_length"
    return "prompt", limit, getattr(script_args, limit)


def _load(load_pairs: LoadPairs, script_args: RecipeArguments, ledger: Ledger) -> DatasetDict:
    """The splits that the recipe loads; of the training pairs those of `--part`, and none if all are held out."""
    pairs = load_pairs(script_args)
    if set(pairs) != {"train", "test"}:
        raise RecipeError(f"load_pairs returned the splits {list(pairs)}, needs train and test: end it in split_pairs.")
    for rows in pairs.values():
        if not {"prompt", "chosen", "rejected"} <= set(rows.column_names):
            raise RecipeError(
                f"load_pairs returned the columns {rows.column_names}, needs prompt, chosen and rejected: pass the "
                "rows through a dataset adapter."
            )
    if script_args.held_out == 1:
        return DatasetDict(test=pairs["test"])
    if script_args.held_out != HELD_OUT and not ("test" in ledger.accounts and ledger.accounts["test"].moved):
        raise RecipeError(
            f"held_out={script_args.held_out:g} has no effect here: the data has test pairs of its own, which are held "
            "out. Leave it out."
        )
    return DatasetDict(train=keep_part(pairs["train"], script_args.part), test=pairs["test"])


def tokenizer_to_measure(tokenizer: Any, *, pairs: Dataset) -> Any:
    """A copy of the trainer's tokenizer, which measuring must not change; without chat template for plain text.

    Raises:
        RecipeError: If the tokenizer has no EOS token, or no chat template for conversations.
    """
    if tokenizer.eos_token is None:
        raise RecipeError(
            f"The tokenizer of {tokenizer.name_or_path} has no EOS token, so that no answer would learn to end. Start "
            "from a chat or SFT model that has one, or set eos_token in its tokenizer_config.json."
        )
    tokenizer = copy.deepcopy(tokenizer)
    if pairs.features["prompt"] == Value("string"):
        tokenizer.chat_template = None
    elif tokenizer.chat_template is None:
        raise RecipeError(
            f"The tokenizer of {tokenizer.name_or_path} has no chat template, but the pairs are conversations. Start "
            "from a chat or SFT model, or train one first: an SFT recipe with --chat_template_path."
        )
    return tokenizer


def _fit_split(
    rows: Dataset, tokenizer: Any, script_args: Any, ledger: Ledger, *, split: str, unit: Unit, longest: int | None
) -> Dataset:
    """The pairs or prompts of one split that are short enough."""
    if script_args.control_tokens_as_text:
        rows = as_plain_text(rows, tokenizer)
    if unit == "pair" or (unit == "prompt" and script_args.max_pair_length):
        rows = fit(rows, tokenizer, longest, split=split)
    if unit == "pair":
        return rows
    if "tools" in rows.column_names:  # an online trainer takes functions to call, and no column
        ledger.note_unread("tools", len(rows), len(rows))
    room = longest - 1 if longest and unit == "text" else longest  # SFT adds an end token
    return _first_of_each_prompt(fit(rows, tokenizer, room, split=split, unit=unit), split=split)


def _first_of_each_prompt(prompts: Dataset, *, split: str) -> Dataset:
    first: dict[str, int] = {}
    firsts = [first.setdefault(key, row) == row for row, key in enumerate(prompt_hashes(prompts))]
    return keep_rows(prompts, [None if new else "same_prompt" for new in firsts], stage="preflight", split=split)


def _draw_eval_pairs(test: Dataset, size: int | None, ledger: Ledger) -> Dataset:
    if size is not None and size < 1:
        raise RecipeError(f"eval_pairs is {size}, but evaluation needs pairs. Ask for one or more: --eval_pairs 512.")
    if size is None or size >= len(test):
        return test
    ledger.record("eval_pairs", "test", came=len(test), kept=size, not_sampled=len(test) - size)
    return test.select(sorted(random.Random(0).sample(range(len(test)), size)))


def _check_model(tokenizer: Any, training_args: Any, settings: dict[str, Any], tokens: dict[str, Any]) -> None:
    """Raises RecipeError if the model has no embedding for a token id, or fewer positions than `max_length`.

    A tokenizer that was made in memory, or whose model needs code of its own, has no configuration to check.
    """
    name = tokenizer.name_or_path
    try:
        config = load_config(name, settings)
    except (OSError, ValueError):
        return
    used = [tokenizer.pad_token_id, tokenizer.eos_token_id, *(split.get("largest_id") for split in tokens.values())]
    largest, rows = max(token for token in used if token is not None), config.get_text_config().vocab_size
    if largest >= rows:
        raise RecipeError(
            f"The tokenizer of {name} writes token ids up to {largest}, but the model's embedding has {rows} rows. "
            "Remove the tokens that were added to the tokenizer (a pad token among them), or resize the model's "
            "embedding and save it again: model.resize_token_embeddings(len(tokenizer))."
        )
    longest = max(split.get("longest_pair", split["prompt"]["max"]) for split in tokens.values())
    if (wanted := training_args.max_length or longest) > (context := context_length(config)):
        raise RecipeError(f"max_length is {wanted} tokens, {name} has {context} positions. Set --max_length {context}.")


def _check_prompts(prompts: DatasetDict, script_args: Any, training_args: Any, tokenizer: Any) -> None:
    """Raises RecipeError unless the prompts fill a rollout, leave room for answers, and suit the reward model."""
    rollout = getattr(training_args, "generation_batch_size", 0) // training_args.num_generations
    if len(prompts["train"]) < rollout:
        raise RecipeError(
            f"A rollout is generation_batch_size / num_generations = {rollout} prompts, and there are "
            f"{len(prompts['train'])} to train on. Lower --generation_batch_size, or give more rows."
        )
    name, longest = tokenizer.name_or_path, training_args.max_completion_length
    context = context_length(load_config(name, script_args.settings))
    tokens = [count for rows in prompts.values() for count in rows["prompt_tokens"][:]]
    if over := sum(count + longest > context for count in tokens):
        flag = "max_length" if script_args.max_pair_length else "max_prompt_length"
        room = min(longest, context // 2)  # of an answer
        raise RecipeError(
            f"{over:,} of {len(tokens):,} prompts leave no room for an answer of max_completion_length={longest} "
            f"tokens in the {context} of {name}. Let answers end earlier and the oldest turns of prompts go: "
            f"--max_completion_length {room} --{flag} {context - room}."
        )
    if judge := script_args.reward_model_name_or_path:
        revision = script_args.settings.get("model_revision") or "main"  # TRL takes it for both models
        trust, weights = training_args.trust_remote_code, not script_args.is_dry_run
        options = dict(revision=revision, trust_remote_code=trust, weights=weights)
        texts = [prompt for rows in prompts.values() for prompt in rows["prompt"][:]]
        check_reward_model(*read_reward_config(judge, **options), texts, max_completion_length=longest)
