"""The account of rows and tokens, for the screen and for preflight.json, and the findings in it."""

import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from datasets import DatasetDict

from dpo_recipes.dataset_adapters.adapting import DROP_CHOICES, DROP_REASONS
from dpo_recipes.dataset_adapters.ledger import Ledger, SplitAccount
from dpo_recipes.errors import RecipeError
from dpo_recipes.estimates import wilson
from dpo_recipes.loading import digest
from dpo_recipes.preflight.findings import CHECKS, Finding, judge
from dpo_recipes.preflight.tokens import FAULTS, Unit, describe

_SHOWN_REASONS = 5  # on the screen; preflight.json has them all
_SHOWN_COLUMNS = 6


def account_lines(ledger: Ledger, *, limit: str, kept: str = "pairs") -> list[str]:
    """The account for the screen: one line a kind of row, one column a split, at most 14 lines.

    Args:
        ledger: Holds the account of all rows.
        limit: The setting by which rows are too long, with its value in tokens; "" for none.
        kept: Name of the rows that are left.
    """
    splits = [split for split in ("train", "test") if split in ledger.accounts]
    accounts = [ledger.accounts[split] for split in splits]
    lines = [_line(f"Data account ({limit} tokens)" if limit else "Data account", splits)]

    def add(label: str, numbers: Iterable[int], *, sign: str = "", if_any: bool = False) -> None:
        numbers = list(numbers)
        if any(numbers) or not if_any:
            lines.append(_line(label, [f"{number:{sign},}" if number else "-" for number in numbers]))

    add("rows", (account.rows for account in accounts))
    dropped = ledger.total().dropped
    reasons = sorted(dropped, key=lambda reason: -dropped[reason].count)
    for reason in reasons[:_SHOWN_REASONS]:
        add(f"  {_phrase(reason)}", (-_count(account, reason) for account in accounts))
    rest = reasons[_SHOWN_REASONS:]
    others = (-sum(_count(account, reason) for reason in rest) for account in accounts)
    add(f"  {len(rest)} other reasons", others, if_any=True)
    add("  held out of train as test", (account.moved for account in accounts), sign="+", if_any=True)
    add("  left out by drawing a sample", (-account.not_sampled for account in accounts), if_any=True)
    add("  rows that the pairs are made of", (-account.in_pairs for account in accounts), if_any=True)
    add("  pairs made of them", (account.pairs_made for account in accounts), sign="+", if_any=True)
    add(kept, (account.kept for account in accounts))
    add("  of these, shortened by their oldest turns", (account.shortened for account in accounts))
    return lines


def _line(label: str, cells: Iterable[str]) -> str:
    return f"{label:<54}" + "".join(f"{cell:>10}" for cell in cells)


def _count(account: SplitAccount, reason: str) -> int:
    return account.dropped[reason].count if reason in account.dropped else 0


def _phrase(reason: str) -> str:
    return DROP_REASONS.get(reason, reason.replace("_", " "))


def reader_lines(ledger: Ledger) -> list[str]:
    """The dataset adapters that read the rows, and the columns whose text reaches no token."""
    advice = 'other layouts: recipes/README.md, "Your own data"'
    lines = [f"Read by {', '.join(ledger.read_by)} ({advice})."] if ledger.read_by else []
    shares = [f"{column} ({found['rows'] / found['of']:.0%} of rows)" for column, found in ledger.unread.items()]
    more = f" and {len(shares) - _SHOWN_COLUMNS} more" if len(shares) > _SHOWN_COLUMNS else ""
    named = f"Columns in no token: {', '.join(shares[:_SHOWN_COLUMNS])}{more}."
    return lines + textwrap.wrap(named, 79, subsequent_indent="  ") if shares else lines


def token_lines(tokens: Mapping[str, Mapping[str, Any]], *, unit: Unit) -> list[str]:
    """The longest and the mean numbers of tokens of each split, in the columns of `account_lines`."""
    splits = tokens.values()
    rows = {f"tokens of the longest {unit}": [split.get("longest_pair", split["prompt"]["max"]) for split in splits]}
    rows[f"  of a {'prompt' if unit == 'pair' else unit}, on average"] = [split["prompt"]["mean"] for split in splits]
    if unit == "pair":
        means = [(split["chosen"]["mean"] + split["rejected"]["mean"]) / 2 for split in splits]
        rows["  of a completion, on average"] = means
    return [_line(label, (f"{number:,.0f}" for number in numbers)) for label, numbers in rows.items()]


def refuse_empty(pairs: DatasetDict, ledger: Ledger, lines: list[str]) -> None:
    """Raises RecipeError if a split is empty: with the remedy for the most frequent reason, and the account."""
    for split, purpose in (("train", "train on"), ("test", "evaluate on")):
        if split not in pairs or len(pairs[split]):
            continue
        dropped = ledger.accounts.get(split, SplitAccount()).dropped
        reason = max(dropped, key=lambda name: dropped[name].count, default="no_rows")
        fits = f"They do not fit {' or '.join(ledger.read_by)}. The recipe preference-lora takes the layouts of "
        remedy = CHECKS["dropped"]["remedies"].get(reason, fits + 'recipes/README.md, "Your own data".')
        raise RecipeError("\n".join([f"No usable pair is left to {purpose}. {remedy}", *lines]))


def account_data(ledger: Ledger, pairs: DatasetDict) -> dict[str, Any]:
    """The account of rows and tokens for preflight.json, with the meaning of each reason and the first rows of each."""
    total = ledger.total()
    return {
        "read_by": ledger.read_by,
        "unread": ledger.unread,
        "reasons": {reason: _phrase(reason) for reason in total.dropped},
        "splits": {split: asdict(account) for split, account in ledger.accounts.items()},
        "total": asdict(total),
        "prompts": {split: digest(rows) for split, rows in pairs.items()},
        "tokens": {split: describe(rows, account=ledger.accounts[split]) for split, rows in pairs.items()},
    }


def account_findings(ledger: Ledger, data: Mapping[str, Any], thresholds: Mapping[str, float]) -> list[Finding]:
    """The findings about the rows, and about the pairs or prompts as tokens.

    Args:
        ledger: Holds the account of all rows.
        data: `tokens` by split, as `describe` returns them, and for pairs `rendered`, as `rendered_pairs` does.
        thresholds: Shares by name, like THRESHOLDS.
    """
    total, tokens = ledger.total(), data["tokens"].values()
    faults = sum(drop.count for reason, drop in total.dropped.items() if reason not in DROP_CHOICES)
    found = judge("dropped", faults, total.rows, thresholds)
    counts = {name: sum(split.get(name, 0) for split in tokens) for name in FAULTS}
    if "rendered" in data and "train" in data["tokens"]:
        # Only training pairs count: the test pairs that were kept are a sample of those that fit.
        train, at_risk = ledger.accounts["train"], data["tokens"]["train"]["completion_at_risk"]
        words = {"too_long": at_risk - train.shortened, "shortened": train.shortened}
        found += judge("completion_at_risk", at_risk, train.kept + words["too_long"], thresholds, **words)
        held_out = ledger.accounts["test"].kept
        share = wilson(held_out / 2, held_out)
        found += judge("few_held_out", (share.high - share.low) / 2, 1, thresholds, pairs=held_out, share=share)
        has_header = all(pair["generation_prompt"] for pair in data["rendered"])
        counts["no_generation_prompt"] = 0 if has_header else total.kept
    fields: Counter[str] = sum((Counter(split.get("unrendered")) for split in tokens), Counter())
    unrendered = ", ".join(f"{field} in {count / max(total.kept, 1):.0%}" for field, count in fields.most_common())
    for name, count in counts.items():
        found += judge(name, count, total.kept, thresholds, fields=unrendered)
    return found
