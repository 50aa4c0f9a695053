"""The model draws what its prompts say, through an artifact: the whole chain, from tokens to the picture."""

import json
from pathlib import Path

import pytest

from benchmarks import prompt_accuracy


@pytest.mark.slow
def test_held_out_prompts_through_an_artifact(tiny_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = prompt_accuracy.main([str(tiny_artifact), "--prompts", "32", "--least", "0.85", "--json"])
    table = json.loads(capsys.readouterr().out)
    assert code == 0, table


@pytest.mark.slow
def test_few_steps_are_worse(tiny_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rights = []
    for steps in ("20", "5"):
        prompt_accuracy.main([str(tiny_artifact), "--prompts", "24", "--steps", steps, "--json"])
        rights.append(json.loads(capsys.readouterr().out)["right"])
    assert rights[0] > rights[1], rights


def test_either_an_artifact_or_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["one", "--diffusers", "two"]):
        with pytest.raises(SystemExit) as caught:
            prompt_accuracy.main(arguments)
        assert caught.value.code == 2
        assert "--diffusers FOLDER" in capsys.readouterr().err
