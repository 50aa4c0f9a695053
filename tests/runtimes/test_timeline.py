"""Where a process's time went."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtimes import timeline
from runtimes.timeline import Span

ROOT = Path(__file__).parents[2]


def test_time_counts_from_the_start_of_the_process() -> None:
    script = "import time; time.sleep(0.3); from runtimes import timeline; print(timeline.now())"
    began = time.perf_counter()
    told = float(subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=True).stdout)
    assert 0.29 <= told <= time.perf_counter() - began + 0.02


def test_spans_are_kept_by_their_start_and_also_when_they_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "_spans", [])
    with pytest.raises(RuntimeError), timeline.span("outer"):
        time.sleep(0.01)
        with timeline.span("inner"):
            raise RuntimeError
    assert [span.name for span in timeline.spans()] == ["outer", "inner"]
    outer, inner = timeline.spans()
    assert outer.start + 0.01 <= inner.start <= inner.end <= outer.end
    assert json.loads(json.dumps(timeline.as_dicts()))[0]["name"] == "outer"


def test_a_process_that_serves_for_days_keeps_its_start_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "_spans", [])
    for i in range(timeline.LIMIT + 5):
        timeline.add("call", float(i), float(i))
    assert len(timeline.spans()) == timeline.LIMIT
    assert timeline.LIMIT > 5 * (1 + 5 * 100), "sdxl-bench counts pictures by them: --prompts tiny:100 --runs 5"


def test_bars_lie_on_one_axis() -> None:
    lines = timeline.render([Span("a", 0.0, 1.0), Span("longer", 1.0, 4.0)], width=4).splitlines()
    assert lines[1] == "   0.000    1.000  a       |#   |"
    assert lines[2] == "   1.000    3.000  longer  | ###|"
