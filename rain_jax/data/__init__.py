"""Labelled images: where they come from, how they arrive in batches, how they are augmented.

`load` opens a data set by its name (digits that need no download, TFDS without TensorFlow, arrays,
folders) as the sources that `source` defines, `feeds` turns a source into batches (on the device,
in order, or streamed by grain), `augment` changes one image. TFDS, grain, scikit-learn and pillow
are imported where they are used and nowhere else in the package.
"""

from rain_jax.data.augment import augment
from rain_jax.data.feeds import (
    as_float,
    epoch_order,
    evaluation_batches,
    parts_of,
    shared_order,
    stream,
    take,
)
from rain_jax.data.load import load
from rain_jax.data.source import (
    Extra,
    Source,
    Splits,
    at_most,
    first,
    from_arrays,
    pooled,
    resident,
)

__all__ = [
    "Extra",
    "Source",
    "Splits",
    "as_float",
    "at_most",
    "augment",
    "epoch_order",
    "evaluation_batches",
    "first",
    "from_arrays",
    "load",
    "parts_of",
    "pooled",
    "resident",
    "shared_order",
    "stream",
    "take",
]
