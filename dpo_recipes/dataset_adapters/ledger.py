"""The account of every row: what came in, what was kept, and under which reason the rest was dropped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass
class Dropped:
    """Rows that were dropped for one reason."""

    count: int
    counted_by: str  # the stage that dropped them
    first: list[int]  # up to three row numbers, from 0, in the dataset that this stage was given


@dataclass
class SplitAccount:
    """What became of one split: rows + pairs_made + moved = kept + in_pairs + not_sampled + everything dropped."""

    rows: int = 0
    in_pairs: int = 0  # rows that are messages, and part of the pairs made
    pairs_made: int = 0  # of such rows
    moved: int = 0  # pairs that came from another split (negative: went to another)
    not_sampled: int = 0
    dropped: dict[str, Dropped] = field(default_factory=dict)
    kept: int = 0
    shortened: int = 0  # of those kept

    def adds_up(self) -> bool:
        """Whether every row that came in is accounted for."""
        dropped = sum(drop.count for drop in self.dropped.values())
        return self.rows + self.pairs_made + self.moved == self.kept + self.in_pairs + self.not_sampled + dropped

    def add(self, more: "SplitAccount") -> None:
        """Adds another account to this one."""
        for name in ("rows", "in_pairs", "pairs_made", "moved", "not_sampled", "kept", "shortened"):
            setattr(self, name, getattr(self, name) + getattr(more, name))
        for reason, dropped in more.dropped.items():
            self.drop(reason, dropped)

    def drop(self, reason: str, more: Dropped) -> None:
        """Adds to a reason; the rows named stay those of the stage that met it first."""
        before = self.dropped.get(reason, Dropped(0, more.counted_by, more.first))
        self.dropped[reason] = Dropped(before.count + more.count, before.counted_by, before.first)


class Ledger:
    """The account of every row, filled by whatever handles rows inside `with Ledger() as ledger:`."""

    def __init__(self) -> None:
        self.accounts: dict[str, SplitAccount] = {}
        self.read_by: list[str] = []  # dataset adapters
        self.unread: dict[str, dict[str, int]] = {}  # by column: `rows` with text that nobody reads, `of` all

    def __enter__(self) -> "Ledger":
        """This ledger, open."""
        _open_ledgers.append(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        """The ledger that was open before is open again."""
        _open_ledgers.pop()

    def record(
        self,
        stage: str,
        split: str,
        *,
        came: int,
        kept: int,
        dropped: Mapping[str, Sequence[int]] | None = None,
        new: bool = False,
        **counts: int,
    ) -> None:
        """One stage of one split: `came` rows came in and `kept` went on.

        Args:
            stage: Who is counting.
            split: Whose rows.
            came: Rows that came in.
            kept: Rows that went on.
            dropped: Row numbers by reason.
            new: Whether no stage has seen the rows before. Otherwise they are those that earlier stages kept, and a
                difference is put down to what load_pairs did in between.
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
                account.drop("removed_by_load_pairs", Dropped(expected - came, stage, []))
        account.add(change)

    def add(self, other: "Ledger") -> None:
        """Adds the account of other rows: those of a dataset that was accounted for by itself."""
        for split, account in other.accounts.items():
            self.accounts.setdefault(split, SplitAccount()).add(account)
        self.read_by += [name for name in other.read_by if name not in self.read_by]
        for column, found in other.unread.items():
            self.note_unread(column, found["rows"], found["of"])

    def note_unread(self, column: str, rows: int, of: int) -> None:
        """Adds to the rows in which a column holds text that reaches no token."""
        if rows:
            found = self.unread.setdefault(column, {"rows": 0, "of": 0})
            found["rows"] += rows
            found["of"] += of

    def total(self) -> SplitAccount:
        """All splits together.

        Raises:
            RuntimeError: If the account of a split does not add up.
        """
        total = SplitAccount()
        for split, account in self.accounts.items():
            if not account.adds_up():
                raise RuntimeError(f"The account of the {split} split does not add up: {account}")
            total.add(account)
        return total


_open_ledgers: list[Ledger] = []


def current_ledger() -> Ledger:
    """The open ledger, or one that nobody reads."""
    return _open_ledgers[-1] if _open_ledgers else Ledger()
