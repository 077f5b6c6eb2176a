"""Corrupted images as others have published them, from folders that TFDS has prepared."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from experiments.corruption_scores import Cell
from rain_jax import data
from rain_jax.checks import UsageError

# Names of TFDS that differ from the paper's, in `cifar10_corrupted` alone.
_TFDS_NAMES = {"glass_blur": "frosted_glass_blur", "elastic_transform": "elastic"}


def published_sources(
    name: str, cells: Iterable[Cell], like: data.Source, data_dir: str | None
) -> dict[Cell, data.Source]:
    """The images of all cells in the data set `name` of TFDS, of the shape and classes of `like`.

    Raises `UsageError` for folders that are not there, and for images of another kind.
    """
    found = {}
    for family, severity in cells:
        known = _TFDS_NAMES.get(family, family) if name.startswith("cifar10") else family
        cell = _tested(f"{name}/{known}_{severity}", data_dir)
        if (cell.shape, cell.classes) != (like.shape, like.classes):
            raise UsageError(
                f"config.published=tfds:{name}: images {list(cell.shape)} of {cell.classes} "
                f"classes: expected {list(like.shape)} of {like.classes}, as {like.name} has"
            )
        found[family, severity] = cell
    return found


def _tested(name: str, data_dir: str | None) -> data.Source:
    """The one split of a TFDS data set without training images, which `data.load` would ask for."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder

    folder = str(Path(data_dir).expanduser()) if data_dir else tfds.core.constants.DATA_DIR
    try:
        builder = read_only_builder.builder_from_files(name, data_dir=folder)
        split = "test" if "test" in builder.info.splits else "validation"
        records = builder.as_data_source(split)
    except Exception as error:  # by what is missing or damaged, TFDS raises many kinds
        raise UsageError(
            f"config.published: {name} cannot be opened in {folder}: expected it prepared once, "
            f"where TensorFlow is installed: `tfds build {name} --file_format=array_record "
            f"--data_dir={folder}` ({' '.join(str(error).split())[:200]})"
        ) from error
    features = builder.info.features

    def read(place: int) -> tuple[np.ndarray, int]:
        example = records[place]
        return np.asarray(example["image"]), int(example["label"])

    label = features["label"]
    return data.Source(
        f"tfds:{name}", len(records), features["image"].shape, label.num_classes,
        tuple(label.names), read,
    )  # fmt: skip
