"""``benchmarks/step.py``: what it times, in which order, and how it tells of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import step
from benchmarks.step import Subject

CPU = torch.device("cpu")


def doubling(name: str, calls: list[tuple[str, float]], ours: bool = False, factor: float = 2.0) -> Subject:
    """A subject that notes its calls; golden is the double of its last inputs."""

    def call(inputs: Any) -> Any:
        calls.append((name, float(inputs["x"][0])))
        return (inputs["x"] * factor,)

    inputs = [{"x": torch.tensor([7.0, 1.0])}, {"x": torch.tensor([3.0, 4.0])}]
    return Subject(name, lambda: call, inputs, {"y": torch.tensor([6.0, 8.0])}, ours=ours)


def test_rounds_take_turns_and_end_with_golden_inputs() -> None:
    calls: list[tuple[str, float]] = []
    subjects = [doubling("a", calls, ours=True), doubling("b", calls)]
    step.measure(subjects, CPU, calls=5, rounds=2, warmup=0)
    assert calls[:2] == [("a", 3.0), ("b", 3.0)]  # first calls
    turn = [("a", 7.0), ("a", 3.0)] * 2 + [("b", 7.0), ("b", 3.0)] * 2
    assert calls[2:] == turn * 2
    assert [len(s.milliseconds) for s in subjects] == [8, 8]
    assert [s.errors for s in subjects] == [{"y": 0.0}] * 2


def test_who_is_wrong_is_told() -> None:
    subjects = [doubling("a", [], ours=True), doubling("b", [], factor=2.5)]
    step.measure(subjects, CPU, calls=2, rounds=1, warmup=1)
    assert subjects[1].errors["y"] == pytest.approx(0.25)
    rows = step.rows_of("unet.cfg", subjects)
    assert rows[0].ratio == 1.0 and rows[0].ours
    table = str(step.cells(rows))
    assert "0.0e+00" in table and "2.5e-01" in table


def test_what_only_loads_is_measured_before_anything_compiles() -> None:
    grouped: Any = [("unet", "cfg", ["a", "b"]), ("unet", "nocfg", ["a"])]
    assert step.side_by_side(grouped, ["compile", "eager", "max-autotune"]) == [
        ("unet", "cfg", ["a", "b"], ["eager"]),
        ("unet", "nocfg", ["a"], ["eager"]),
        ("unet", "cfg", ["a"], ["compile"]),
        ("unet", "cfg", ["a"], ["max-autotune"]),
        ("unet", "nocfg", ["a"], ["compile"]),
        ("unet", "nocfg", ["a"], ["max-autotune"]),
    ]


def test_other_weights_have_no_error() -> None:
    subject = doubling("random", [], factor=3.0)
    subject.exact = lambda: False
    step.measure([doubling("a", [], ours=True), subject], CPU, calls=2, rounds=1, warmup=0)
    assert subject.errors == {}
    assert "other weights" in str(step.cells(step.rows_of("unet.cfg", [doubling_done(), subject])))


def doubling_done() -> Subject:
    subject = doubling("a", [], ours=True)
    step.measure([subject], CPU, calls=2, rounds=1, warmup=0)
    return subject


def test_a_peer_that_fails_costs_its_own_row_only() -> None:
    def broken() -> Any:
        raise RuntimeError("out of memory\nand a long tail")

    ours = doubling("a", [], ours=True)
    peer = Subject("torch.compile", broken, ours.inputs, ours.wanted)
    step.measure([ours, peer], CPU, calls=2, rounds=1, warmup=0)
    row = step.rows_of("unet.cfg", [ours, peer])[1]
    assert row.milliseconds is None and row.failure == "RuntimeError: out of memory"
    assert "failed" in step.cells([row])[0]
    ours.start = broken
    with pytest.raises(RuntimeError):
        step.measure([ours], CPU, calls=2, rounds=1, warmup=0)


@pytest.mark.parametrize(
    ("out", "error"),
    [([3.0, 4.0], 0.0), ([3.0, 9.0], 1.0), ([float("nan"), 4.0], float("inf")), ([3.0, 4.0, 0.0], float("inf"))],
)
def test_relative_error(out: list[float], error: float) -> None:
    found = step.relative_errors([torch.tensor(out)], {"y": torch.tensor([3.0, 4.0])})
    assert found == {"y": error}


def test_other_inputs_are_other_numbers_of_the_same_kind() -> None:
    ids = torch.tensor([[98, 5, 6, 99, 99]])
    golden = {
        "sample": torch.randn(2, 4, 8, 8, dtype=torch.float16),
        "timestep": torch.tensor([501.0]),
        "time_ids": torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]),
        "input_ids": ids,
    }
    other = step.other_inputs(golden)
    for name, tensor in golden.items():
        assert (other[name].shape, other[name].dtype) == (tensor.shape, tensor.dtype)
    assert not torch.equal(other["sample"], golden["sample"]) and float(other["sample"].std()) > 0.5
    assert float(other["timestep"]) == 250.5
    assert torch.equal(other["time_ids"], golden["time_ids"])
    words = other["input_ids"]
    assert words[0, 0] == 98 and torch.equal(words[:, 3:], ids[:, 3:]) and int(words[0, 1:3].max()) < 98
    assert not torch.equal(words, ids)


@pytest.mark.slow
def test_all_engines_beside_eager(micro_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Peers made of the artifact's weights file give the golden tensors: the file was read as it was written."""
    told = tmp_path / "step.json"
    arguments = ["--component", "all", "--peer", "eager", "--peer", "eager-nchw", "--calls", "2", "--rounds", "1"]
    assert step.main([str(micro_artifact), *arguments, "--json", str(told)]) == 0
    rows = json.loads(told.read_text())["rows"]
    names = {row["engine"].partition(",")[0] for row in rows}
    assert names == {"text_encoder.main", "text_encoder_2.main", "unet.cfg", "unet.nocfg", "vae_decoder.main"}
    assert len(rows) == 13  # text encoders have no layout
    assert all(0 <= error < 1e-4 for row in rows for error in row["error"].values())
    assert all(row["error"] and row["milliseconds"]["median"] > 0 for row in rows)
    assert "torch 2." in capsys.readouterr().out


@pytest.mark.slow
def test_an_engine_that_is_not_there(micro_artifact: Path) -> None:
    with pytest.raises(SystemExit, match=r"no engine vae_encoder; there are text_encoder\.main"):
        step.main([str(micro_artifact), "--component", "vae_encoder"])
