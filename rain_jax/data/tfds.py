"""Sources from data sets that TFDS has prepared, read without TensorFlow."""

import os
import re
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from rain_jax.checks import UsageError, nearest
from rain_jax.data.source import MARGIN, Source, Splits, one_line, resized


@dataclass(frozen=True)
class _FromRecords:
    """Reads a TFDS data source, and knows which file each record is in."""

    records: Any
    image: str
    label: str
    files: tuple[str, ...]
    ends: tuple[int, ...]

    def __call__(self, place: int) -> tuple[np.ndarray, int]:
        file = self.files[bisect_right(self.ends, place)]
        try:
            example = self.records[place]
            image, label = np.asarray(example[self.image]), int(example[self.label])
        # What a damaged file raises depends on where the damage is: in the container, the
        # example or the compressed image.
        except Exception as error:
            raise UsageError(
                f"{file}: image {place} cannot be read: expected an undamaged record file; prepare "
                f"the data set again ({one_line(error)})"
            ) from error
        return image, label


def from_tfds(name: str, data_dir: str | os.PathLike[str] | None, resize: int | None) -> Splits:
    import tensorflow_datasets as tfds

    # Built from the files and not from the data set's code: it works for data sets whose code is
    # not there, reads any prepared version, and asks no server anything.
    from tensorflow_datasets.core import read_only_builder

    folder = os.path.expanduser(data_dir) if data_dir else tfds.core.constants.DATA_DIR
    try:
        builder = read_only_builder.builder_from_files(name, data_dir=folder)
    except tfds.core.DatasetNotFoundError as error:
        raise _not_prepared(name, str(folder)) from error
    except Exception as error:
        raise UsageError(
            f"tfds:{name}: cannot be opened in {folder}: expected NAME, NAME/CONFIG or "
            f"NAME:VERSION of an undamaged data set ({one_line(error)})"
        ) from error

    info = builder.info
    image_key, label_key = _image_and_label(f"tfds:{name}", info, tfds)
    shape, classes = info.features[image_key].shape, info.features[label_key].num_classes
    if resize is None and None in shape:
        raise UsageError(
            f"tfds:{name}: images of shape {shape} vary in size: expected resize=N, such as 224"
        )
    class_names = tuple(info.features[label_key].names)

    def split_source(split: str) -> Source:
        try:
            records = builder.as_data_source(split)
        except (NotImplementedError, ValueError) as error:
            kind = info.file_format.value if info.file_format else "no known format"
            raise UsageError(
                f"tfds:{name}: prepared as {kind} in {builder.data_dir}: expected array_record, "
                f"which is read without TensorFlow; {_how_to_prepare(name, str(folder))}"
            ) from error
        pieces = info.splits[split].file_instructions
        for piece in pieces:
            if not os.path.exists(piece.filename) and "://" not in str(piece.filename):
                raise UsageError(
                    f"{piece.filename}: no such file: expected the {split} images of {name}"
                )
        reader = _FromRecords(
            records,
            image_key,
            label_key,
            tuple(str(piece.filename) for piece in pieces),
            tuple(accumulate(piece.take for piece in pieces)),
        )
        if not len(records):
            raise UsageError(f"tfds:{name}: no images in the split {split!r}: expected some")
        source = Source(f"tfds:{name}", len(records), shape, classes, class_names, reader)
        if resize is None:
            return source
        return resized(source, resize, round(resize * MARGIN) if None in shape else resize)

    present = [split for split in ("train", "validation", "test") if split in info.splits]
    if "train" not in present or len(present) == 1:
        raise UsageError(
            f"tfds:{name}: splits {', '.join(map(str, info.splits)) or 'none'}: expected train, "
            f"and test or validation"
        )
    sources = {split: split_source(split) for split in present}
    # Read now, so that a damaged data set is met before training has begun. The test images of
    # ImageNet, among others, carry the label -1.
    first = {split: source.read(0)[1] for split, source in sources.items()}
    if first.get("test", 0) < 0:
        del sources["test"]
    if len(sources) == 1:
        raise UsageError(
            f"tfds:{name}: no labels in test: expected them there or a validation split"
        )
    test = sources.pop("test", None) or sources.pop("validation")
    return Splits(sources["train"], sources.get("validation"), test)


def _image_and_label(where: str, info: Any, tfds: Any) -> tuple[str, str]:
    """The names of the two features: the supervised pair of the data set, or the usual names."""
    features = info.features
    names = list(features) if isinstance(features, tfds.features.FeaturesDict) else []
    pair = info.supervised_keys
    if not (isinstance(pair, tuple) and len(pair) == 2 and all(key in names for key in pair)):
        pair = ("image", "label")
    image, label = pair
    if (
        image in names
        and label in names
        and isinstance(features[image], tfds.features.Image)
        and isinstance(features[label], tfds.features.ClassLabel)
        and features[image].np_dtype == np.uint8
    ):
        return image, label
    have = ", ".join(f"{key}: {type(features[key]).__name__}" for key in names) or repr(features)
    raise UsageError(
        f"{where}: features {have}: expected image: Image (uint8) and label: ClassLabel"
    )


def _not_prepared(name: str, folder: str) -> UsageError:
    import tensorflow_datasets as tfds

    base = re.split(r"[/:]", name)[0]
    there = Path(folder) / base
    if there.is_dir():
        # At most NAME/CONFIG/VERSION: what is there is shown as it would be asked for.
        found = sorted(
            str(p.parent.relative_to(folder)).replace(os.sep, "/")
            for p in there.glob("**/features.json")
        )
        found = [re.sub(r"/(\d+\.\d+\.\d+)$", r":\1", f) for f in found]
        return UsageError(
            f"tfds:{name}: not prepared in {there}: expected one of {', '.join(found)}"
            if found
            else f"tfds:{name}: nothing prepared in {there}: {_how_to_prepare(name, folder)}"
        )
    try:
        beside = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    except OSError:
        beside = []
    known = tfds.list_builders(with_community_datasets=False)
    if base not in known:
        return UsageError(
            f"tfds:{name}: TFDS {tfds.__version__} knows no data set {base!r} and {folder} has "
            f"none: expected one of tfds.list_builders(){nearest(base, [*known, *beside])}"
        )
    return UsageError(
        f"tfds:{name}: not prepared: looked in {folder}; {_how_to_prepare(name, folder)}"
    )


def _how_to_prepare(name: str, folder: str) -> str:
    base = re.split(r"[/:]", name)[0]
    steps = (
        f"expected it prepared once, where TensorFlow is installed: `tfds build {name} "
        f"--file_format=array_record --data_dir={folder}`"
    )
    if base in ("mnist", "fashion_mnist", "cifar10"):
        steps += (
            f", or from its original files and without TensorFlow: `python -m experiments.prepare "
            f"--dataset={base} --source=FOLDER --data_dir={folder}`"
        )
    return steps
