"""The account of rows and tokens: for the screen, for preflight.json, and what in it is worth a warning."""

import textwrap
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from dpo_recipes.dataset_adapters.adapting import DROP_CHOICES, DROP_REASONS
from dpo_recipes.dataset_adapters.ledger import Ledger
from dpo_recipes.preflight.findings import Finding, judge
from dpo_recipes.preflight.tokens import FAULTS

_SHOWN_REASONS = 5  # on the screen; preflight.json has them all
_SHOWN_COLUMNS = 6


def account_lines(ledger: Ledger, *, limit: str, kept: str = "pairs") -> list[str]:
    """The account for the screen: one line a kind of row, one column a split, at most 14 lines.

    Args:
        ledger: Of all rows.
        limit: The setting by which rows are too long, with its value in tokens; "" for none.
        kept: What is left in the end.
    """
    accounts = {split: ledger.accounts[split] for split in ("train", "test") if split in ledger.accounts}
    reasons = sorted(ledger.total().dropped.items(), key=lambda item: -item[1].count)

    def line(label: str, count: Callable[[Any], int], *, sign: str = "") -> str:
        numbers = (f"{count(account):{sign},}" if count(account) else "-" for account in accounts.values())
        return f"{label:<54}" + "".join(f"{number:>10}" for number in numbers)

    def dropped(label: str, names: list[str]) -> str:
        return line(f"  {label}", lambda account: -sum(account.dropped[n].count for n in names if n in account.dropped))

    title = f"Data account ({limit} tokens)" if limit else "Data account"
    lines = [f"{title:<54}" + "".join(f"{split:>10}" for split in accounts)]
    lines.append(line("rows", lambda account: account.rows))
    lines += [dropped(_phrase(reason), [reason]) for reason, _ in reasons[:_SHOWN_REASONS]]
    if rest := [reason for reason, _ in reasons[_SHOWN_REASONS:]]:
        lines.append(dropped(f"{len(rest)} other reasons", rest))
    if any(account.moved for account in accounts.values()):
        lines.append(line("  held out of train as test", lambda account: account.moved, sign="+"))
    if any(account.not_sampled for account in accounts.values()):
        lines.append(line("  left out by drawing a sample", lambda account: -account.not_sampled))
    if any(account.pairs_made for account in accounts.values()):
        lines.append(line("  messages that the pairs are made of", lambda account: -account.in_pairs))
        lines.append(line("  pairs made of them", lambda account: account.pairs_made, sign="+"))
    lines.append(line(kept, lambda account: account.kept))
    lines.append(line("  of these, shortened by their oldest turns", lambda account: account.shortened))
    return lines


def reader_lines(ledger: Ledger) -> list[str]:
    """The dataset adapters that read the rows, and the columns whose text they leave out."""
    advice = "other layouts: --columns, recipes/README.md"
    lines = [f"Read by {', '.join(ledger.read_by)} ({advice})."] if ledger.read_by else []
    shares = [f"{column} ({found['rows'] / found['of']:.0%} of rows)" for column, found in ledger.unread.items()]
    more = f" and {len(shares) - _SHOWN_COLUMNS} more" if len(shares) > _SHOWN_COLUMNS else ""
    named = f"Columns in no token: {', '.join(shares[:_SHOWN_COLUMNS])}{more}."
    return lines + textwrap.wrap(named, 79, subsequent_indent="  ") if shares else lines


def account_data(ledger: Ledger, *, name: str | None, max_length: int | None) -> dict[str, Any]:
    """The account for preflight.json, with what each reason means and the first rows of each."""
    total = ledger.total()
    return {
        "dataset": name,
        "max_length": max_length,
        "read_by": ledger.read_by,
        "unread": ledger.unread,
        "reasons": {reason: _phrase(reason) for reason in total.dropped},
        "splits": {split: asdict(account) for split, account in ledger.accounts.items()},
        "total": asdict(total),
    }


def token_lines(tokens: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The tokens of each split, in the columns of `account_lines`."""
    labels = ("tokens of the longest pair", "  of a prompt, on average", "  of a completion, on average")
    columns = [
        [split["longest_pair"], split["prompt"]["mean"], (split["chosen"]["mean"] + split["rejected"]["mean"]) / 2]
        for split in tokens.values()
    ]
    rows = zip(labels, *columns, strict=True)
    return [f"{label:<54}" + "".join(f"{number:>10,.0f}" for number in numbers) for label, *numbers in rows]


def dropped_findings(ledger: Ledger, thresholds: Mapping[str, float]) -> list[Finding]:
    """Whether more rows than usual were dropped by faults of their own."""
    total = ledger.total()
    faults = sum(drop.count for reason, drop in total.dropped.items() if reason not in DROP_CHOICES)
    return judge("dropped", faults, total.rows, thresholds)


def account_findings(ledger: Ledger, data: Mapping[str, Any], thresholds: Mapping[str, float]) -> list[Finding]:
    """What is wrong with the rows, and with the pairs as tokens.

    Args:
        ledger: Of all rows.
        data: With `tokens` by split, as `describe` gives them, and `rendered`, as `rendered_pairs` does.
        thresholds: As `THRESHOLDS` has them.
    """
    total = ledger.total()
    counts = {name: sum(split[name] for split in data["tokens"].values()) for name in FAULTS}
    fields: Counter[str] = sum((Counter(split["unrendered"]) for split in data["tokens"].values()), Counter())
    unrendered = ", ".join(f"{field} in {count / max(total.kept, 1):.0%}" for field, count in fields.most_common())
    counts["no_generation_prompt"] = 0 if all(pair["generation_prompt"] for pair in data["rendered"]) else total.kept
    found = dropped_findings(ledger, thresholds)
    # Of the test pairs, a sample is kept of those that fit.
    train, at_risk = ledger.accounts["train"], data["tokens"]["train"]["completion_at_risk"]
    words = {"too_long": at_risk - train.shortened, "shortened": train.shortened}
    found += judge("completion_at_risk", at_risk, train.kept + words["too_long"], thresholds, **words)
    for name, count in counts.items():
        found += judge(name, count, total.kept, thresholds, fields=unrendered)
    return found


def _phrase(reason: str) -> str:
    return DROP_REASONS.get(reason, reason.replace("_", " "))
