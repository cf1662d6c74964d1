"""The account of every row: what came in, what was kept, and under which reason the rest was dropped.

How a count reaches the preflight: the preflight calls the recipe's `load_pairs` inside `with Ledger() as ledger:`.
Each function that handles rows there (`load_rows`, `adapt`, `split_pairs`, `fit`) takes datasets and returns datasets;
its counts go to the ledger of that block by `current_ledger().record(...)`. Then the preflight prints the ledger.
"""

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

HELD_OUT = 0.05
"""Share of the prompts that are held out where the data has no test split; 1 holds out all, as `evaluate` does."""


@dataclass
class Dropped:
    """Rows that were dropped for one reason."""

    count: int
    counted_by: str  # the stage that dropped them
    first: list[str]  # up to three rows, as `row_names` names them


@dataclass
class SplitAccount:
    """Account of one split: rows + pairs_made + moved = kept + in_pairs + not_sampled + all dropped rows."""

    rows: int = 0
    in_pairs: int = 0  # rows that are messages, and part of the pairs made
    pairs_made: int = 0  # of such rows
    moved: int = 0  # pairs that came from another split (negative: went to another)
    not_sampled: int = 0
    dropped: dict[str, Dropped] = field(default_factory=dict)
    kept: int = 0
    shortened: int = 0  # of those kept

    def adds_up(self) -> bool:
        """Returns True if every row that came in is accounted for."""
        dropped = sum(drop.count for drop in self.dropped.values())
        return self.rows + self.pairs_made + self.moved == self.kept + self.in_pairs + self.not_sampled + dropped

    def add(self, more: "SplitAccount") -> None:
        """Adds another account to this one."""
        for name in ("rows", "in_pairs", "pairs_made", "moved", "not_sampled", "kept", "shortened"):
            setattr(self, name, getattr(self, name) + getattr(more, name))
        for reason, drop in more.dropped.items():
            held = self.dropped.setdefault(reason, replace(drop, count=0, first=[]))
            held.count, held.first = held.count + drop.count, [*held.first, *drop.first][:3]


class Ledger:
    """The accounts of all splits, filled by the functions that handle rows inside `with Ledger() as ledger:`.

    `held_out` is the setting of that name, which `split_pairs` reads here: the share of the prompts to hold out.
    """

    def __init__(self, held_out: float = HELD_OUT) -> None:
        self.held_out = held_out
        self.accounts: dict[str, SplitAccount] = {}
        self.read_by: list[str] = []  # dataset adapters
        self.unread: dict[str, dict[str, int]] = {}  # by column: `rows` with text that nobody reads, `of` all

    def __enter__(self) -> "Ledger":
        """Makes this ledger the current one."""
        self._outer = _current.set(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Makes the ledger of the block outside, if there is one, current again."""
        _current.reset(self._outer)

    def record(
        self,
        stage: str,
        split: str,
        *,
        came: int,
        kept: int,
        dropped: Mapping[str, Sequence[str]] | None = None,
        new: bool = False,
        **counts: int,
    ) -> None:
        """Adds one stage of one split: `came` rows came in and `kept` rows went on.

        Args:
            stage: The function that counts.
            split: Name of the split.
            came: Rows that came in.
            kept: Rows that went on.
            dropped: Names of rows, by reason.
            new: True for rows that no stage has seen before. Otherwise the rows are expected to be those that earlier
                stages kept, and a difference is put down to what load_pairs did in between.
            **counts: `moved`, `not_sampled`, `in_pairs` or `pairs_made`, as a SplitAccount has them. Where pairs are
                made, `kept` counts pairs.

        Raises:
            RuntimeError: If the stage does not add up.
        """
        reasons = {reason: Dropped(len(rows), stage, list(rows[:3])) for reason, rows in (dropped or {}).items()}
        change = SplitAccount(rows=came, kept=kept, dropped=reasons, **counts)
        if not change.adds_up():
            raise RuntimeError(f"{stage} lost rows of {split}: {change}")
        account = self.accounts.setdefault(split, SplitAccount())
        if new and stage != "load_rows" and stage not in self.read_by:
            self.read_by.append(stage)
        if not new:
            expected, account.kept = account.kept, 0
            change.rows = max(0, came - expected)
            if came < expected:
                change.dropped["removed_by_load_pairs"] = Dropped(expected - came, stage, [])
        account.add(change)

    def note_unread(self, column: str, rows: int, of: int) -> None:
        """Adds to the number of rows in which a column holds text that reaches no token."""
        if rows:
            found = self.unread.setdefault(column, {"rows": 0, "of": 0})
            found["rows"] += rows
            found["of"] += of

    def add(self, other: "Ledger") -> None:
        """Adds the ledger of another dataset, which was accounted for by itself."""
        for split, account in other.accounts.items():
            self.accounts.setdefault(split, SplitAccount()).add(account)
        self.read_by += [name for name in other.read_by if name not in self.read_by]
        for column, found in other.unread.items():
            self.note_unread(column, **found)

    def total(self) -> SplitAccount:
        """The sum of all splits.

        Raises:
            RuntimeError: If the account of a split does not add up.
        """
        total = SplitAccount()
        for split, account in self.accounts.items():
            if not account.adds_up():
                raise RuntimeError(f"The account of the {split} split does not add up: {account}")
            total.add(account)
        return total


_current: ContextVar[Ledger] = ContextVar("current_ledger")


def current_ledger() -> Ledger:
    """Returns the ledger of the innermost `with Ledger()` around the call; outside of one, a ledger nobody reads."""
    return _current.get(None) or Ledger()
