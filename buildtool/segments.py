"""A variant in segments, put together of its compiled parts."""

import msgspec

from buildtool.store.manifest import Segment, Variant


def appended(before: Variant | None, part: Variant) -> Variant:
    """A variant with one more part, compiled as if it were a variant.

    The variant takes what none of its parts makes, and gives what the last one gives.
    """
    segment = Segment(file=part.file, inputs=part.inputs, outputs=part.outputs, constants=part.constants)
    earlier = () if before is None else before.segments
    made = {spec.name: spec for each in earlier for spec in each.outputs}
    taken = {} if before is None else {spec.name: spec for spec in before.inputs}
    for spec in part.inputs:
        known = made.get(spec.name, taken.setdefault(spec.name, spec) if spec.name not in made else spec)
        if known != spec:
            raise RuntimeError(f"{part.file} takes {spec}; what comes before it gives {known}")
    return msgspec.structs.replace(
        part, file="", inputs=tuple(taken.values()), constants={}, segments=(*earlier, segment)
    )
