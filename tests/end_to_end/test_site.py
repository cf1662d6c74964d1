"""The manual as a site: built strictly, with no link that leads nowhere and nothing fetched from another host."""

import ast
import os
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import pytest
from commands import RECIPES, REPOSITORY

pytestmark = pytest.mark.slow
FETCHED = re.compile(r"""<(?:script|img|source|iframe|link|use)\b[^>]*?\b(?:src|srcset|href)=["']?([^"'\s>]+)""")
LINK = re.compile(r"""<a\b[^>]*?\bhref=["']?([^"'\s>]+)""")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the site, as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(build, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "WARNING" not in result.stdout + result.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, str]:
    """The pages of the site, without the report of a comparison, which is a page of another kind."""
    found = {page: page.read_text(encoding="utf-8") for page in site.rglob("*.html")}
    assert len(found) > 60
    return found


def test_every_document_recipe_and_notebook_has_a_page(site: Path) -> None:
    sources = [*REPOSITORY.glob("docs/**/*.md"), *RECIPES.glob("[!_]*.py"), *REPOSITORY.glob("notebooks/*.ipynb")]
    for source in sources:
        place = source.relative_to(REPOSITORY)
        page = site / (place.with_suffix("") if place.suffix == ".md" else place).with_name(
            "index.html" if place.name == "README.md" else f"{place.stem if place.suffix == '.md' else place.name}.html"
        )
        assert page.is_file(), place
    for name in ("index", "glossary", "api", "recipes/your_own_data"):
        assert (site / f"{name}.html").is_file()


def test_links_and_anchors_lead_somewhere(site: Path, pages: dict[Path, str]) -> None:
    anchors = {page: {*re.findall(r'\b(?:id|name)="?([^"\s>]+)', text)} for page, text in pages.items()}
    count = 0
    for page, text in pages.items():
        for link in map(unescape, LINK.findall(text)):
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            target = site / path.lstrip("/") if path.startswith("/") else (page.parent / unquote(path)).resolve()
            target = page if not path else target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{page.relative_to(site)}: {link}"
            assert not anchor or unquote(anchor) in anchors.get(target, {unquote(anchor)}), f"{page}: {link}"
            count += 1
    assert count > 2000


def test_nothing_is_fetched_from_another_host(site: Path, pages: dict[Path, str]) -> None:
    fetched = [address for text in pages.values() for address in FETCHED.findall(text)]
    assert len(fetched) > 200
    assert [address for address in fetched if re.match(r"(https?:)?//", address)] == []
    styles = [file.read_text(encoding="utf-8") for file in site.rglob("*.css")]
    assert styles
    assert [found for text in styles for found in re.findall(r"url\([\"']?https?://[^)]*", text)] == []


def test_every_public_name_is_documented(site: Path) -> None:
    tree = ast.parse((REPOSITORY / "tests" / "test_public_names.py").read_text())
    [names] = [node.value for node in tree.body if isinstance(node, ast.Assign)]
    public = eval(compile(ast.Expression(names), "NAMES", "eval"), {})
    page = (site / "api.html").read_text(encoding="utf-8")
    undocumented = []
    for name in (f"{module}.{name}" for module, listed in public.items() for name in listed):
        found = re.search(rf'id="?dpo_recipes\.{name}"?[ >](.*?)(?=<h[23] |\Z)', page, re.DOTALL)
        undocumented += [] if found and re.search(r"<p>\W*\w", found[1]) else [name]
    assert undocumented == []


def test_the_glossary_is_the_table_of_contributing(site: Path) -> None:
    words = re.findall(r"^\| ([\w ]+) \| .* \|$", _section("Words"), re.MULTILINE)[1:]
    assert len(words) > 15
    page = (site / "glossary.html").read_text(encoding="utf-8")
    assert [word for word in words if f"<td>{word}</td>" not in page] == []


def _section(heading: str) -> str:
    return (REPOSITORY / "CONTRIBUTING.md").read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def test_pages_fit_a_phone_and_ask_no_other_host(site: Path) -> None:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no Chromium on this machine")
    from playwright.sync_api import sync_playwright

    asked: list[str] = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        screen = browser.new_page(viewport={"width": 390, "height": 800})
        screen.on("request", lambda request: asked.append(request.url))
        for name in (
            "index",
            "docs/health",
            "docs/results/alpaca_eval",
            "recipes/index",
            "recipes/hh_rlhf_ppo.py",
            "api",
        ):
            screen.goto((site / f"{name}.html").as_uri())
            assert screen.evaluate("document.documentElement.scrollWidth") <= 390, name
        browser.close()
    assert asked
    assert [address for address in asked if not address.startswith(("file:", "data:", "blob:"))] == []
