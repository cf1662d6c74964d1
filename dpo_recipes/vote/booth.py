"""Finds the pair that a voter sees next, and keeps what a click means. Both follow from the votes on disk."""

import hashlib
import html
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_recipes.terminal import shown
from dpo_recipes.vote.log import SIDES, UNDO, VoteLog, standing

PLACES = ("Answer 1", "Equal", "Answer 2")


class Booth:
    """The pairs, in one order for all voters, and their votes."""

    def __init__(self, pairs: Sequence[Mapping[str, Any]], log: VoteLog) -> None:
        self.pairs = {pair["pair"]: pair for pair in sorted(pairs, key=lambda each: str(each["pair"]))}  # by a hash
        self.log = log

    def sides(self, voter: str, pair: str) -> tuple[str, str]:
        """The sides of Answer 1 and Answer 2, drawn once for each voter and pair."""
        drawn = hashlib.sha256(f"{voter}\0{pair}".encode()).digest()[0] % 2
        return (SIDES[drawn], SIDES[1 - drawn])

    def done(self, voter: str) -> list[str]:
        """Pairs on which the voter has voted, in the order of the votes."""
        return [pair for name, pair in standing(self.log.votes) if name == voter and pair in self.pairs]

    def next(self, voter: str) -> str:
        """The first pair on which the voter has not voted; empty if there is none."""
        done = {*self.done(voter)}
        return next((pair for pair in self.pairs if pair not in done), "")

    def cast(self, voter: str, pair: str, choice: str, answered: Mapping[str, str | None]) -> None:
        """Keeps a vote on a pair, or takes the voter's last one back."""
        if choice == UNDO:
            if done := self.done(voter):
                self.log.append(voter=voter, pair=done[-1], vote=UNDO)
        elif pair in self.pairs:
            first, second = self.sides(voter, pair)
            by_place = {"first": first, "second": second, **dict(zip(PLACES, (first, "tie", second), strict=True))}
            given = {name: by_place[place] for name, place in answered.items() if place in by_place}
            self.log.append(voter=voter, pair=pair, vote=by_place.get(choice, choice), first=first, questions=given)


def draw(booth: Booth, voter: str, key: str) -> str:
    """The HTML of a pair and of the voter's progress, in which every text is escaped."""
    done, total = len(booth.done(voter)), len(booth.pairs)
    progress = (
        f'<progress max="{total}" value="{done}"></progress><p class="soft">{done} of {total}, {_text(voter)}</p>'
    )
    drawn = f"<header>{progress}</header>"
    if not key:
        return f"{drawn}<h1>That was the last pair. Thank you.</h1><p>Undo shows it again.</p>"
    pair = booth.pairs[key]
    drawn += f'<div class="prompt">{_prompt(pair["prompt"])}</div><div class="answers">'
    for place, side in enumerate(booth.sides(voter, key), start=1):
        text = _text(pair[side]) or "<i>(empty)</i>"
        drawn += f'<section class="answer"><h2>Answer {place}</h2><p class="text">{text}</p></section>'
    return f"{drawn}</div>"


def _prompt(prompt: Any) -> str:
    """The turns of a prompt; the role of its only turn goes without saying."""
    turns = [{"role": "", "content": prompt}] if isinstance(prompt, str) else prompt
    roles = [f"<small>{_text(turn['role'])}</small>" if len(turns) > 1 else "" for turn in turns]
    return "".join(
        f'<p class="text">{role}{_text(turn["content"])}</p>' for role, turn in zip(roles, turns, strict=True)
    )


def _text(text: Any) -> str:
    """Text as HTML that shows it as it is; no brace or dollar sign is left that Gradio's templates could read."""
    escaped = html.escape(shown(str(text or "")))
    return escaped.translate({ord(sign): f"&#{ord(sign)};" for sign in "{}$@`"})
