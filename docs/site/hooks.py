"""Builds the site's pages from the repository's files: mkdocs calls the `on_...` functions (see mkdocs.yml).

The site has the repository's folders, so that a link between two Markdown files leads to the same place in both. A
link to any other file, such as `../tests/test_cli.py`, leads to a page that shows the file.
"""

import ast
import json
import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = ("*.md", "docs/**/*.md", "recipes/**/*.md", "notebooks/*.ipynb")
STATIC = ("docs/**/*.png", "docs/**/*.svg", "docs/**/report.html")
SECTIONS = {  # pages that are a section of a file: the file, and whether the section is left there, too
    "recipes/your_own_data.md": ("recipes/README.md", "Your own data", False),
    "glossary.md": ("CONTRIBUTING.md", "Words", True),
}
TITLES = {"glossary.md": "Glossary"}
LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)\s#]+)(#[\w-]+)?(?=\))")
NAMED = re.compile(r"(?<![\w/\[])(?<!\]\()((?:docs|recipes)/[\w/]+\.md)(?:, \"([\w ]+)\")?")
TABLE = re.compile(r"^(?!\|)(.+)\n(?=\|.*\|\n\|[-|: ]+\|$)", re.MULTILINE)  # right after a line of text
UNLISTED = "---\nsearch:\n  exclude: true\n---\n"


def on_config(config: MkDocsConfig) -> None:
    """Lists the recipes below the page "Recipes"."""
    [section] = [entry["Recipes"] for entry in config.nav or [] if "Recipes" in entry]
    section += [{_name(file): f"recipes/{file.name}.md"} for file in sorted(ROOT.glob("recipes/[!_]*.py"))]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The theme's files, and the repository's as pages."""
    texts = {str(file.relative_to(ROOT)): _markdown(file) for pattern in PAGES for file in sorted(ROOT.glob(pattern))}
    moved = _divide(texts)
    texts["api.md"] = _api()
    for place in (f"recipes/{file.name}" for file in sorted(ROOT.glob("recipes/[!_]*.py"))):
        texts[place] = _recipe(ROOT / place)
    linked = {path for place, text in texts.items() for path in _targets(place, text)}
    static = {str(file.relative_to(ROOT)) for pattern in STATIC for file in ROOT.glob(pattern)}
    texts |= {path: _source(ROOT / path) for path in sorted(linked - {*texts} - static) if (ROOT / path).is_file()}
    kept = [file for file in files if file.src_dir != config.docs_dir or file.src_uri.endswith(".css")]
    for place, text in texts.items():
        pointed = LINK.sub(lambda link, place=place: _point(place, link, moved), text)
        kept.append(File.generated(config, _page(place), content=TABLE.sub(r"\1\n\n", pointed)))
    kept += [File.generated(config, _page(place), abs_src_path=str(ROOT / place)) for place in static]
    return Files(kept)


def _page(place: str) -> str:
    """The file of the site that shows a file of the repository."""
    if place.endswith("/report.html"):  # report.md beside it becomes report.html
        return place.replace("report.html", "page.html")
    return place if place.endswith((".md", ".png", ".svg")) else f"{place}.md"


def _name(recipe: Path) -> str:
    return recipe.stem.replace("_", "-")


def _targets(place: str, text: str) -> set[str]:
    """The files that a page links to, from the repository's root."""
    return {normpath(str(PurePosixPath(place).parent / link[2])) for link in LINK.finditer(text)}


def _point(place: str, link: re.Match[str], moved: dict[tuple[str, str], str]) -> str:
    """The link, to the page that shows the file or the section."""
    folder = str(PurePosixPath(place).parent)
    target = normpath(f"{folder}/{link[2]}")
    page = moved.get((target, link[3] or ""), _page(target))
    return f"{link[1]}{relpath(page, folder)}{link[3] or ''}"


def _divide(texts: dict[str, str]) -> dict[tuple[str, str], str]:
    """Makes pages of SECTIONS; returns the page of each heading that has moved, by the old file and the anchor."""
    moved = {}
    for page, (place, heading, stays) in SECTIONS.items():
        before, _, rest = texts[place].partition(f"\n## {heading}\n")
        section, mark, after = rest.partition("\n## ")
        section = section[: section.rindex("|\n") + 2] if stays else section  # the table alone
        texts[page] = f"# {TITLES.get(page, heading)}\n" + re.sub(r"^##(#+ )", r"#\1", section, flags=re.MULTILINE)
        if not stays:
            link = relpath(page, str(PurePosixPath(place).parent))
            texts[place] = f"{before}\n## {heading}\n\n[{heading}]({link}) has a page of its own.\n{mark}{after}"
            texts[page] = re.sub(r"\]\(#", f"]({relpath(place, str(PurePosixPath(page).parent))}#", texts[page])
            for name in re.findall(r"^#+ (.*)", texts[page], re.MULTILINE):
                moved[place, _anchor(name)] = page
    return moved


def _anchor(heading: str | None) -> str:
    """The end of a link to the heading, as code hosts and the site spell it."""
    return "#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") if heading else ""


def _markdown(file: Path) -> str:
    if file.suffix == ".md":
        return file.read_text(encoding="utf-8")
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join(part for cell in cells for part in _cell(cell))


def _cell(cell: dict) -> list[str]:
    """A notebook's cell: Markdown, or code with what it printed and drew."""
    source = "".join(cell["source"])
    if cell["cell_type"] != "code":
        return [re.sub(r"\[?!\[[^\]]*\]\(https?:.*", "", source)]  # a badge, which the reader's browser would fetch
    parts = [f"```python\n{source}\n```"]
    for output in cell["outputs"]:
        data = output.get("data", {"text/plain": output.get("text", "")})
        if "image/png" in data:
            parts.append(f"![Plot](data:image/png;base64,{''.join(data['image/png']).replace(chr(10), '')})")
        elif text := "".join(data.get("text/plain", "")).rstrip():
            parts.append(f"```text\n{text}\n```")
    return parts


def _recipe(file: Path) -> str:
    """A recipe's page: its docstring, and the file."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    linked = NAMED.sub(lambda found: f"[{found[2] or found[1]}](../{found[1]}{_anchor(found[2])})", text)
    return f"# {_name(file)}\n\n{linked}\n\n## recipes/{file.name}\n\n{_fenced(file)}"


def _source(file: Path) -> str:
    return f"{UNLISTED}\n# {file.name}\n\nThe file {file.relative_to(ROOT)}:\n\n{_fenced(file)}"


def _fenced(file: Path) -> str:
    language = {".py": "python", ".yaml": "yaml", ".toml": "toml"}.get(file.suffix, "text")
    return f"````{language}\n{file.read_text(encoding='utf-8').rstrip()}\n````\n"


def _api() -> str:
    """The names that recipes import, as tests/test_public_names.py lists them; mkdocstrings fills in the docstrings."""
    tree = ast.parse((ROOT / "tests" / "test_public_names.py").read_text(encoding="utf-8"))
    [names] = [node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "NAMES"]
    text = "# API\n\nThe names that recipes import. They stay, so that a copied recipe goes on running.\n"
    for module, listed in eval(compile(ast.Expression(names), "NAMES", "eval"), {}).items():
        text += f"\n::: dpo_recipes.{module}\n    options:\n      members: {json.dumps(listed)}\n"
    return text
