from pathlib import Path

import pytest

from buildtool.store.errors import SdxlError
from runtimes import names
from runtimes.names import Names

FIELDS = {"seed": 5, "index": 0, "prompt": "A red Fox!", "width": 64, "height": 32, "steps": 20, "guidance": 5.0}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_default_name_has_the_seed():
    assert Names(None).path(None, FIELDS) == Path("sdxl-5.png")


@pytest.mark.parametrize(
    ("out", "path"),
    [
        ("fox.png", "fox.png"),
        ("FOX.PNG", "FOX.PNG"),
        ("new/", "new/sdxl-5.png"),
        ("{prompt}/{seed:04d}-{index}.png", "a-red-fox/0005-0.png"),
        ("{width}x{height}-{steps}-{guidance:g}.png", "64x32-20-5.png"),
        ("{{braces}}.png", "{braces}.png"),
        ("/abs/fox.png", "/abs/fox.png"),
    ],
)
def test_patterns(out, path):
    assert Names(out).path(None, FIELDS) == Path(path)
    assert Names(None).path(out, FIELDS) == Path(path)  # for one picture alone


def test_a_folder_that_is_there_needs_no_slash():
    Path("{odd} folder").mkdir()
    assert Names("{odd} folder").path(None, FIELDS) == Path("{odd} folder/sdxl-5.png")
    assert Names(".").path(None, FIELDS) == Path("sdxl-5.png")


def test_no_two_pictures_of_a_run_get_one_name():
    own = Names("fox.png")
    assert [own.path(None, FIELDS).name for _ in range(3)] == ["fox.png", "fox-2.png", "fox-3.png"]
    assert own.path("fox-2.png", FIELDS) == Path("fox-2-2.png")
    assert own.path("./fox.png", FIELDS) == Path("fox-4.png")
    Path("folder").mkdir()
    Path("link").symlink_to("folder")
    assert own.path("folder/../fox.png", FIELDS) == Path("folder/../fox-5.png")
    assert [own.path(f"{folder}/cat.png", FIELDS).name for folder in ("folder", "link")] == ["cat.png", "cat-2.png"]


def test_only_a_name_that_was_asked_for_replaces_an_older_file():
    for name in ("fox.png", "sdxl-5.png"):
        Path(name).touch()
    assert Names("fox.png").path(None, FIELDS) == Path("fox.png")
    assert Names(None).path(None, FIELDS) == Path("sdxl-5-2.png")
    assert Names("./").path(None, FIELDS) == Path("sdxl-5-2.png")


@pytest.mark.parametrize(
    ("out", "named"),
    [
        ("fox.jpg", "does not end in .png"),
        ("fox", "For a folder, end it in /"),
        ("{sede}.png", "unknown placeholder {sede}"),
        ("{}.png", "Placeholders are {seed}"),
        ("{prompt.__class__}.png", "unknown placeholder"),
        ("{seed.png", "not a valid pattern"),
        ("{seed:q}.png", "not a valid pattern"),
        ("", "empty"),
    ],
)
def test_wrong_patterns_are_refused(out, named):
    for make in (lambda: Names(out), lambda: Names(None).path(out, FIELDS)):
        with pytest.raises(SdxlError, match=named) as caught:
            make()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A red Fox!", "a-red-fox"),
        ("../../etc/passwd", "etc-passwd"),
        ("漢字 の 狐", "漢字-の-狐"),
        ("!!", "untitled"),
        ("", "untitled"),
        ("a" * 300, "a" * 80),
        ("狐" * 300, "狐" * 26),
    ],
)
def test_a_prompt_becomes_a_short_plain_name(prompt, name):
    assert names.slug(prompt) == name


def test_a_file_appears_whole_or_not_at_all(monkeypatch):
    names.write(Path("new/fox.png"), b"data")
    assert Path("new/fox.png").read_bytes() == b"data"

    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SdxlError, match=r"new/fox\.png cannot be written: No space left on device\. .*--out"):
        names.write(Path("new/fox.png"), b"other")
    assert Path("new/fox.png").read_bytes() == b"data"
    assert [path.name for path in Path("new").iterdir()] == ["fox.png"]


def test_a_folder_is_tried_out_beforehand():
    names.check_folder(Path("a/b"))
    assert list(Path("a/b").iterdir()) == []
    Path("file").touch()
    with pytest.raises(SdxlError, match="cannot be written"):
        names.check_folder(Path("file/below"))
    with pytest.raises(SdxlError, match="/proc/none cannot be written"):
        names.check_folder(Path("/proc/none"))
