"""The documentation names options that exist and links that lead somewhere."""

import re
from collections.abc import Iterable
from pathlib import Path

import click
import pytest

from buildtool.bench.cli import command as sdxl_bench
from buildtool.cli import main as sdxl_build
from runtimes.cli import command as sdxl_run

ROOT = Path(__file__).parents[1]
PAGES = [
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("benchmarks/*.md")),
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
]
OTHERS = {"--version", "--map-root-user"}


def options(command: click.Command) -> set[str]:
    """Every option of a command and its subcommands, as --help shows them."""
    found = {name for p in command.params for name in (*p.opts, *p.secondary_opts)} | {"--help", "-h"}
    for below in command.commands.values() if isinstance(command, click.Group) else ():
        found |= options(below)
    return found


def ids(pages: Iterable[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, heading = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists() and target.is_relative_to(ROOT), link
        if heading:
            titles = re.findall(r"^#+ +(.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", t).strip().lower().replace(" ", "-") for t in titles}, link


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_options_in_commands_exist(page: Path) -> None:
    """Lines that call one of the programs."""
    known = {"sdxl-build": options(sdxl_build), "sdxl-run": options(sdxl_run), "sdxl-bench": options(sdxl_bench)}
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        if not any(re.search(rf"\b{name} +[\w-]", line) for name in known):
            continue
        named = {name for name in known if name in line}
        allowed = set().union(*(known[name] for name in named))
        code = " ".join(re.findall(r"`[^`]+`", line)) or line
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", code):
            assert option in allowed | OTHERS, f"{option} in: {line}"


def test_the_page_of_sdxl_bench_has_every_option() -> None:
    text = (ROOT / "docs" / "bench.md").read_text(encoding="utf-8")
    there = {o for o in options(sdxl_bench) if o.startswith("--")} - {"--help", "--version"}
    assert there - set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) == set()


def test_the_command_line_page_has_every_option_and_no_other() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    there = {o for o in options(sdxl_build) | options(sdxl_run) if o.startswith("--")} - {"--help", "--version"}
    assert named - there == set()
    assert there - named == set()
    for name in sdxl_build.commands:
        assert re.search(rf"`{name}\b|sdxl-build {name}\b", text), name
