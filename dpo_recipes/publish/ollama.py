"""Reads, renders and writes Ollama's Modelfile: the part of Go's templates that chat templates use."""

import json
import re
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from dpo_recipes.errors import RecipeError

Messages = Sequence[Mapping[str, str]]
Nodes = list[tuple[Any, ...]]
"""Parts of a template: ("text", t), ("show", words), ("set", name, words), ("if" or "range", head, nodes, others)."""
WORD = re.compile(r'"(?:\\.|[^"\\])*"|`[^`]*`|\$?[\w.]+|\$|:=|[=()|,]|\S')
FUNCTIONS = {
    "eq": lambda one, *others: any(one == other for other in others),
    "ne": lambda one, other: one != other,
    "lt": lambda one, other: one < other,
    "le": lambda one, other: one <= other,
    "gt": lambda one, other: one > other,
    "ge": lambda one, other: one >= other,
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "or": lambda *values: next((value for value in values if value), values[-1]),
    "not": lambda value: not value,
    "len": len,
    "slice": lambda values, start=0, end=None: values[start:end],
    "index": lambda values, at: values[at],
    "json": json.dumps,
    "true": True,
    "false": False,
}


class _Next(Exception):
    """Ends one pass of a `range`."""


class _Cut(Exception):
    """Ends the rendering where the model's answer begins."""


@dataclass
class Modelfile:
    """The instructions of a Modelfile that change what the model reads and where it stops."""

    template: str = ""
    system: str = ""
    stops: list[str] = field(default_factory=list)


def read_modelfile(text: str) -> Modelfile:
    """Reads TEMPLATE, SYSTEM and the stops; a value may stand in quotes, or over several lines in three of them."""
    found = Modelfile()
    value = r'("""(?P<long>.*?)"""|"(?P<quoted>(?:\\.|[^"\\\n])*)"|(?P<plain>[^\n]*))'
    for line in re.finditer(rf"^[ \t]*(TEMPLATE|SYSTEM|PARAMETER[ \t]+stop)[ \t]+{value}", text, re.M | re.S | re.I):
        held = next((line[name] for name in ("long", "quoted", "plain") if line[name] is not None), "")
        if line[1].upper() == "TEMPLATE":
            found.template = held
        elif line[1].upper() == "SYSTEM":
            found.system = held
        else:
            found.stops.append(held)
    return found


def render(modelfile: Modelfile, messages: Messages) -> str:
    """The text that Ollama gives to the model for a conversation.

    A template with `.Messages` gets the conversation at once. One without is filled for each exchange, and its last
    part ends where `.Response` stands.

    Raises:
        RecipeError: If the template holds something that is not known here.
    """
    try:
        return _render(modelfile, messages)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise RecipeError(f"The TEMPLATE of the Modelfile cannot be rendered: {error}.") from error


def _render(modelfile: Modelfile, messages: Messages) -> str:
    nodes = _parse(modelfile.template)
    if modelfile.system and not any(message["role"] == "system" for message in messages):
        messages = [{"role": "system", "content": modelfile.system}, *messages]
    turns = [{"Role": message["role"], "Content": message["content"]} for message in messages]
    system = "\n\n".join(turn["Content"] for turn in turns if turn["Role"] == "system")
    if ".Messages" in modelfile.template:
        return "".join(_fill(nodes, {"System": system, "Messages": turns, "Response": ""}))
    written, now = "", {"System": "", "Prompt": "", "Response": ""}
    names = {"system": "System", "user": "Prompt", "assistant": "Response"}
    for turn in turns:
        name = names[turn["Role"]]
        if now["Response"] or (name == "System" and now["Prompt"]):
            written += "".join(_fill(nodes, now))
            now = {"System": "", "Prompt": "", "Response": ""}
        now[name] = turn["Content"]
    parts: list[str] = []
    with suppress(_Cut):
        _fill(nodes, now | {"Response": _Cut}, parts)
    return written + "".join(parts)


def _parse(template: str) -> Nodes:
    """The nodes of a template; white space beside `{{-` and `-}}` is removed."""
    template = re.sub(r"\{\{/\*.*?\*/\}\}", "", template, flags=re.S)
    template = re.sub(r"\s*\{\{-(?=\s)", "{{", template)
    template = re.sub(r"(?<=\s)-\}\}\s*", "}}", template)
    parts = deque(enumerate(re.split(r"\{\{(.*?)\}\}", template, flags=re.S)))
    nodes, _ = _block(parts)
    return nodes


def _block(parts: deque[tuple[int, str]]) -> tuple[Nodes, list[str]]:
    """Nodes up to the `else` or `end` that closes them, and the words of that action."""
    nodes: Nodes = []
    while parts:
        number, part = parts.popleft()
        words = WORD.findall(part)
        if number % 2 == 0:
            nodes.append(("text", part))
        elif words[0] in ("else", "end"):
            return nodes, words
        elif words[0] in ("if", "range"):
            nodes.append(_branch(words, parts))
        elif len(words) > 2 and words[0].startswith("$") and words[1] in (":=", "="):
            nodes.append(("set", words[0], words[2:]))
        else:
            nodes.append(("show", words))
    return nodes, ["end"]


def _branch(words: list[str], parts: deque[tuple[int, str]]) -> tuple[Any, ...]:
    inner, closed = _block(parts)
    others: Nodes = []
    if closed[:2] == ["else", "if"]:
        others = [_branch(closed[1:], parts)]
    elif closed == ["else"]:
        others, _ = _block(parts)
    return words[0], words[1:], inner, others


def _fill(nodes: Nodes, root: Mapping[str, Any], written: list[str] | None = None) -> list[str]:
    """Texts of the nodes, filled from the root."""
    written = [] if written is None else written
    _run(nodes, root, {"$": root}, written)
    return written


def _run(nodes: Nodes, dot: Any, names: dict[str, Any], written: list[str]) -> None:
    for kind, *rest in nodes:
        if kind == "text":
            written.append(rest[0])
        elif kind == "set":
            names[rest[0]] = _value(deque(rest[1]), dot, names)
        elif rest == [["continue"]]:
            raise _Next
        elif kind == "show":
            value = _value(deque(rest[0]), dot, names)
            written.append(str(value).lower() if isinstance(value, bool) else str(value))
        elif kind == "if":
            head, inner, others = rest
            _run(inner if _value(deque(head), dot, names) else others, dot, names, written)
        else:
            head, inner, others = rest
            _repeat(head, inner, others, dot, names, written)


def _repeat(head: list[str], inner: Nodes, others: Nodes, dot: Any, names: dict[str, Any], written: list[str]) -> None:
    variables = []
    if ":=" in head:
        at = head.index(":=")
        variables, head = [word for word in head[:at] if word != ","], head[at + 1 :]
    values = _value(deque(head), dot, names)
    for number, value in enumerate(values or ()):
        own = dict(zip(variables[-2:], (number, value) if len(variables) > 1 else (value,), strict=False))
        with suppress(_Next):
            _run(inner, value, names | own, written)
    if not values:
        _run(others, dot, names, written)


def _value(words: deque[str], dot: Any, names: Mapping[str, Any]) -> Any:
    """Value of a pipeline, up to its end or a closing bracket."""
    passed: list[Any] = []
    while True:
        terms: list[Any] = []
        while words and words[0] not in (")", "|"):
            if (word := words.popleft()) == "(":
                terms.append(_value(words, dot, names))
                words.popleft()
            else:
                terms.append(_term(word, dot, names))
        first, *others = [*terms, *passed]
        result = first(*others) if callable(first) else first
        if not words or words[0] == ")":
            return result
        words.popleft()
        passed = [result]


def _term(word: str, dot: Any, names: Mapping[str, Any]) -> Any:
    if word[0] == '"':
        return json.loads(word)
    if word[0] == "`":
        return word[1:-1]
    if re.fullmatch(r"-?\d+", word):
        return int(word)
    if word in FUNCTIONS:
        return FUNCTIONS[word]
    name, *path = word.split(".")
    if not (name == "" or name in names):
        raise ValueError(f"{word} is not known here")
    value = names[name] if name else dot
    for key in filter(None, path):
        value = value.get(key, "")
        if value is _Cut:
            raise _Cut
    return value


def turnwise(parts: Mapping[str, tuple[str, str]], beginning: str) -> str:
    """A template in Go that writes each turn between the two texts of its role, and then how an answer begins."""

    def quoted(text: str) -> str:
        return text if "{{" not in text else "{{ " + json.dumps(text, ensure_ascii=False) + " }}"

    roles = [
        f'{{{{ {"else if" if number else "if"} eq .Role "{role}" }}}}{quoted(before)}{{{{ .Content }}}}{quoted(after)}'
        for number, (role, (before, after)) in enumerate(parts.items())
    ]
    return f"{{{{ range .Messages }}}}{''.join(roles)}{{{{ end }}}}{{{{ end }}}}{quoted(beginning)}"
