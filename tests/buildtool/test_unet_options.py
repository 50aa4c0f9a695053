"""``--freeu``, ``--deepcache``, ``--segments``: their values, what they are refused for, and which keys they change."""

from typing import Any

import pytest

from buildtool import models, plan, unet_options
from buildtool.plan import Plan, Spec
from buildtool.store.errors import SdxlError
from buildtool.store.key import differences

SDXL = models.resolve("tiny").configs["unet"]


def one(**changes: Any) -> Plan:
    (planned,) = plan.plan(Spec(**{"backend": "torch", "model": "tiny", "gpu": "cpu", **changes}))
    return planned


def changed(a: Plan, b: Plan) -> set[str]:
    return {name for name in plan.COMPONENTS if a.code_keys[name].digest != b.code_keys[name].digest}


def test_freeus_values_are_in_both_keys_and_change_the_unets_code_alone() -> None:
    plain, other = one(), one(freeu="0.9,0.2,1.3,1.4")
    assert other.key.options["freeu"] == {"s1": 0.9, "s2": 0.2, "b1": 1.3, "b2": 1.4}
    assert {n.rpartition(".")[0] for n in differences(plain.key, other.key)} == {"options.freeu"}
    assert changed(plain, other) == {"unet"}
    assert changed(other, one(freeu="0.9,0.2,1.3,1.5")) == {"unet"}
    assert one(freeu="0.90, .2,1.3,1.4").key == other.key


def test_deepcaches_branch_is_compiled_and_its_interval_is_not() -> None:
    plain, two, three, deeper = one(), one(deepcache="2"), one(deepcache="3:0"), one(deepcache="3:4")
    assert three.key.options["deepcache"] == {"interval": 3, "branch": 0}
    assert len({p.key.digest for p in (plain, two, three, deeper)}) == 4
    assert changed(plain, two) == changed(three, deeper) == {"unet"}
    assert changed(two, three) == set()


def test_code_that_holds_weights_has_the_options_of_the_unet_in_the_unets_key() -> None:
    from exporters import registry

    row = registry.BACKENDS["trt"]
    options = {"flavor": "rtx", "freeu": {"s1": 1.0}}
    assert plan._code_options(row, options, "digest", False) == {"flavor": "rtx", "weights": "digest"}
    assert plan._unet_code_options(options) == {"freeu": {"s1": 1.0}}


def test_segments_are_in_both_keys_and_change_the_unets_code_alone() -> None:
    plain, two, three = one(), one(segments=2), one(segments=3)
    assert three.key.options["segments"] == 3
    assert {n for n in differences(two.key, three.key)} == {"options.segments"}
    assert changed(plain, two) == changed(two, three) == {"unet"}
    assert changed(three, one(segments=3, freeu="0.9,0.2,1.3,1.4")) == {"unet"}


def test_a_unet_is_cut_into_as_many_parts_as_it_has_layers() -> None:
    assert unet_options.segments(32, SDXL) == 32
    for count in (1, 33):
        with pytest.raises(SdxlError, match=f"--segments {count} was asked for; this UNet can be cut into 2 to 32"):
            unet_options.segments(count, SDXL)
    with pytest.raises(SdxlError, match="--segments knows SDXL's blocks; this checkpoint's UNet has UNetMidBlock2D"):
        unet_options.segments(2, {**SDXL, "mid_block_type": "UNetMidBlock2D"})


def test_segments_and_deepcache_are_refused_together() -> None:
    with pytest.raises(SdxlError, match="--segments 2 and --deepcache 3 cut the UNet in two ways"):
        one(segments=2, deepcache="3")


def test_no_negative_prompt_changes_the_unets_code_alone() -> None:
    plain, other = one(), one(no_negative_prompt=True)
    assert {n.rpartition(".")[0] for n in differences(plain.key, other.key)} == {"options"}
    assert changed(plain, other) == {"unet"}
    with pytest.raises(SdxlError, match="--no-negative-prompt and --segments don't go together"):
        one(no_negative_prompt=True, segments=3)
    with pytest.raises(SdxlError, match="this one's is an empty text"):
        one(no_negative_prompt=True, model="tiny-refiner")


@pytest.mark.parametrize(
    "options",
    [{"freeu": "0.9,0.2,1.3,1.4"}, {"deepcache": "3:4"}, {"segments": 3}, {"no_negative_prompt": True}],
)
def test_the_command_builds_the_same_key(options: dict[str, Any]) -> None:
    from buildtool.cli import torch_command

    planned = one(**options)
    params = torch_command.make_context("torch", list(planned.command[2:])).params
    (again,) = plan.plan(Spec("torch", **{k: v for k, v in params.items() if k not in ("dry_run", "as_json")}))
    assert again.key == planned.key
    assert not {"--freeu", "--deepcache", "--segments", "--no-negative-prompt"} & set(one().command)


@pytest.mark.parametrize("text", ["", "0.9,0.2,1.3", "0.9,0.2,1.3,1.4,1", "a,b,c,d", "0,0.2,1.3,1.4", "nan,1,1,1"])
def test_freeus_values_are_four_numbers_above_0(text: str) -> None:
    with pytest.raises(SdxlError, match="--freeu takes s1,s2,b1,b2"):
        one(freeu=text)


@pytest.mark.parametrize("kinds", [["UpBlock2D"], ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"], []])
def test_freeu_is_refused_for_a_unet_that_it_would_not_change(kinds: list[str]) -> None:
    with pytest.raises(SdxlError, match="--freeu scales what goes into a UNet's first two up blocks"):
        unet_options.freeu("0.9,0.2,1.3,1.4", {**SDXL, "up_block_types": kinds})


@pytest.mark.parametrize("text", ["", "1", "0", "-2", "2:", "x", "2:x", "2:-1", ":1", "2.5"])
def test_an_interval_is_2_steps_or_more(text: str) -> None:
    with pytest.raises(SdxlError, match=r"--deepcache takes INTERVAL or INTERVAL:BRANCH"):
        one(deepcache=text)


def test_a_branch_is_one_of_the_skip_connections() -> None:
    assert unet_options.deepcache("2:8", SDXL) == {"interval": 2, "branch": 8}
    with pytest.raises(SdxlError, match=r"branch 9; this UNet's are 0, the outermost, to 8\."):
        unet_options.deepcache("2:9", SDXL)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "has AttnDownBlock2D"),
        ({"mid_block_type": "UNetMidBlock2D"}, "has UNetMidBlock2D"),
        ({"layers_per_block": [2, 3, 2]}, r"blocks of \[2, 3, 2\] layers"),
    ],
)
def test_deepcache_is_refused_for_other_unets(change: dict[str, Any], words: str) -> None:
    with pytest.raises(SdxlError, match=words):
        unet_options.deepcache("2", {**SDXL, **change})
