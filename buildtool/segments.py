"""A variant in segments, put together of its compiled parts."""

import msgspec

from buildtool.store.manifest import Segment, TensorSpec, Variant


def appended(before: Variant | None, part: Variant) -> Variant:
    """A variant with one more part, which was compiled as if it were a variant.

    The variant takes what none of its parts makes, and gives what the last one gives.
    """
    segment = Segment(file=part.file, inputs=part.inputs, outputs=part.outputs, constants=part.constants)
    earlier = () if before is None else before.segments
    made = {spec.name: spec for each in earlier for spec in each.outputs}
    taken = {} if before is None else {spec.name: spec for spec in before.inputs}
    for spec in part.inputs:
        known = made[spec.name] if spec.name in made else taken.setdefault(spec.name, spec)
        if not _same(known, spec):  # compiled code would compute nonsense from it
            raise RuntimeError(f"{part.file} takes {spec}; what comes before it gives {known}")
    return msgspec.structs.replace(
        part, file="", inputs=tuple(taken.values()), constants={}, segments=(*earlier, segment)
    )


def _same(one: TensorSpec, two: TensorSpec) -> bool:
    """Whether two tensors lie in memory alike; strides of axes of size 1 mean nothing."""
    strides = zip(one.shape, one.stride, two.stride, strict=False)
    return (one.shape, one.dtype) == (two.shape, two.dtype) and all(size == 1 or a == b for size, a, b in strides)
