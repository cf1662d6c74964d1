"""The account of every row: what came in, what was kept, and under which reason the rest was dropped."""

from collections.abc import Mapping, Sequence
from contextvars import ContextVar, Token
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
        self._token: Token[Ledger | None] | None = None

    def __enter__(self) -> "Ledger":
        """This ledger, open."""
        self._token = _open_ledger.set(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        """The ledger that was open before is open again."""
        if self._token is not None:
            _open_ledger.reset(self._token)

    def record(
        self,
        stage: str,
        split: str,
        *,
        came: int,
        kept: int,
        dropped: Mapping[str, Sequence[int]] | None = None,
        moved: int = 0,
        not_sampled: int = 0,
        in_pairs: int = 0,
        pairs_made: int = 0,
        new: bool = False,
    ) -> None:
        """One stage of one split: `came` rows came in and `kept` went on.

        Args:
            stage: Who is counting.
            split: Whose rows.
            came: Rows that came in.
            kept: Rows that went on.
            dropped: Row numbers by reason.
            moved: Rows that came from another split (negative: went to another).
            not_sampled: Rows left out by drawing a sample.
            in_pairs: Rows that are messages, and part of the pairs made.
            pairs_made: Pairs made of those; where there are any, `kept` counts pairs.
            new: Whether no stage has seen the rows before. Otherwise they are those that earlier stages kept, and a
                difference is put down to what load_pairs did in between.

        Raises:
            RuntimeError: If the stage does not add up.
        """
        dropped = dropped or {}
        if came + pairs_made + moved != kept + in_pairs + not_sampled + sum(map(len, dropped.values())):
            raise RuntimeError(
                f"{stage} lost rows of {split}: {came=} {pairs_made=} {moved=} {kept=} {in_pairs=} {not_sampled=} "
                f"{dropped=}"
            )
        account = self.accounts.setdefault(split, SplitAccount())
        expected = 0 if new else account.kept
        account.rows += max(0, came - expected)
        if came < expected:
            account.drop("removed_by_load_pairs", Dropped(expected - came, stage, []))
        account.kept += kept - expected
        account.moved += moved
        account.not_sampled += not_sampled
        account.in_pairs += in_pairs
        account.pairs_made += pairs_made
        for reason, rows in dropped.items():
            account.drop(reason, Dropped(len(rows), stage, list(rows[:3])))

    def add(self, other: "Ledger") -> None:
        """Adds the account of other rows: those of a dataset that was accounted for by itself."""
        for split, account in other.accounts.items():
            self.accounts.setdefault(split, SplitAccount()).add(account)

    def total(self) -> SplitAccount:
        """All splits together.

        Raises:
            RuntimeError: If the account of a split does not add up.
        """
        total = SplitAccount()
        for split, account in self.accounts.items():
            dropped = sum(drop.count for drop in account.dropped.values())
            came = account.rows + account.pairs_made + account.moved
            if came != account.kept + account.in_pairs + account.not_sampled + dropped:
                raise RuntimeError(f"The account of the {split} split does not add up: {account}")
            total.add(account)
        return total


_open_ledger: ContextVar[Ledger | None] = ContextVar("open_ledger", default=None)


def current_ledger() -> Ledger:
    """The open ledger, or one that nobody reads."""
    return _open_ledger.get() or Ledger()
