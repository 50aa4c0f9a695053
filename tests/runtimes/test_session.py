"""Pictures and their files, with a stand-in pipeline: what is written while the next one is computed."""

import _thread
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from buildtool.store import manifest as manifests
from buildtool.store.errors import SdxlError
from runtimes import cuda_graph
from runtimes.jobs import Job
from runtimes.names import Names
from runtimes.session import Picture, Planner, Session
from tests.runtimes.stand_in import StandInPipeline, stand_in_artifact


class Pipeline(StandInPipeline):
    """Tells when its calls begin; the third fails. Says that it computes on a GPU."""

    device = torch.device("cuda")

    def __init__(self, folders: list[Path]) -> None:
        super().__init__(folders)
        self.begun = [threading.Event() for _ in range(3)]
        self.count = 0

    def __call__(self, **arguments: Any) -> Any:
        self.count += 1
        self.begun[self.count - 1].set()
        if self.count == 3:
            raise RuntimeError("the third")
        return super().__call__(**arguments)


@pytest.fixture
def planned(tmp_path: Path) -> tuple[Pipeline, Session, list[Picture]]:
    engine = stand_in_artifact(tmp_path / "artifact")
    options = Job(prompt="", seed=1, steps=3, guidance=5.0, guidance_until=1.0, num_images=1)
    planner = Planner([manifests.read(engine)], options, Names(str(tmp_path / "out") + "/"))
    pipeline = Pipeline([engine])
    return pipeline, Session(pipeline, lambda title: nullcontext()), planner.plan([Job(prompt=p) for p in "abc"])


@pytest.mark.parametrize("text", ["ugly", ""])
def test_a_negative_prompt_is_refused_where_the_artifact_takes_none(tmp_path: Path, text: str) -> None:
    engine = stand_in_artifact(tmp_path / "artifact", options={"no_negative_prompt": True})
    options = Job(prompt="", seed=1, steps=3, guidance=5.0, guidance_until=1.0, num_images=1)
    planner = Planner([manifests.read(engine)], options, Names(str(tmp_path / "out") + "/"))
    assert planner.plan([Job(prompt="a")])
    with pytest.raises(SdxlError, match=r"takes none, not even an empty one.* or build: sdxl-build torch"):
        planner.plan([Job(prompt="a", negative_prompt=text)])


def test_a_file_is_written_while_the_next_picture_is_computed(
    planned: tuple[Pipeline, Session, list[Picture]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, session, pictures = planned
    save = session._save

    def late(picture: Picture, image: Any) -> float:
        assert pipeline.begun[picture.index + 1].wait(30), "the next call waits for this file"
        return save(picture, image)

    monkeypatch.setattr(session, "_save", late)
    made = []
    with pytest.raises(RuntimeError, match="the third"):
        for picture in session.render(pictures):
            assert picture.path.is_file()
            made.append(picture.index)
    assert made == [0, 1] and [picture.index for picture in session.saved] == [0, 1]


def test_what_cannot_be_written_ends_the_run_and_what_can_is_there(
    planned: tuple[Pipeline, Session, list[Picture]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, session, pictures = planned
    save = session._save

    def full(picture: Picture, image: Any) -> float:
        if picture.index == 1:
            raise SdxlError("The disk is full.")
        return save(picture, image)

    monkeypatch.setattr(session, "_save", full)
    made = []
    with pytest.raises(SdxlError, match="disk is full"):
        made += [picture.index for picture in session.render(pictures[:2])]
    assert [picture.index for picture in session.saved] == [0] and pictures[0].path.is_file()
    assert pipeline.count == 2


def test_ctrl_c_while_a_file_is_written_answers_for_it(
    planned: tuple[Pipeline, Session, list[Picture]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, session, pictures = planned
    monkeypatch.setattr(pipeline, "device", torch.device("cpu"))
    save = session._save

    def interrupted(picture: Picture, image: Any) -> float:
        time.sleep(0.2)  # until somebody waits for it
        _thread.interrupt_main()
        time.sleep(0.2)
        return save(picture, image)

    monkeypatch.setattr(session, "_save", interrupted)
    made = []
    with pytest.raises(KeyboardInterrupt):
        for picture in session.render(pictures):
            made.append(picture.index)
    assert made == [0] and [picture.index for picture in session.saved] == [0] and pictures[0].path.is_file()


@pytest.mark.parametrize(
    ("count", "last", "unrecorded"), [(1, True, [True]), (2, True, [False, False]), (1, False, [False])]
)
def test_a_single_call_that_is_the_last_records_no_graphs(
    count: int,
    last: bool,
    unrecorded: list[bool],
    planned: tuple[Pipeline, Session, list[Picture]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline, session, pictures = planned
    seen: list[bool] = []
    monkeypatch.setattr(pipeline, "before_call", lambda number: seen.append(cuda_graph._postponed.get()))
    for picture in session.render(pictures[:count], last=last):
        assert picture.path.is_file() and not cuda_graph._postponed.get()
    assert seen == unrecorded and len(session.saved) == count


def test_what_comes_after_a_call_that_failed_may_be_recorded(
    planned: tuple[Pipeline, Session, list[Picture]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, session, pictures = planned
    monkeypatch.setattr(pipeline, "count", 2)
    with pytest.raises(RuntimeError, match="the third"):
        next(session.render(pictures[:1], last=True))
    assert not cuda_graph._postponed.get()
