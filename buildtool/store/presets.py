"""Named sets of options: what ``--preset`` of ``sdxl-build`` and of ``sdxl-run`` stands for.

A preset is no ingredient of a key, its options are; an option that is given beside it wins.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """Options by the names that the command lines' functions know them under."""

    build: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)


PRESETS: Mapping[str, Preset] = {
    "fastest": Preset(build={"vae": "tiny"}, run={"steps": 30, "guidance_until": 0.75}),
    "quality": Preset(build={"vae": "default"}, run={"steps": 50, "guidance_until": 1.0}),
    "vram8": Preset(run={"memory": "staged"}),
    "vram6": Preset(build={"segments": 8, "vae": "fp16-fix"}, run={"memory": "sequential"}),
    "vram4": Preset(build={"segments": 8, "vae": "tiny"}, run={"memory": "sequential"}),
}


def told(options: Mapping[str, Any]) -> str:
    """``--steps 30 --guidance-until 0.75``."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())
