"""Reads, renders and writes Ollama's Modelfile: the part of Go's templates that chat templates use."""

import json
import operator
import re
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from dpo_recipes.errors import RecipeError

Messages = Sequence[Mapping[str, str]]
WORD = re.compile(r'"(?:\\.|[^"\\])*"|`[^`]*`|-?\d+|\$?[\w.]+|\$|:=|[=()|,]|\S')
FUNCTIONS = {
    "eq": lambda one, *others: any(one == other for other in others),
    **{name: getattr(operator, name) for name in ("ne", "lt", "le", "gt", "ge")},
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "or": lambda *values: next((value for value in values if value), values[-1]),
    "not": operator.not_,
    "len": len,
    "slice": lambda values, start=0, end=None: values[start:end],
    "index": operator.getitem,
    "json": json.dumps,
}
JINJA = SandboxedEnvironment(
    undefined=StrictUndefined,
    extensions=["jinja2.ext.loopcontrols"],
    finalize=lambda value: str(value).lower() if isinstance(value, bool) else value,
)


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
        held = line["long"] or line["quoted"] or line["plain"] or ""
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
    except (LookupError, TypeError, ValueError, AttributeError, TemplateError) as error:
        raise RecipeError(f"The TEMPLATE of the Modelfile cannot be rendered: {error}.") from error


def _render(modelfile: Modelfile, messages: Messages) -> str:
    template = modelfile.template
    if modelfile.system and not any(message["role"] == "system" for message in messages):
        messages = [{"role": "system", "content": modelfile.system}, *messages]
    if ".Messages" in template:
        turns = [defaultdict(str, Role=message["role"], Content=message["content"]) for message in messages]
        system = "\n\n".join(turn["Content"] for turn in turns if turn["Role"] == "system")
        return _fill(template, defaultdict(str, System=system, Messages=turns))
    written, now = "", defaultdict[str, str](str)
    for message in messages:
        name = {"system": "System", "user": "Prompt", "assistant": "Response"}[message["role"]]
        if now["Response"] or (name == "System" and now["Prompt"]):
            written += _fill(template, now)
            now.clear()
        now[name] = message["content"]
    return written + _fill(template, now, cut=True)


def _fill(template: str, root: defaultdict[str, Any], *, cut: bool = False) -> str:
    return JINJA.from_string(_as_jinja(template, cut=cut)).render(root=root, dot=root, go=FUNCTIONS, unknown=_unknown)


def _unknown(word: str) -> None:
    raise ValueError(f"{word} is not known here")


def _as_jinja(template: str, *, cut: bool) -> str:
    """Translates a template to Jinja's language; with `cut` it ends before the first mention of `.Response`.

    The dot of Go becomes the variable `dot`, `$` becomes `root`, and `$name` becomes `v.name`.
    """
    template = re.sub(r"\s*\{\{-(?=\s)", "{{", template)
    template = re.sub(r"(?<=\s)-\}\}\s*", "}}", template)
    template = re.sub(r"\{\{\s*/\*.*?\*/\s*\}\}", "", template, flags=re.S)
    opened: list[str] = []
    written = ["{% set v = namespace() %}"]
    for number, part in enumerate(re.split(r"\{\{(.*?)\}\}", template, flags=re.S)):
        words = WORD.findall(part)
        if number % 2 and cut and ".Response" in words:
            break
        written.append(_action(words, opened) if number % 2 else f"{{{{ {part!r} }}}}")
    return "".join([*written, *(f"{{% end{block} %}}" for block in reversed(opened))])


def _action(words: list[str], opened: list[str]) -> str:
    """Translates the words between two pairs of braces; `opened` holds the blocks that were not ended before."""
    match words:
        case ["end"]:
            return f"{{% end{opened.pop()} %}}"
        case ["else" | "continue" | "break" as word]:
            return f"{{% {word} %}}"
        case ["else", "if", *condition]:
            return f"{{% elif {_pipeline(deque(condition))} %}}"
        case ["if", *condition]:
            opened.append("if")
            return f"{{% if {_pipeline(deque(condition))} %}}"
        case ["range", number, ",", value, ":=", *values]:
            return f"{_action(['range', value, ':=', *values], opened)}{{% set v.{number[1:]} = loop.index0 %}}"
        case ["range", value, ":=", *values]:
            return f"{_action(['range', *values], opened)}{{% set v.{value[1:]} = dot %}}"
        case ["range", *values]:
            opened.append("for")
            return f"{{% for dot in {_pipeline(deque(values))} %}}"
        case [name, ":=" | "=", *value]:
            return f"{{% set v.{name[1:]} = {_pipeline(deque(value))} %}}"
    return f"{{{{ {_pipeline(deque(words))} }}}}"


def _pipeline(words: deque[str]) -> str:
    """Translates calls with pipes between them, up to their end or a closing bracket."""
    result: list[str] = []
    while True:
        terms: list[str] = []
        while words and words[0] not in (")", "|"):
            word = words.popleft()
            terms.append(_pipeline(words) if word == "(" else _term(word))
        first, *others = [*terms, *result]
        result = [f"{first}({', '.join(others)})" if first.removeprefix("go.") in FUNCTIONS else first]
        if not words or words.popleft() == ")":
            return result[0]


def _term(word: str) -> str:
    if word[0] == "`":
        return repr(word[1:-1])
    if word[0] == '"' or re.fullmatch(r"-?\d+|true|false", word):
        return word
    if word in FUNCTIONS:
        return f"go.{word}"
    name, *path = word.split(".")
    if name and name[0] != "$":
        return f"unknown({word!r})"
    start = {"": "dot", "$": "root"}.get(name, f"v.{name[1:]}")
    return start + "".join(f"[{key!r}]" for key in path if key)


def turnwise(parts: Mapping[str, tuple[str, str]], beginning: str) -> str:
    """A template in Go that writes each turn between the two texts of its role, and then how an answer begins."""

    def quoted(text: str) -> str:
        return text if "{{" not in text else "{{ " + json.dumps(text, ensure_ascii=False) + " }}"

    roles = [
        f'{{{{ {"else if" if number else "if"} eq .Role "{role}" }}}}{quoted(before)}{{{{ .Content }}}}{quoted(after)}'
        for number, (role, (before, after)) in enumerate(parts.items())
    ]
    return f"{{{{ range .Messages }}}}{''.join(roles)}{{{{ end }}}}{{{{ end }}}}{quoted(beginning)}"
