"""The check's process, started before there is anything to check. Programs stand in for ``runtimes.check``."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from buildtool import golden
from buildtool.golden import Checked, Waiting

FOLDER = Path("an artifact")
PASSED = {"unet.cfg": {"error": {"sample": 1e-6}, "tolerance": 1e-4, "passed": True}}
Start = Callable[..., Waiting]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts a waiting stand-in, which reads its line and does as told with it."""
    started = []

    def begin(body: str, device: str | None = None) -> Waiting:
        program = f"import json, os, sys\nline = sys.stdin.readline()\n{body}"
        monkeypatch.setattr(golden, "_CHECK", ("-c", program))
        started.append(Waiting(device))
        return started[-1]

    yield begin
    for waiting in started:
        waiting.close()


def test_the_folder_comes_when_it_is_there_and_the_answer_is_the_checks(start: Start) -> None:
    answer = f"print('a library talks'); print(json.dumps({{'variants': {PASSED!r}}}))"
    note = "print([line, *sys.argv[1:]], file=sys.stderr); sys.exit(3)"
    assert golden.run(FOLDER, waiting=start(answer)) == Checked(PASSED)
    assert str([f"{FOLDER}\n", "-", "--json"]) in golden.run(FOLDER, waiting=start(note)).problem
    on_gpu = golden.run(FOLDER, waiting=start(note, "cuda:1")).problem
    assert str([f"{FOLDER}\n", "-", "--json", "--device", "cuda:1"]) in on_gpu


def test_a_folder_that_is_no_text_arrives_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xfccher"))
    folder.mkdir()
    program = "import os, sys; sys.exit(5 if os.path.isdir(sys.stdin.buffer.readline()[:-1]) else 4)"
    monkeypatch.setattr(golden, "_CHECK", ("-c", program))
    assert "exit code 5" in golden.run(folder, waiting=Waiting()).problem


def test_one_that_dies_is_repeated_with_the_folder(start: Start) -> None:
    problem = golden.run(FOLDER, waiting=start("os.kill(os.getpid(), 11)", "cuda:1")).problem
    assert "died with SIGSEGV" in problem and problem.endswith(f" '{FOLDER}' --json --device cuda:1")


def test_one_that_is_not_needed_any_more_is_ended(start: Start) -> None:
    waiting = start("import time; time.sleep(60)")
    assert waiting._process.poll() is None
    waiting.close()
    assert waiting._process.poll() is not None
    waiting.close()


def test_one_that_has_run_is_left_alone(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = start(f"print(json.dumps({{'variants': {PASSED!r}}}))")
    assert not golden.run(FOLDER, waiting=waiting).problem
    monkeypatch.setattr(waiting._process, "kill", lambda: pytest.fail("it has ended"))
    waiting.close()
    assert waiting._process.returncode == 0
