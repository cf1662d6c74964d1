"""Gathers the files of a finished run that may be published, and finds what speaks against publishing them."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from httpx2 import HTTPError
from huggingface_hub import ModelCard, get_token
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from safetensors import SafetensorError, safe_open

from dpo_recipes.errors import RecipeError
from dpo_recipes.files import MANIFEST, fingerprint, read_json
from dpo_recipes.health.rules import read_findings
from dpo_recipes.models.merge import adapter_print
from dpo_recipes.models.open import MERGE_FILE, find_start, read_adapter, run_settings
from dpo_recipes.recipe import DONE_FILE, SETTINGS_FILE
from dpo_recipes.runs.model_card import BEGIN, END, model_card
from dpo_recipes.secrecy import KEYS, NAMES, machine_paths, secrets_in, shorten_paths

WEIGHTS = {"adapter": r"adapter_model\.safetensors", "merged": r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"}
"""Names of the files of weights, by kind."""
CONFIGURATION = {"adapter": r"adapter_config\.json", "merged": r"(generation_)?config\.json"}
TOKENIZER = (
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|merges\.txt|(spiece|tokenizer)\.model|"
    r"chat_template\.jinja"
)
RECORDS = (SETTINGS_FILE, "metrics.json", "health.json", "environment.txt", "curves.png")
"""Files of the run that show no row of its data. All others stay here: training_args.bin, logs, samples, pages."""
PLACEHOLDER = r"\*+|<\w+>"  # that this package, and transformers, put in the place of a secret
UNSPEAKING = r"(tokenizer|vocab|added_tokens)\.json|merges\.txt|.*\.model"
"""Names of files full of pieces of words: only this machine's own names are looked for in them."""


@dataclass
class Publication:
    """The files to publish, by their names at the Hub, and the reasons against publishing them."""

    hub_id: str
    run: Path  # holds the record of the training
    weights: Path  # the folder of the weights: the run's, or that of a merge
    kind: str  # adapter or merged
    files: dict[str, Path | bytes] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def gather(
    run: str,
    hub_id: str,
    *,
    weights: str | None = None,
    base: str | None = None,
    license: str | None = None,
    anyway: bool = False,
) -> Publication:
    """Gathers what is published of a run; nothing is written or sent, except the card to the Hub's validator.

    Args:
        run: The folder of a run, or of a merged model.
        hub_id: Name of the repository.
        weights: `adapter` or `merged`; by default what the folder holds.
        base: Name of the base model at the Hub, where the run names a local folder.
        license: The model's licence; by default the base model's.
        anyway: Publish a run that is unhealthy.

    Raises:
        RecipeError: If there is no run, or it has no such weights.
    """
    try:
        validate_repo_id(hub_id)
    except HFValidationError as error:
        raise RecipeError(f"{hub_id} cannot be the name of a repository: {error} Give --hub_id YOU/NAME.") from error
    found = Publication(hub_id, *_find(run, weights))
    if not (found.run / DONE_FILE).exists():
        raise RecipeError(f"{found.run} is no finished run: it has no {DONE_FILE}. Train it to the end, or resume it.")
    found.problems += [*_unproven(found), *([] if anyway else _unhealthy(found))]
    names = [WEIGHTS[found.kind], CONFIGURATION[found.kind], TOKENIZER]
    for file in sorted(found.weights.iterdir()):
        if file.is_file() and re.fullmatch("|".join(names), file.name):
            found.files[file.name] = file
    found.files |= {name: found.run / name for name in RECORDS if (found.run / name).exists()}
    at_hub, licence = _origin(found, base)
    if not (license or licence):
        found.problems.append(
            "The licence of the base model is not known. Look it up, and name the model's own with --license."
        )
    if found.kind == "adapter":
        _name_base(found, at_hub)
    _shorten(found)
    _add_card(found, at_hub, licence, {"license": license} if license else licence)
    found.problems += [problem for name, held in found.files.items() for problem in _leaks(name, held, found)]
    return found


def _find(run: str, kind: str | None) -> tuple[Path, Path, str]:
    """Folders of the run and of the weights, and the kind of weights."""
    folder = Path(run)
    if merged := read_json(folder / MERGE_FILE):
        origin = Path(merged["lora_adapter"])
        if kind == "adapter":
            return _find(str(origin), kind)
        if not (origin / SETTINGS_FILE).exists():
            raise RecipeError(f"{run} was merged from {origin}, and no run is there: its record is needed.")
        return origin, folder, "merged"
    if not (folder / SETTINGS_FILE).exists():
        raise RecipeError(f"{run} holds no {SETTINGS_FILE}. Name the folder of a run, or of a merge of one.")
    is_adapter = bool(read_adapter(folder))
    if kind == "adapter" and not is_adapter:
        raise RecipeError(f"{run} holds a full model and no LoRA adapter. Leave --weights out.")
    if kind == "merged" and is_adapter:
        target = f"{os.path.abspath(run)}_merged"
        if not read_json(Path(target) / MERGE_FILE):
            raise RecipeError(f"{run} holds a LoRA adapter. Merge it first: dpo-recipes merge {run}")
        return folder, Path(target), kind
    return folder, folder, "adapter" if is_adapter else "merged"


def _unhealthy(found: Publication) -> Iterator[str]:
    signs = [str(finding) for finding in read_findings(found.run) if finding.fatal]
    verdicts = [read_json(found.run / file).get("verdict", {}) for file in ("metrics.json", "eval.json")]
    signs += [verdict["sentence"] for verdict in verdicts if verdict.get("word") in ("destroyed", "worse")]
    if signs:
        yield f"The run is unhealthy: {' '.join(signs)} To publish it all the same, give --anyway."


def _unproven(found: Publication) -> Iterator[str]:
    """Yields the weights that are not those which were checked when they were saved or merged."""
    merged = read_json(found.weights / MERGE_FILE)
    held = read_json(found.weights / MANIFEST).get("files", {})
    proven = {name: [known] for name, known in merged["files"].items()} if merged else held
    there = {file.name: fingerprint(file) for file in found.weights.iterdir() if file.is_file()}
    names = [name for name in sorted({*there, *proven}) if re.fullmatch(WEIGHTS[found.kind], name)]
    if not names:
        yield f"{found.weights} holds no weights as safetensors."
    elif changed := [name for name in names if there.get(name) not in proven.get(name, ())]:
        yield (
            f"{', '.join(changed)} in {found.weights} is not as it was when it was checked. "
            + (f"Merge again: dpo-recipes merge {found.run}" if merged else "Train the run again.")
        )
    elif merged and merged.get("weights") != adapter_print(found.run):
        yield f"{found.weights} is no merge of the adapter in {found.run}. Merge again: dpo-recipes merge {found.run}"


def _origin(found: Publication, base: str | None) -> tuple[str | None, dict[str, Any]]:
    """Name at the Hub of the model that the run comes from, and the licence in the card of the nearest model."""
    name, models = str(found.run), list[str]()
    with suppress(RecipeError):  # no file of the last one names another
        while Path(name).is_dir() and (name := find_start(name)) not in models:
            models.append(name)
    here = [model for model in models if Path(model).exists() or re.match(r"[/~.]|outputs/", model)]
    at_hub = base or next((model for model in models if model not in here), None)
    licences = (_licence(model) for model in [*here, at_hub] if model)
    return at_hub, next(filter(None, licences), {})


def _licence(name: str) -> dict[str, Any]:
    """Licence fields of a model's card; empty if there is no card, or it cannot be had here."""
    place = Path(name, "README.md") if Path(name).is_dir() else name
    try:
        data = ModelCard.load(place, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, EntryNotFoundError, HTTPError):
        return {}
    return {key: data[key] for key in ("license", "license_name", "license_link") if data.get(key)}


def _name_base(found: Publication, at_hub: str | None) -> None:
    """Names the base model in adapter_config.json as others find it."""
    held = read_adapter(found.weights)
    if at_hub is None:
        found.problems.append(
            f"The LoRA adapter belongs to {held.get('base_model_name_or_path')}, which nobody else has. Publish the "
            "merged model (--weights merged), or name the base model at the Hub with --base."
        )
        return
    found.files["adapter_config.json"] = json.dumps(held | {"base_model_name_or_path": at_hub}, indent=2).encode()


def _shorten(found: Publication) -> None:
    """Leaves only the last part of paths in the run's own records."""
    for name in RECORDS:
        if name.endswith(".json") and name in found.files:
            text = (found.run / name).read_text(encoding="utf-8")
            found.files[name] = shorten_paths(text).encode()
            if machine_paths(text):
                found.notes.append(f"Paths in {name} are shortened to their last part.")
    settings = run_settings(found.run)
    if machine_paths(f"{settings.get('model_name_or_path')} {settings.get('dataset_name')}"):
        found.files.pop("curves.png", None)  # its title shows both names
        found.notes.append("curves.png stays here, because its title shows a path.")


def _add_card(found: Publication, at_hub: str | None, of_base: Mapping[str, Any], licence: Mapping[str, Any]) -> None:
    """Adds the model card: the run's README.md if somebody wrote into it, otherwise one that is filled now."""
    own = found.run / "README.md"
    text = own.read_text(encoding="utf-8") if own.exists() else ""
    config = read_json(found.weights / "config.json") | read_adapter(found.weights)
    scores = "SEQ_CLS" in str(config.get("task_type")) or "SequenceClassification" in str(config.get("architectures"))
    written = read_json(found.run / MANIFEST).get("files", {}).get("README.md", ())
    if not text or fingerprint(own) in written:
        _, begin, rest = text.partition(BEGIN)
        filled = model_card(
            found.run,
            name=found.hub_id.rpartition("/")[2],
            hub_id=found.hub_id,
            files=found.files,
            base=at_hub or run_settings(found.run).get("model_name_or_path"),
            base_is_public=at_hub is not None,
            is_adapter=found.kind == "adapter",
            is_reward_model=scores,
            license=of_base.get("license_name") or of_base.get("license"),
        )
        evaluation = f"\n{begin}{rest.partition(END)[0]}{END}\n" if begin else ""
        text = shorten_paths(filled + evaluation)
    else:
        found.notes.append("The card is README.md as somebody changed it; licence and tags are added.")
    try:
        card = ModelCard(text)
        tags = {"pipeline_tag": f"text-{'classification' if scores else 'generation'}", "datasets": _data(found.run)}
        for key, value in (tags | dict(licence)).items():
            setattr(card.data, key, getattr(card.data, key, None) or value)
        ModelCard(str(card))  # reads what it wrote
    except Exception as error:  # of huggingface_hub or yaml
        found.problems.append(f"The header of the model card is refused: {' '.join(str(error).split())}")
    else:
        found.files["README.md"] = str(card).encode()
        _ask_the_hub(found, card)


def _data(run: Path) -> list[str] | None:
    """Names at the Hub of the datasets that a run was trained on."""
    names = [re.sub(r":\d+$", "", name) for name in str(run_settings(run).get("dataset_name")).split("+")]
    return [name for name in names if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()] or None


def _ask_the_hub(found: Publication, card: ModelCard) -> None:
    """Lets the Hub's validator read the card, where it can be reached."""
    try:
        card.validate()
    except (HTTPError, OSError) as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        found.notes.append(f"The card was not checked by the Hub, which cannot be asked: {why}")
    except ValueError as error:
        found.problems.append(f"The Hub refuses the model card: {' '.join(str(error).split())}")


def _leaks(name: str, held: Path | bytes, found: Publication) -> Iterator[str]:
    """Yields a sentence for a secret and one for a path of this machine in a file."""
    text = ""
    if name.endswith(".safetensors"):
        with suppress(SafetensorError), safe_open(held, framework="numpy") as file:  # broken ones are not proven
            text = json.dumps(file.metadata() or {})
    else:
        text = (held if isinstance(held, bytes) else held.read_bytes()).decode("utf-8", errors="ignore")
    ours = {value for key, value in os.environ.items() if NAMES.search(key) and len(value) > 15}
    secrets = [secret for secret in {*ours, get_token() or ""} if secret and secret in text]
    speaks = not (re.fullmatch(UNSPEAKING, name) or name.endswith(".png"))
    if speaks:
        secrets += KEYS.findall(text)
        if name.endswith(".json") and not re.fullmatch(TOKENIZER, name):
            with suppress(ValueError):
                secrets += [each for each in secrets_in(json.loads(text)) if not re.fullmatch(PLACEHOLDER, each)]
    if secrets:
        yield f"{name} holds a secret, {secrets[0][:4]}...: take it out, and revoke it if others saw it."
    own = {str(Path.cwd()), *(str(folder.resolve()) for folder in (found.run, found.weights))} - {"/"}
    paths = [path for path in own if path in text] + (machine_paths(text) if speaks else [])
    if paths:
        yield f"{name} holds a path of this machine, {paths[0]}. Name what others can find, or the file's name alone."
