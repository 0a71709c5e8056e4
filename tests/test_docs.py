"""README is short, every page is in the navigation, links lead somewhere, and the site builds."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import robustft_kernels as rft

from . import prose

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
WRITTEN_LATER = {"benchmarks-gpu.md"}  # the site leaves them out until they are there


def without_code(markdown):
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", markdown, flags=re.M | re.S)


def anchors(markdown):
    """The anchors of a page's headings, as GitHub and mkdocs.yml's slugify make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", markdown, flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def dead_links(page, markdown):
    """The relative links of a page that lead to no file, or to no heading of a page. A page of docs/ may name files
    beside docs/; a site has no more than their names."""
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(markdown)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text() if path else markdown)):
            yield target


def test_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert max(map(prose.words, prose.sentences(text))) <= 30


def test_every_page_is_in_the_navigation():
    listed = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.M)
    assert len(listed) == len(set(listed))
    there = {page.name for page in DOCS.glob("*.md")}
    assert there <= set(listed)
    assert set(listed) - there <= WRITTEN_LATER


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert not list(dead_links(page, page.read_text()))


@pytest.mark.parametrize("link", ["no-such-page.md", "limits.md#no-such-heading", "#no-such-heading"])
def test_a_dead_link_is_found(link):
    markdown = f"# Here\n\n[This](#here) is there, and [that]({link}) is not."
    assert list(dead_links(DOCS / "index.md", markdown)) == [link]


def test_api_has_every_public_name():
    shown = re.findall(r"^::: robustft_kernels\.(\S+)$", (DOCS / "api.md").read_text(), flags=re.M)
    assert set(rft.__all__) - {"METHODS"} <= set(shown)


def rows(markdown):
    """The rows of all tables, each by the headings of its columns."""
    for table in re.findall(r"(?:^\|.*\n)+", markdown, flags=re.M):
        head, _, *body = ([cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.splitlines())
        yield from (dict(zip(head, cells, strict=False)) for cells in body)


def measured(page, section, rate):
    """OOD over AdamW by method, in the tables of a page's section."""
    text = next(part for part in re.split(r"^#+ ", (DOCS / page).read_text(), flags=re.M) if part.startswith(section))
    return {row["method"]: float(row["OOD over AdamW"].split()[0]) for row in rows(text) if row.get("lr") == rate
            and re.match(r"[-+\d]", row["OOD over AdamW"])}  # fmt: skip


@pytest.mark.parametrize("page", ["README.md", "docs/choosing.md"])
def test_shown_numbers_are_those_of_the_experiments(page):
    found = {
        "digits": measured("digits.md", "Digits", "0.003"),
        "emoji": measured("emoji.md", "At each", "0.001"),
        "sentiment": measured("sentiment.md", "At the larger", "0.0008"),
    }
    called = {
        "AdamFTP": "FTP", "TPGM": "TPGM, each step", "AdamPGM": "PGM", "AdamL2SP": "L2-SP", "AdamSPD": "SPD",
        "FTP": "FTP", "PGM": "PGM", "L2-SP": "L2-SP", "SPD": "SPD", "wise_sweep": "WiSE-FT", "WiSE-FT": "WiSE-FT",
    }  # fmt: skip
    compared = 0
    for row in rows((ROOT / page).read_text()):
        name = re.sub(r"[`*]", "", row.get("take", row.get("", ""))).split(",")[0]
        for column, shown in row.items():
            experiment = column.split(",")[0]
            if name not in called or experiment not in found or not shown.startswith(("+", "-")):
                continue
            of = {
                key: value
                for key, value in found[experiment].items()
                if re.sub("^Adam", "", key).startswith(called[name])
            }
            assert {float(number) for number in re.findall(r"[-+][\d.]+", shown)} <= set(of.values()), (row, of)
            compared += 1
    assert compared == 17


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs mkdocs: make docs")
def test_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    api = (tmp_path / "site" / "api" / "index.html").read_text()
    assert "AnchoredAdamW" in api
    assert "{methods}" not in api
