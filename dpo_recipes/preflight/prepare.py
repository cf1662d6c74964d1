"""Accounts for every pair before a model is loaded, and shortens those that are too long for it."""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, DatasetDict, Value
from transformers import AutoConfig
from trl import SFTConfig

from dpo_recipes.dataset_adapters.ledger import Ledger, current_ledger
from dpo_recipes.errors import RecipeError
from dpo_recipes.files import write_json
from dpo_recipes.loading import digest, drop_prompts_in_test, keep_part
from dpo_recipes.manifest import claim
from dpo_recipes.models.rewards import check_reward_model, context_length, read_reward_config
from dpo_recipes.preflight.account import (
    account_data,
    account_findings,
    account_lines,
    dropped_findings,
    reader_lines,
    token_lines,
)
from dpo_recipes.preflight.findings import THRESHOLDS, Finding, finding_lines, judge, judged, set_thresholds
from dpo_recipes.preflight.memory import plan_lines
from dpo_recipes.preflight.tokens import (
    MEASURES,
    SPELLED,
    as_plain_text,
    describe,
    describe_prompts,
    fit,
    fit_prompts,
    rendered_pairs,
)
from dpo_recipes.recipe import check_start
from dpo_recipes.terminal import say

_REMEDIES = {
    "too_long": "Raise --max_length.",
    "other_part": "Leave out --part, or give more rows.",
    "prompt_too_long": "Raise --max_prompt_length.",
    "text_too_long": "Raise --max_length.",
    "identical_completions": "If they differ, the chat template leaves out where. Take another template, or other rows "
    'as in recipes/README.md, "Your own data".',
    "template_refuses": "Take a model whose chat template accepts such conversations.",
}


@dataclass
class Measured:
    """The pairs of a recipe, and what the cheap part of the preflight says of them."""

    pairs: DatasetDict  # with the columns of `MEASURES`
    lines: list[str]  # the account for the screen
    data: dict[str, Any]  # for preflight.json
    findings: list[Finding]


def prepare_pairs(
    load_pairs: Callable[[Any], DatasetDict], script_args: Any, training_args: Any, tokenizer: Any
) -> DatasetDict:
    """`train` and `test` pairs that TRL can take as they are, every row of the dataset accounted for.

    Pairs over `max_length` tokens lose their oldest turns, and are dropped where that does not help: TRL then truncates
    and drops nothing. The test split is cut to `eval_pairs`, drawn by seed 0. The account is printed with what there is
    to warn of, and written to `preflight.json` in the output folder.

    Args:
        load_pairs: The recipe's own.
        script_args: Passed to load_pairs.
        training_args: `max_length` (None: any) and `output_dir` are read.
        tokenizer: The one that the trainer is given, with its chat template: `load_tokenizer` puts SFT's in.

    Raises:
        RecipeError: If the tokenizer has no chat template or EOS token, no pair is left to train or to test on, or a
            finding is a failure.
        SystemExit: With status 0 after a dry run, which writes nothing.
    """
    return _account_for(measure_pairs, load_pairs, script_args, training_args, tokenizer)


def prepare_prompts(
    load_pairs: Callable[[Any], DatasetDict], script_args: Any, training_args: Any, tokenizer: Any
) -> DatasetDict:
    """`train` and `test` prompts for an online trainer, each once, every row of the dataset accounted for.

    A prompt over `max_prompt_length` tokens loses its oldest turns, and is dropped where that does not help; with
    `max_pair_length` the prompts are exactly those that `prepare_pairs` keeps at that `max_length`. Columns beside
    prompt, chosen and rejected are kept for reward functions. The rest is as in `prepare_pairs`. For SFT prompts are
    texts, each with room for an end token within `max_length`, and no answer to them is looked at.

    Args:
        load_pairs: The recipe's own.
        script_args: OnlineArguments, or RecipeArguments for SFT, passed to load_pairs. The reward model that they name
            is checked.
        training_args: `max_length` is read for SFT, else `max_completion_length`, `generation_batch_size` and
            `num_generations`; `output_dir`.
        tokenizer: The one that the trainer is given.

    Raises:
        RecipeError: If the tokenizer has no chat template or EOS token, no prompt is left to train or to test on, a
            prompt leaves no room for an answer, there are too few for a rollout, or the reward model cannot score.
        SystemExit: With status 0 after a dry run, which writes nothing.
    """
    return _account_for(measure_prompts, load_pairs, script_args, training_args, tokenizer)


def _account_for(measure: Callable[..., Measured], load_pairs: Any, script_args: Any, *others: Any) -> DatasetDict:
    """What `measure` kept, once the account was printed and written and every failure refused."""
    training_args, tokenizer = others
    if getattr(script_args, "dataset_streaming", False):
        raise RecipeError(
            "dataset_streaming is true, but every row is counted before training, which needs them all. Leave it out; "
            f"a part of a large dataset is {script_args.dataset_name}:50000."
        )
    state = PartialState()
    measured: Measured | RecipeError
    # One process fills the map caches, first of all nodes and then of each; the others read them. An error waits until
    # all have come by, lest they hang.
    with state.main_process_first(), state.local_main_process_first():
        try:
            if state.is_main_process and not getattr(script_args, "dry_run", False):
                check_start(getattr(script_args, "settings", {}), training_args)
            measured = measure(load_pairs, script_args, training_args, tokenizer)
        except RecipeError as error:
            measured = error
    if isinstance(measured, RecipeError):
        raise measured
    pairs = measured.pairs.remove_columns([name for name in measured.pairs["train"].column_names if name in MEASURES])
    if getattr(script_args, "dry_run", False):
        lines = [*measured.lines, *finding_lines(measured.findings)]
        say("\n".join([*lines, *plan_lines(script_args, training_args, tokenizer, pairs)]))
        raise SystemExit(0)
    if state.is_main_process:
        claim(training_args.output_dir)
        path = write_json(Path(training_args.output_dir) / "preflight.json", measured.data)
        say("\n".join([*measured.lines, *finding_lines(measured.findings), f"The first rows of each kind: {path}"]))
    refuse_failures(measured.findings)
    return pairs


def measure_pairs(
    load_pairs: Callable[[Any], DatasetDict], script_args: Any, training_args: Any, tokenizer: Any
) -> Measured:
    """The cheap part of the preflight: rows, tokens and chat template; the arguments are those of `prepare_pairs`.

    Raises:
        RecipeError: If the tokenizer has no chat template or EOS token, or no pair is left to train or to test on.
    """
    thresholds = thresholds_of(script_args, training_args)
    with Ledger() as ledger:
        pairs = _load(load_pairs, script_args)
        tokenizer = tokenizer_to_measure(tokenizer, pairs=pairs["train"])
        pairs = _with_controls_as_text(pairs, script_args, tokenizer)
        max_length = training_args.max_length
        fitted = {split: fit(pairs[split], tokenizer, max_length, split=split) for split in ("train", "test")}
        pairs = drop_prompts_in_test(DatasetDict(fitted), stage="preflight")  # shortened prompts may have become equal
        pairs["test"] = _draw_eval_pairs(pairs["test"], script_args)
        for split in pairs:
            ledger.accounts[split].shortened = sum(tokens > 0 for tokens in pairs[split]["cut_tokens"][:])
    account = account_lines(ledger, limit="" if max_length is None else f"max_length {max_length}")
    account += reader_lines(ledger)
    _refuse_empty(pairs, ledger, account)
    data = account_data(ledger, name=script_args.dataset_name, max_length=max_length)
    data |= {"model": tokenizer.name_or_path, "chat_template": tokenizer.chat_template is not None}
    data["prompts"] = {split: digest(rows) for split, rows in pairs.items()}
    data["tokens"] = {split: describe(rows, account=ledger.accounts[split]) for split, rows in pairs.items()}
    data["rendered"] = rendered_pairs(pairs["train"], tokenizer, split="train")
    check_model(tokenizer, training_args, script_args, data["tokens"])
    findings = account_findings(ledger, data, thresholds)
    lines = [*account, *token_lines(data["tokens"])]
    return Measured(pairs, lines, data | {"thresholds": thresholds} | judged(findings), findings)


def measure_prompts(
    load_pairs: Callable[[Any], DatasetDict], script_args: Any, training_args: Any, tokenizer: Any
) -> Measured:
    """What `measure_pairs` is to pairs; the arguments are those of `prepare_prompts`.

    Raises:
        RecipeError: For every reason that `prepare_prompts` has but a finding.
    """
    thresholds, is_sft = thresholds_of(script_args, training_args), isinstance(training_args, SFTConfig)
    as_pairs = None if is_sft else script_args.max_pair_length
    limit = "max_length" if is_sft else "max_pair_length" if as_pairs else "max_prompt_length"
    longest = getattr(training_args if is_sft else script_args, limit)
    room, what = (longest and longest - 1, "text") if is_sft else (longest, "prompt")
    with Ledger() as ledger:
        pairs = _load(load_pairs, script_args)
        tokenizer = tokenizer_to_measure(tokenizer, pairs=pairs["train"])
        pairs = _with_controls_as_text(pairs, script_args, tokenizer)
        if as_pairs:
            pairs = DatasetDict({split: fit(pairs[split], tokenizer, as_pairs, split=split) for split in pairs})
        fitted = {split: fit_prompts(pairs[split], tokenizer, room, f"{what}_too_long", split=split) for split in pairs}
        prompts = drop_prompts_in_test(DatasetDict(fitted), stage="preflight")
        prompts["test"] = _draw_eval_pairs(prompts["test"], script_args)
        for split in prompts:
            ledger.accounts[split].shortened = sum(tokens > 0 for tokens in prompts[split]["cut_tokens"][:])
    account = [*account_lines(ledger, limit=f"{limit} {longest}", kept=f"{what}s"), *reader_lines(ledger)]
    _refuse_empty(prompts, ledger, account)
    data = account_data(ledger, name=script_args.dataset_name, max_length=None)
    data |= {limit: longest, "model": tokenizer.name_or_path}
    if not is_sft:
        check_prompts(prompts, script_args, training_args, tokenizer)
        data["reward_model"] = script_args.reward_model_name_or_path
    data["prompts"] = {split: digest(rows) for split, rows in prompts.items()}
    data["tokens"] = {split: describe_prompts(rows) for split, rows in prompts.items()}
    findings = dropped_findings(ledger, thresholds)
    for name in SPELLED:
        count = sum(split[name] for split in data["tokens"].values())
        findings += judge(name, count, ledger.total().kept, thresholds)
    tokens = [data["tokens"][split]["prompt"] for split in prompts]
    lines = [
        f"{label:<54}" + "".join(f"{split[key]:>10,.0f}" for split in tokens)
        for label, key in ((f"tokens of the longest {what}", "max"), (f"  of a {what}, on average", "mean"))
    ]
    return Measured(prompts, [*account, *lines], data | {"thresholds": thresholds} | judged(findings), findings)


def check_model(tokenizer: Any, training_args: Any, script_args: Any, tokens: dict[str, Any]) -> None:
    """Raises RecipeError if the model has no row for a token id, or fewer positions than `max_length`.

    Of a tokenizer that was made in memory, or whose model needs code of its own, nothing is known and nothing checked.
    """
    settings = getattr(script_args, "settings", {})
    options = dict(trust_remote_code=getattr(training_args, "trust_remote_code", False))
    try:
        config = AutoConfig.from_pretrained(
            tokenizer.name_or_path, revision=settings.get("model_revision") or "main", **options
        )
    except (OSError, ValueError):
        return
    used = [tokenizer.pad_token_id, tokenizer.eos_token_id, *(split["largest_id"] for split in tokens.values())]
    largest, rows = max(token for token in used if token is not None), config.get_text_config().vocab_size
    if largest >= rows:
        raise RecipeError(
            f"The tokenizer of {tokenizer.name_or_path} writes token ids up to {largest}, but the model's embedding "
            f"has {rows} rows. Remove the tokens that were added to the tokenizer (a pad token among them), or resize "
            "the model's embedding and save it again: model.resize_token_embeddings(len(tokenizer))."
        )
    context, longest = context_length(config), max(split["longest_pair"] for split in tokens.values())
    if (wanted := training_args.max_length or longest) > context:
        raise RecipeError(
            f"max_length is {wanted} tokens, and {tokenizer.name_or_path} has {context} positions. Set --max_length "
            f"{context} or less."
        )


def check_prompts(prompts: DatasetDict, script_args: Any, training_args: Any, tokenizer: Any) -> None:
    """Nothing, if the prompts can be answered, fill a rollout, and the reward model can score answers to them."""
    rollout = training_args.generation_batch_size // training_args.num_generations
    if len(prompts["train"]) < rollout:
        raise RecipeError(
            f"A rollout is generation_batch_size / num_generations = {rollout} prompts, and there are "
            f"{len(prompts['train'])} to train on. Lower --generation_batch_size, or give more rows."
        )
    options = dict(trust_remote_code=training_args.trust_remote_code)
    options["revision"] = script_args.settings.get("model_revision") or "main"  # TRL takes it for both models
    context = context_length(AutoConfig.from_pretrained(tokenizer.name_or_path, **options))
    longest = training_args.max_completion_length
    tokens = [count for rows in prompts.values() for count in rows["prompt_tokens"][:]]
    if over := sum(count + longest > context for count in tokens):
        flag = "max_length" if script_args.max_pair_length else "max_prompt_length"
        raise RecipeError(
            f"{over:,} of {len(tokens):,} prompts leave no room for an answer of max_completion_length={longest} "
            f"tokens in the {context} of {tokenizer.name_or_path}. Lower --max_completion_length, or have their oldest "
            f"turns go: --{flag} {max(1, context - longest)}."
        )
    if name := script_args.reward_model_name_or_path:
        judge = read_reward_config(name, weights=not script_args.dry_run, **options)
        texts = [prompt for rows in prompts.values() for prompt in rows["prompt"][:]]
        check_reward_model(*judge, texts, max_completion_length=longest)


def thresholds_of(script_args: Any, training_args: Any) -> dict[str, float]:
    """The thresholds in force: those of `--threshold`, else the defaults."""
    # A base model's EOS token is often not the one that its chat template writes: that is what SFT can change.
    lenient = {"without_eos_failure": 1.0} if isinstance(training_args, SFTConfig) else {}
    return set_thresholds(getattr(script_args, "threshold", None), THRESHOLDS | lenient)


def refuse_failures(findings: list[Finding]) -> None:
    """Nothing, if no finding is a failure; else raises RecipeError."""
    if names := [finding.name for finding in findings if finding.level == "failure"]:
        raise RecipeError(
            f"The pairs are not fit to train on: {', '.join(names)}. Mend that, or go on all the same: --threshold "
            + " ".join(f"{name}_failure=1" for name in names)
        )


def _load(load_pairs: Callable[[Any], DatasetDict], script_args: Any) -> DatasetDict:
    """The splits, the training pairs of another part left out."""
    pairs = load_pairs(script_args)
    if set(pairs) != {"train", "test"}:
        raise RecipeError(f"load_pairs returned the splits {list(pairs)}, needs train and test: end it in split_pairs.")
    for rows in pairs.values():
        if not {"prompt", "chosen", "rejected"} <= set(rows.column_names):
            raise RecipeError(
                f"load_pairs returned the columns {rows.column_names}, needs prompt, chosen and rejected: pass the "
                "rows through a dataset adapter."
            )
    pairs["train"] = keep_part(pairs["train"], getattr(script_args, "part", None))
    return pairs


def tokenizer_to_measure(tokenizer: Any, *, pairs: Dataset) -> Any:
    """A copy, for plain text without a chat template: measuring must not change the trainer's."""
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


def _with_controls_as_text(pairs: DatasetDict, script_args: Any, tokenizer: Any) -> DatasetDict:
    if not getattr(script_args, "control_tokens_as_text", False):
        return pairs
    return DatasetDict({split: as_plain_text(rows, tokenizer) for split, rows in pairs.items()})


def _draw_eval_pairs(test: Dataset, script_args: Any) -> Dataset:
    size = getattr(script_args, "eval_pairs", None)
    if size is not None and size < 1:
        raise RecipeError(f"eval_pairs is {size}, but evaluation needs pairs. Ask for one or more: --eval_pairs 512.")
    if size is None or size >= len(test):
        return test
    current_ledger().record("eval_pairs", "test", came=len(test), kept=size, not_sampled=len(test) - size)
    return test.select(sorted(random.Random(0).sample(range(len(test)), size)))


def _refuse_empty(pairs: DatasetDict, ledger: Ledger, account: list[str]) -> None:
    for split, purpose in (("train", "train on"), ("test", "evaluate on")):
        if len(pairs[split]):
            continue
        dropped = ledger.accounts[split].dropped if split in ledger.accounts else {}
        reason = max(dropped, key=lambda name: dropped[name].count, default="")
        remedy = _REMEDIES.get(reason, 'See recipes/README.md, "Your own data".')
        if not reason:
            remedy = "Give more rows, with two prompts or more, or name a split with --dataset_test_split."
        raise RecipeError("\n".join([f"No usable pair is left to {purpose}. {remedy}", *account]))
