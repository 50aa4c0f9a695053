"""The check's command line where there is nothing to check."""

from pathlib import Path
from typing import Any

import click.testing
import pytest

from runtimes import check


@pytest.fixture
def call() -> click.testing.CliRunner:
    return click.testing.CliRunner()


def test_a_folder_that_never_comes(call: click.testing.CliRunner) -> None:
    """Whoever started the process ended, or needs it no more."""
    done = call.invoke(check.main, ["-", "--json"], input="")
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit) and done.output == ""


@pytest.mark.parametrize("name", ["no artifact", "nowhere"])
def test_a_folder_that_comes_late_and_is_no_artifact(call: click.testing.CliRunner, tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    (tmp_path / "no artifact").mkdir()
    late, named = call.invoke(check.main, ["-"], input=f"{folder}\n"), call.invoke(check.main, [str(folder)])
    assert late.exit_code == 1 and isinstance(late.exception, SystemExit)
    assert late.output == named.output and late.output.startswith(f"Error: {folder} ") and late.output.count("\n") == 1


def test_the_line_names_what_is_checked(
    call: click.testing.CliRunner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[Path, str | None]] = []

    def noted(folder: Path, device: str | None) -> dict[str, Any]:
        asked.append((folder, device))
        return {}

    monkeypatch.setattr(check, "check", noted)
    done = call.invoke(check.main, ["-", "--device", "cuda:1"], input=f"{tmp_path / 'with spaces '}\nmore\n")
    assert done.exit_code == 0 and asked == [(tmp_path / "with spaces ", "cuda:1")]
