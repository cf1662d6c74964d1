"""Compares the chat template and the stop tokens of an exported model with those that it was trained with."""

from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from dpo_recipes.errors import RecipeError
from dpo_recipes.files import read_json, write_text
from dpo_recipes.models.generation import require_chat_template
from dpo_recipes.models.open import refusing
from dpo_recipes.publish.ollama import Messages, Modelfile, read_modelfile, render, turnwise
from dpo_recipes.terminal import say, shown

ASKED, ANSWERED, AGAIN, TOLD = "How deep is it?", "Ten metres.", "And how\nwide, in £?", "Be brief."
USER, REPLY, NEXT, SYSTEM = (
    {"role": role, "content": text}
    for role, text in (("user", ASKED), ("assistant", ANSWERED), ("user", AGAIN), ("system", TOLD))
)
CONVERSATIONS = {
    "one question": [USER],
    "a system message and a question": [SYSTEM, USER],
    "three turns": [USER, REPLY, NEXT],
    "a system message and three turns": [SYSTEM, USER, REPLY, NEXT],
}
REFUSALS = (TemplateError, TypeError, ValueError)
"""Errors of a template that takes no system message."""
NEAR = 40  # characters shown on either side of a difference


def check_template(
    model: str, *, against: str | None = None, write: str | None = None, trust_remote_code: bool = False
) -> int:
    """Checks the stop tokens of a model and an exported file against its tokenizer; returns 1 if something differs.

    Args:
        model: A folder or Hub name with the tokenizer that the model was trained with.
        against: A Modelfile, a .gguf file, or a generation_config.json that another program reads.
        write: Where to write a Modelfile with the model's own template; `FROM` is the model itself.
        trust_remote_code: As in `open_model`.

    Raises:
        RecipeError: If a file cannot be read, or the template cannot be written as one of Ollama.
    """
    with refusing(f"the tokenizer of {model}"):
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    require_chat_template(tokenizer)
    differs = [*_model_stops(model, tokenizer, trust_remote_code=trust_remote_code)]
    if write:
        _write_modelfile(Path(write), model, tokenizer)
        against = write
    if against:
        differs += _against(Path(against), tokenizer)
    question = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    say(f"--- one question, as the model reads it\n{question}\n---")
    for difference in differs:
        say(f"DIFFERS: {difference}")
    if not differs:
        same = "stops where it does" if str(against).endswith(".json") else "renders conversations as it does"
        say(f"The stop tokens fit the chat template of {model}{f', and {against} {same}' if against else ''}.")
    return int(bool(differs))


def rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, *, template: str | None = None, answer: bool = True
) -> str:
    """The conversation as the tokenizer's chat template, or another one in Jinja, renders it, without a BOS token.

    Ollama and llama.cpp put that in front themselves, and one in a Modelfile comes twice.

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: The conversation.
        template: Another chat template.
        answer: Render it for an answer.
    """
    text: str = tokenizer.apply_chat_template(
        list(messages), chat_template=template, tokenize=False, add_generation_prompt=answer
    )
    return text.removeprefix(tokenizer.bos_token or "")


def _model_stops(model: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Iterator[str]:
    """Yields a sentence if the model's own files would let an answer go on after its end."""
    try:
        config = GenerationConfig.from_pretrained(model)
    except OSError:
        if read_json(Path(model) / "adapter_config.json"):
            return  # the base model's counts
        config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(model, **options))
    yield from _lacks_stop(tokenizer, config.eos_token_id, f"eos_token_id of {model}")


def _lacks_stop(tokenizer: PreTrainedTokenizerBase, ids: int | list[int] | None, where: str) -> Iterator[str]:
    end, number = end_of_turn(tokenizer)
    if number is not None and number not in (ids if isinstance(ids, list) else [ids]):
        yield (
            f"{where} is {ids}, and the template ends an answer with {end!r} ({number}). A server that reads this "
            f"file would go on after it: add {number} there."
        )


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[str, int | None]:
    """The special token by which the template ends an answer, and its id; no id if it is ordinary text."""
    text = tokenizer.apply_chat_template([USER, REPLY, NEXT], tokenize=False)
    ids = tokenizer(text.partition(ANSWERED)[2], add_special_tokens=False)["input_ids"]
    special = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}
    first = next((number for number in ids[:2] if tokenizer.decode([number]).strip()), None)
    return (tokenizer.decode([first]), first) if first in special else (text.partition(ANSWERED)[2][:NEAR], None)


def _against(file: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    if not file.is_file():
        raise RecipeError(f"There is no file {file}. Give a Modelfile, a .gguf file or a generation_config.json.")
    if file.suffix == ".json":
        return [*_lacks_stop(tokenizer, read_json(file).get("eos_token_id"), f"eos_token_id of {file}")]
    if file.suffix == ".gguf":
        return [*_against_gguf(read_gguf(file), tokenizer)]
    return [*_against_modelfile(read_modelfile(file.read_text(encoding="utf-8")), tokenizer)]


def _against_modelfile(modelfile: Modelfile, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    if not modelfile.template:
        yield "the Modelfile has no TEMPLATE, so Ollama guesses one, or gives the model the bare prompt."
        return
    yield from differences(tokenizer, lambda messages: render(modelfile, messages))
    end, number = end_of_turn(tokenizer)
    if number != tokenizer.eos_token_id and end.strip() not in modelfile.stops:
        yield f"the Modelfile does not stop at {end!r}, which ends an answer: PARAMETER stop {end.strip()!r}"


def read_gguf(file: Path) -> dict[str, Any]:
    """The metadata of a GGUF file that concern the tokenizer, by their names without `tokenizer.`."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise RecipeError(
            "A .gguf file is read by the package gguf, which is not installed: pip install gguf"
        ) from error
    with refusing(str(file)):
        fields = GGUFReader(file).fields
    names = ("chat_template", "ggml.eos_token_id", "ggml.eot_token_id", "ggml.bos_token_id")
    return {name: fields[key].contents() for name in names if (key := f"tokenizer.{name}") in fields}


def _against_gguf(held: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    if not (template := held.get("chat_template")):
        yield "the GGUF file holds no chat template: convert the model again from a folder with chat_template.jinja."
    else:
        yield from differences(tokenizer, lambda messages: rendered(tokenizer, messages, template=template))
    end, number = end_of_turn(tokenizer)
    stops = {held.get("ggml.eos_token_id"), held.get("ggml.eot_token_id")}
    if number is not None and number not in stops:
        known = sorted(stop for stop in stops if stop is not None)
        yield f"the GGUF file stops at the tokens {known}, and an answer ends with {end!r} ({number})."
    first, own = held.get("ggml.bos_token_id"), tokenizer.bos_token_id
    if None not in (own, first) and first != own:
        yield f"the GGUF file begins with the token {first}, and the tokenizer with {own}."


def differences(tokenizer: PreTrainedTokenizerBase, other: Callable[[Messages], str]) -> Iterator[str]:
    """Yields the first difference between the tokenizer's rendering of a conversation and another one."""
    for name, messages in CONVERSATIONS.items():
        try:
            expected = rendered(tokenizer, messages)
        except REFUSALS:
            continue
        got = other(messages)
        if got != expected:
            at = next(at for at, (one, two) in enumerate(zip_longest(expected, got)) if one != two)
            pieces = (shown(repr(text[max(0, at - NEAR) : at + NEAR])) for text in (expected, got))
            yield "{}: from character {} on. The tokenizer has {}, the file {}.".format(name, at, *pieces)
            return


def _write_modelfile(file: Path, model: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes a Modelfile whose template renders as the tokenizer does.

    Raises:
        RecipeError: If the template is not made of turns, each between two texts of its role.
    """
    if file.exists():
        raise RecipeError(f"{file} exists already. Name another file with --write, or check it with --against.")
    modelfile = Modelfile(_as_turns(tokenizer))
    if [*differences(tokenizer, lambda messages: render(modelfile, messages))]:
        raise RecipeError(
            f"The chat template of {model} looks at more than the role of a turn, and is not translated here. Write "
            f"TEMPLATE yourself, and check it: dpo-recipes template {model} --against FILE. Or serve a GGUF file with "
            "llama-server --jinja, which reads the template itself."
        )
    end, number = end_of_turn(tokenizer)
    stop = f'PARAMETER stop "{end.strip()}"\n' if number is not None else ""
    write_text(file, f'FROM {model}\nTEMPLATE """{modelfile.template}"""\n{stop}', listed=False)
    say(f"Modelfile     {file}")


def _as_turns(tokenizer: PreTrainedTokenizerBase) -> str:
    """A template of Ollama with the texts around each role's turns, found by rendering conversations."""
    one, bare = (rendered(tokenizer, [USER], answer=answer) for answer in (True, False))
    beginning = one[len(bare) :] if one.startswith(bare) else ""
    before_user, _, after = one.partition(ASKED)
    after_user = after.removesuffix(beginning)
    turns = [*rendered(tokenizer, [USER, REPLY, USER]).split(ASKED), ""]
    before_reply, _, after_reply = turns[1].partition(ANSWERED)
    parts = {
        "user": (before_user, after_user),
        "assistant": (before_reply.removeprefix(after_user), after_reply.removesuffix(before_user)),
    }
    try:
        told = rendered(tokenizer, [SYSTEM, USER]).partition(ASKED)[0]
    except REFUSALS:
        return turnwise(parts, beginning)
    before_system, _, after_system = told.partition(TOLD)
    return turnwise({"system": (before_system, after_system.removesuffix(before_user)), **parts}, beginning)
