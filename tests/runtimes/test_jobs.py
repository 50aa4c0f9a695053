import pytest

from buildtool.store.errors import SdxlError
from runtimes import jobs
from runtimes.jobs import Job


def read(tmp_path, text, name="prompts.txt"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return jobs.read(path)


def test_text_is_one_prompt_a_line(tmp_path):
    text = "\ufeffa red fox\r\n\n   \n# not a comment\n  {masterpiece}, a castle \n"
    assert [job.prompt for job in read(tmp_path, text)] == ["a red fox", "# not a comment", "{masterpiece}, a castle"]
    assert [job.prompt for job in read(tmp_path, "{masterpiece}, a castle")] == ["{masterpiece}, a castle"]


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl", "prompts.json"])
def test_json_lines_carry_settings(tmp_path, name):
    text = '\n{"prompt": "a fox", "seed": 3, "width": 64, "height": 32, "negative_prompt": null}\n{ "prompt": "b"}\n'
    first, second = read(tmp_path, text, name)
    assert first == Job(prompt="a fox", seed=3, width=64, height=32, negative_prompt=None)
    assert second == Job(prompt="b") and second.negative_prompt is not None


def test_a_json_array_will_do(tmp_path):
    text = '[{"prompt": "a",\n "guidance_until": 0.75},\n {"prompt": "b", "num_images": 2, "out": "b.png"}]'
    assert read(tmp_path, text, "p.json") == [
        Job(prompt="a", guidance_until=0.75),
        Job(prompt="b", num_images=2, out="b.png"),
    ]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"prompt": "a"', "JSON"),
        ('"a"', "object"),
        ("{}", "prompt"),
        ('{"prompt": 1}', "prompt"),
        ('{"prompt": "a", "sede": 1}', "sede"),
        ('{"prompt": "a", "seed": -1}', "seed"),
        ('{"prompt": "a", "steps": 0}', "steps"),
        ('{"prompt": "a", "steps": 1.5}', "steps"),
        ('{"prompt": "a", "guidance": 1e999}', "guidance|range"),
        ('{"prompt": "a", "guidance_until": 1.1}', "guidance_until"),
        ('{"prompt": "a", "num_images": 0}', "num_images"),
        ('{"prompt": "half a pair \\ud83e"}', "JSON|Unicode"),
        (b'{"prompt": "\xff"}', "utf-8|UTF-8"),
    ],
)
def test_a_wrong_line_says_what_is_wrong(line, named):
    with pytest.raises(SdxlError, match=named) as caught:
        jobs.parse_line(line)
    assert "\n" not in str(caught.value)


def test_a_wrong_line_of_a_file_is_named_by_its_number(tmp_path):
    with pytest.raises(SdxlError, match=r"p\.jsonl, line 3: .*sede"):
        read(tmp_path, '{"prompt": "a"}\n\n{"prompt": "b", "sede": 1}\n', "p.jsonl")
    with pytest.raises(SdxlError, match=r"p\.json: .*seed"):
        read(tmp_path, '[{"prompt": "a"}, {"prompt": "b", "seed": "x"}]', "p.json")


@pytest.mark.parametrize("text", ["", "\n \n", "\ufeff"])
@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_an_empty_file_is_one_line(tmp_path, text, name):
    with pytest.raises(SdxlError, match="holds no prompt"):
        read(tmp_path, text, name)


def test_an_empty_array_is_one_line(tmp_path):
    with pytest.raises(SdxlError, match="holds no prompt"):
        read(tmp_path, "[]", "p.json")


def test_files_that_cannot_be_read_are_one_line(tmp_path):
    with pytest.raises(SdxlError, match="does not exist"):
        jobs.read(tmp_path / "none.txt")
    with pytest.raises(SdxlError, match="cannot be read: Is a directory"):
        jobs.read(tmp_path)
    with pytest.raises(SdxlError, match="not UTF-8"):
        read(tmp_path, b"caf\xe9\n")
