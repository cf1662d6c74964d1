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
    """What became of the rows of one split: rows + moved = kept + not_sampled + everything dropped."""

    rows: int = 0
    moved: int = 0  # pairs that came from another split (negative: went to another)
    not_sampled: int = 0
    dropped: dict[str, Dropped] = field(default_factory=dict)
    kept: int = 0
    shortened: int = 0  # of those kept

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
            new: Whether no stage has seen the rows before. Otherwise they are those that earlier stages kept, and a
                difference is put down to what load_pairs did in between.

        Raises:
            RuntimeError: If the stage does not add up.
        """
        dropped = dropped or {}
        if came + moved != kept + not_sampled + sum(map(len, dropped.values())):
            raise RuntimeError(f"{stage} lost rows of {split}: {came=} {moved=} {kept=} {not_sampled=} {dropped=}")
        account = self.accounts.setdefault(split, SplitAccount())
        expected = 0 if new else account.kept
        account.rows += max(0, came - expected)
        if came < expected:
            account.drop("removed_by_load_pairs", Dropped(expected - came, stage, []))
        account.kept += kept - expected
        account.moved += moved
        account.not_sampled += not_sampled
        for reason, rows in dropped.items():
            account.drop(reason, Dropped(len(rows), stage, list(rows[:3])))

    def total(self) -> SplitAccount:
        """All splits together.

        Raises:
            RuntimeError: If the account of a split does not add up.
        """
        total = SplitAccount()
        for split, account in self.accounts.items():
            dropped = sum(drop.count for drop in account.dropped.values())
            if account.rows + account.moved != account.kept + account.not_sampled + dropped:
                raise RuntimeError(f"The account of the {split} split does not add up: {account}")
            for name in ("rows", "moved", "not_sampled", "kept", "shortened"):
                setattr(total, name, getattr(total, name) + getattr(account, name))
            for reason, drop in account.dropped.items():
                total.drop(reason, drop)
        return total


_open_ledger: ContextVar[Ledger | None] = ContextVar("open_ledger", default=None)


def current_ledger() -> Ledger:
    """The open ledger, or one that nobody reads."""
    return _open_ledger.get() or Ledger()
