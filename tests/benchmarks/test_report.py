"""What the measuring programs print under and in their tables."""

import json
from pathlib import Path

import pytest

from benchmarks import report


def test_a_spread_is_of_values_that_were_measured() -> None:
    found = report.spread([5.0, 1.0, 2.0, 3.0, 4.0, 6.0, 7.0, 8.0, 9.0, 100.0])
    assert (found.median, found.least, found.most, found.count) == (5.5, 1.0, 100.0, 10)
    assert (found.p10, found.p90) == (1.0, 9.0)
    alone = report.spread([2.5])
    assert (alone.median, alone.p10, alone.p90) == (2.5, 2.5, 2.5)
    with pytest.raises(ValueError, match="nothing was measured"):
        report.spread([])


def test_a_table_is_markdown_whatever_its_cells_hold() -> None:
    lines = report.table(("name", "ms"), [["a|b", "1.0"], ["c", "2.0"]]).splitlines()
    assert lines == ["| name | ms |", "| --- | --- |", r"| a\|b | 1.0 |", "| c | 2.0 |"]


def test_rows_are_printed_as_they_come(capsys: pytest.CaptureFixture[str]) -> None:
    shown = report.Table(("name", "ms"))
    assert capsys.readouterr().out == ""
    shown.add(["a|b", "1.0"])
    assert capsys.readouterr().out.splitlines() == ["| name | ms |", "| --- | --- |", r"| a\|b | 1.0 |"]
    shown.add(["c", "2.0"], ["d", "3.0"])
    assert capsys.readouterr().out.splitlines() == ["| c | 2.0 |", "| d | 3.0 |"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 kB"), (1500, "2 kB"), (45_400_000, "45.4 MB"), (5_135_000_000, "5.13 GB"), (-2e9, "-2.00 GB")],
)
def test_sizes(count: float, text: str) -> None:
    assert report.size(count) == text


def test_the_command_line_names_folders_without_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "256x256-b1").mkdir()
    monkeypatch.setattr("sys.argv", ["/somewhere/benchmarks/step.py"])
    told = report.command_line([str(tmp_path / "256x256-b1"), "--calls", "8"])
    assert told == "python benchmarks/step.py 256x256-b1 --calls 8"


def test_json_holds_spreads_as_objects(tmp_path: Path) -> None:
    report.write_json(None, {})
    report.write_json(str(tmp_path / "a.json"), {"ms": report.spread([1.0, 2.0])})
    assert json.loads((tmp_path / "a.json").read_text())["ms"]["median"] == 1.5
