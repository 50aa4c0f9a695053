"""The model draws what its prompts say, through an artifact: the whole chain, from tokens to the picture."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import prompt_accuracy


def score(artifact: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """What the program says of 32 held-out prompts: its exit code and its table."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = prompt_accuracy.main([str(artifact), "--prompts", "32", "--json", *options])
    return code, json.loads(said.getvalue())


@pytest.fixture(scope="module")
def of_twenty_steps(tiny_artifact: Path) -> tuple[int, dict[str, Any]]:
    return score(tiny_artifact, "--least", "0.85")


@pytest.mark.slow
def test_held_out_prompts_through_an_artifact(of_twenty_steps: tuple[int, dict[str, Any]]) -> None:
    code, table = of_twenty_steps
    assert code == 0, table


@pytest.mark.slow
def test_few_steps_are_worse(tiny_artifact: Path, of_twenty_steps: tuple[int, dict[str, Any]]) -> None:
    _, five = score(tiny_artifact, "--steps", "5")
    assert of_twenty_steps[1]["right"] > five["right"]


def test_either_an_artifact_or_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["one", "--diffusers", "two"]):
        with pytest.raises(SystemExit) as caught:
            prompt_accuracy.main(arguments)
        assert caught.value.code == 2
        assert "--diffusers FOLDER" in capsys.readouterr().err
