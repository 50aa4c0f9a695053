"""``benchmarks/cold_start.py``: clocks, the page cache, and parts of a run."""

import json
import math
import os
import sys
from pathlib import Path

import pytest

from benchmarks import cold_start
from benchmarks.cold_start import Run, Span


def test_the_parent_sees_the_file_before_the_end(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    code = f"import time; time.sleep(0.2); open({str(picture)!r}, 'w').close(); time.sleep(0.3); print('told')"
    saved, ended, out = cold_start.timed([sys.executable, "-c", code], picture)
    assert 0.2 < saved < ended - 0.25
    assert out == "told\n"


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"ended with 3\. the reason"):
        cold_start.timed(
            [sys.executable, "-c", "import sys; print('the reason', file=sys.stderr); sys.exit(3)"], tmp_path / "a"
        )
    with pytest.raises(SystemExit, match="ended with 0"):
        cold_start.timed([sys.executable, "-c", "pass"], tmp_path / "a")


def test_the_page_cache_is_looked_at_without_filling_it(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(1 << 20))
    cold_start.warm([path])
    assert cold_start.resident([path]) == 1.0
    cold_start.drop([path])
    share = cold_start.resident([path])
    assert share in (0.0, 1.0)  # a file system in memory keeps it
    assert cold_start.resident([path]) == share
    (tmp_path / "empty").touch()
    assert math.isnan(cold_start.resident([tmp_path / "empty"]))


def test_parts_come_from_the_timeline_or_from_stages() -> None:
    timeline = [{"name": "import torch", "start": 0.1, "end": 0.9}, {"name": "GPU context", "start": 0.2, "end": 0.5}]
    told = {"timeline": timeline, "seconds": {"load": 9.0}}
    assert cold_start.spans_of(told) == [Span("import torch", 0.1, 0.9), Span("GPU context", 0.2, 0.5)]
    assert cold_start.spans_of({"seconds": {"load": 1.0, "denoise": 2.0, "total": 3.5}}) == [
        Span("load", 0.0, 1.0),
        Span("denoise", 1.0, 3.0),
    ]


def test_parts_are_medians_over_runs_by_name() -> None:
    runs = [[Span("b", 1.0, 2.0), Span("a", 0.0, end), Span("b", 5.0, 5.5)] for end in (1.0, 3.0, 2.0)]
    found = {part.name: (part.start.median, part.end.median, part.seconds.median) for part in cold_start.parts(runs)}
    assert found == {"a": (0.0, 2.0, 2.0), "b": (1.0, 2.0, 1.0), "b (2)": (5.0, 5.5, 0.5)}
    assert [*found] == ["a", "b", "b (2)"]
    table = cold_start.render([Run(4.0, 5.0, spans, 1.0) for spans in runs])
    assert "| **saved picture** | 0.000 | 4.000 | 4.000 | 4.000 to 4.000 |" in table
    assert "| a | 0.000 | 2.000 | 2.000 | 1.000 to 3.000 |" in table


@pytest.mark.slow
def test_a_run_of_an_artifact(micro_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = tmp_path / "cold.json"
    arguments = ["--runs", "1", "--warmup", "0", "--steps", "2", "--peer", "diffusers", "--peer-runs", "1"]
    assert cold_start.main([str(micro_artifact), *arguments, "--json", str(told)]) == 0
    found = json.loads(told.read_text())
    (ours,), (theirs,) = found["runs"]["ours"], found["runs"]["diffusers"]
    assert ours["resident"] == 1.0
    for run in (ours, theirs):
        assert 0 < run["saved"] <= run["ended"] and run["spans"]
    assert "import diffusers, transformers" in {span["name"] for span in theirs["spans"]}
    assert "diffusers" not in " ".join(span["name"] for span in ours["spans"])
    out = capsys.readouterr().out
    assert "of weights" in out
    assert out.index("| ours, 1 |") < out.index("| **saved picture** |") < out.index("| diffusers, 1 |")


def test_no_artifact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cold_start.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("Error: ")
