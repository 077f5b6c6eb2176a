"""Writes small TFDS directories in array_record, without TensorFlow, for the tests to read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.prepare import png

Example = tuple[np.ndarray, int]


def image_features(shape: Sequence[int | None], classes: Sequence[str]) -> dict[str, Any]:
    """The features of a classification data set, to be changed at will."""
    import tensorflow_datasets as tfds

    label = tfds.features.ClassLabel(names=list(classes))
    return {"image": tfds.features.Image(shape=tuple(shape)), "label": label}


def write(
    data_dir: Path,
    dataset: str,
    features: dict[str, Any],
    splits: dict[str, Sequence[Example]],
    shards: int = 1,
) -> Path:
    """Writes (uint8 image, label) examples under the names of the two features, in that order."""
    import tensorflow_datasets as tfds

    image_name, label_name = features

    with tfds.core.registered.skip_registration():

        class Builder(tfds.core.GeneratorBasedBuilder):
            name = dataset
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features)
                )

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(split) for split in splits}

            def _generate_examples(self, split):
                for place, (image, label) in enumerate(splits[split]):
                    yield place, {image_name: png(image), label_name: label}

        builder = Builder(data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False, num_shards=shards)
    )
    return data_dir / dataset / "1.0.0"
