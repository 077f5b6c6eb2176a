"""Turns the original files of MNIST, Fashion-MNIST, CIFAR-10 or STL-10 into a TFDS directory.

    python -m experiments.prepare --dataset=mnist --source=FOLDER --data_dir=OUT

Then `tfds:mnist` with `data_dir=OUT` reads it. It needs neither TensorFlow nor a network, where
TFDS's own `download_and_prepare` needs both; what it writes has the name, the version, the
features and the examples of TFDS's own. FOLDER holds

- mnist, fashion_mnist: the four idx files `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`,
  `t10k-images-idx3-ubyte`, `t10k-labels-idx1-ubyte`, each as it is or gzipped (`.gz`);
- cifar10: `data_batch_1` .. `data_batch_5` and `test_batch`, as `.bin` (the binary version),
  without a suffix (the Python version) or as `.webp` (lossless mosaics of 500 rows by 20 columns,
  with `labels.npy`, uint8 [60000]); also in a `cifar-10-batches-bin` or `-py` within;
- stl10: `train_X.bin`, `train_y.bin`, `test_X.bin`, `test_y.bin`, also in an `stl10_binary` within
  (the unlabelled images are left out);
- stl10_part: `train_X.bin` and `train_y.bin` of STL-10, or `train_0.webp` .. `train_3.webp`,
  lossless mosaics of 100 rows by 10 columns of their first 4,000 images, with `train_labels.npy`,
  uint8 [4000]. Of these 4,000 the last 1,000 become its test images: a set of our own cut, not
  comparable with STL-10's.

`--limit=N` writes the first N images of each split at most.
"""

import argparse
import gzip
import io
import pickle
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rain_jax.checks import UsageError, nearest, one_of, within

Split = tuple[np.ndarray, np.ndarray]  # images uint8 [N, H, W, C], labels uint8 [N]

FASHION = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
OBJECTS = "airplane,automobile,bird,cat,deer,dog,frog,horse,ship,truck"
CREATURES = "airplane,bird,car,cat,deer,dog,horse,monkey,ship,truck"
CLASSES = {
    "mnist": [str(digit) for digit in range(10)],
    "fashion_mnist": FASHION.split(","),
    "cifar10": OBJECTS.split(","),
    "stl10": CREATURES.split(","),
    "stl10_part": CREATURES.split(","),
}
VERSIONS = {  # those of TFDS, and one for our own cut
    "mnist": "3.0.1",
    "fashion_mnist": "3.0.1",
    "cifar10": "3.0.2",
    "stl10": "1.0.0",
    "stl10_part": "1.0.0",
}
PART, PART_TEST = 4000, 1000  # images of stl10_part, and how many of them are for testing


def read(dataset: str, source: Path, limit: int | None = None) -> dict[str, Split]:
    """The original images and labels of "train" and "test", the first `limit` in their order.

    Of CIFAR-10's files only those are read, and need to be there, that hold them.
    """
    if not source.is_dir():
        siblings = [p.name for p in source.parent.iterdir()] if source.parent.is_dir() else []
        hint = nearest(source.name, siblings)
        raise UsageError(
            f"source={str(source)!r}: no such folder: expected {dataset}'s files{hint}"
        )
    readers: dict[str, Callable[[Path], dict[str, Split]]] = {
        "cifar10": lambda folder: _read_cifar10(folder, limit),
        "stl10": _read_stl10,
        "stl10_part": _read_stl10_part,
    }
    splits = readers.get(dataset, _read_mnist)(source)
    for split, (image, label) in splits.items():
        largest = label.max(initial=0)
        if not 0 < len(image) == len(label) or largest > 9:
            raise UsageError(
                f"source={str(source)!r}: {len(image)} images and {len(label)} labels up to "
                f"{largest} in {split}: expected as many of each, 0 to 9"
            )
    return {split: (image[:limit], label[:limit]) for split, (image, label) in splits.items()}


def prepare(
    dataset: str, source: str | Path, data_dir: str | Path, limit: int | None = None
) -> Path:
    """Writes the TFDS directory, in array_record, and returns its path.

    Raises `UsageError` where FOLDER lacks a file, a file is damaged, or OUT has it already.
    """
    import tensorflow_datasets as tfds

    one_of("dataset", dataset, CLASSES)
    if limit is not None:
        within("limit", limit, 1)
    out = Path(data_dir).expanduser().resolve()
    folder = out / dataset / VERSIONS[dataset]
    if folder.exists():
        raise UsageError(f"data_dir={str(data_dir)!r}: {folder} exists: expected none; remove it")
    splits = read(dataset, Path(source).expanduser(), limit)
    # Unregistered, so that it does not stand in the way of TFDS's own builder of that name.
    with tfds.core.registered.skip_registration():

        class Builder(tfds.core.GeneratorBasedBuilder):
            name = dataset
            VERSION = tfds.core.Version(VERSIONS[dataset])

            def _info(self) -> Any:
                features = {
                    "image": tfds.features.Image(shape=splits["test"][0].shape[1:]),
                    "label": tfds.features.ClassLabel(names=CLASSES[dataset]),
                }
                if dataset == "cifar10":
                    features["id"] = tfds.features.Text()
                return tfds.core.DatasetInfo(
                    builder=self,
                    features=tfds.features.FeaturesDict(features),
                    supervised_keys=("image", "label"),
                    description=f"{dataset}, from its original files.",
                )

            def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
                return {split: self._generate_examples(split) for split in splits}

            def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
                for place, (image, label) in enumerate(zip(*splits[split], strict=True)):
                    # Encoded here: TFDS encodes arrays with TensorFlow, and passes bytes on.
                    example = {"image": png(image), "label": int(label)}
                    if dataset == "cifar10":
                        example["id"] = f"{split}_{place:05d}"
                    yield place, example

        builder = Builder(data_dir=out, file_format="array_record")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    return folder


def png(image: np.ndarray) -> bytes:
    """The lossless PNG of one uint8 image [H, W, 1] or [H, W, 3]."""
    from PIL import Image as pillow

    buffer = io.BytesIO()
    pillow.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()


def _read_mnist(source: Path) -> dict[str, Split]:
    def part(prefix: str) -> Split:
        image = _idx(source, f"{prefix}-images-idx3-ubyte")[..., None]
        return image, _idx(source, f"{prefix}-labels-idx1-ubyte")

    return {"train": part("train"), "test": part("t10k")}


def _idx(source: Path, name: str) -> np.ndarray:
    """An idx file of bytes: two zeros, the type 8, the rank, the sizes big-endian, the values."""
    rank = int(name[-7])
    path = next((p for p in (source / name, source / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise UsageError(f"source={str(source)!r}: no {name} or {name}.gz: expected one of them")
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        header, values = content[: 4 + 4 * rank], content[4 + 4 * rank :]
        shape = tuple(np.frombuffer(header[4:], ">u4").astype(int))
        if header[:4] != bytes((0, 0, 8, rank)):
            raise ValueError(f"it begins with {header[:4].hex()}")
        return np.frombuffer(values, np.uint8).reshape(shape)
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise UsageError(
            f"{path}: damaged: expected an idx file of rank {rank} ({error})"
        ) from error


def _read_cifar10(source: Path, limit: int | None) -> dict[str, Split]:
    train = 5 if limit is None else min(5, -(-limit // 10_000))  # files, of 10,000 images
    places = [*range(train), 5]
    names = [f"data_batch_{place + 1}" if place < 5 else "test_batch" for place in places]
    kinds = {".bin": _cifar_binary, "": _cifar_pickle, ".webp": _cifar_mosaic}
    for folder in (source, source / "cifar-10-batches-bin", source / "cifar-10-batches-py"):
        for suffix, read_one in kinds.items():
            paths = [folder / f"{name}{suffix}" for name in names]
            if not any(path.is_file() for path in paths):
                continue
            for path in paths:
                if not path.is_file():
                    raise UsageError(
                        f"source={str(source)!r}: no {path.name}: expected it in {folder}"
                    )
            batches = []
            for place, path in zip(places, paths, strict=True):
                try:
                    batches.append(read_one(path, place))
                except UsageError:
                    raise
                # Unpickling alone may raise anything, pillow much.
                except Exception as error:
                    raise UsageError(
                        f"{path}: damaged: expected 10,000 images and labels of CIFAR-10 ({error})"
                    ) from error
            image, label = (np.concatenate(part) for part in zip(*batches, strict=True))
            end = train * 10_000
            return {"train": (image[:end], label[:end]), "test": (image[end:], label[end:])}
    archives = ", ".join(path.name for path in source.glob("cifar-10-*.tar*"))
    raise UsageError(
        f"source={str(source)!r}: no data_batch_1.bin, data_batch_1 or data_batch_1.webp: expected "
        f"CIFAR-10's files{f'; unpack {archives} first' if archives else ''}"
    )


def _cifar_binary(path: Path, place: int) -> Split:
    rows = np.frombuffer(path.read_bytes(), np.uint8).reshape(10_000, 3073)
    return rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0]


def _cifar_pickle(path: Path, place: int) -> Split:
    with open(path, "rb") as file:
        batch = _ArraysOnly(file, encoding="bytes").load()
    rows = np.asarray(batch[b"data"], np.uint8).reshape(10_000, 3, 32, 32)
    return rows.transpose(0, 2, 3, 1), np.asarray(batch[b"labels"]).astype(np.uint8)


class _ArraysOnly(pickle.Unpickler):
    """Loads arrays and plain values: a pickle of anything else could run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # bytes, as Python 3 writes them for Python 2
            return lambda text, encoding: text.encode(encoding)
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


def _cifar_mosaic(path: Path, place: int) -> Split:
    from PIL import Image as pillow

    with pillow.open(path) as picture:
        mosaic = np.asarray(picture.convert("RGB")).reshape(500, 32, 20, 32, 3)
    labels = path.parent / "labels.npy"
    if not labels.is_file():
        raise UsageError(f"{labels}: no such file: expected the labels of the mosaics beside them")
    label = np.load(labels, allow_pickle=False).astype(np.uint8).reshape(6, 10_000)[place]
    return mosaic.transpose(0, 2, 1, 3, 4).reshape(10_000, 32, 32, 3), label


def _read_stl10(source: Path) -> dict[str, Split]:
    return {name: _stl10_split(source, name) for name in ("train", "test")}


def _stl10_folder(source: Path) -> Path:
    inner = source / "stl10_binary"
    return inner if inner.is_dir() else source


def _stl10_split(source: Path, name: str) -> Split:
    folder = _stl10_folder(source)
    pixels, labels = (_bytes(folder / f"{name}_{kind}.bin") for kind in "Xy")
    if pixels.size != labels.size * 96 * 96 * 3:
        raise UsageError(
            f"{folder}: damaged: {labels.size:,} labels and {pixels.size:,} bytes of pixels in "
            f"{name}: expected 27,648 bytes for each label"
        )
    # Column by column, and labels from 1 on, as MATLAB has them.
    return pixels.reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1), labels - 1


def _read_stl10_part(source: Path) -> dict[str, Split]:
    if (_stl10_folder(source) / "train_X.bin").is_file():
        image, label = _stl10_split(source, "train")
    else:
        image, label = _mosaics_of_stl10(source)
    if len(image) < PART:
        raise UsageError(f"source={str(source)!r}: {len(image)} images: expected {PART:,} or more")
    train, test = slice(PART - PART_TEST), slice(PART - PART_TEST, PART)
    return {"train": (image[train], label[train]), "test": (image[test], label[test])}


def _mosaics_of_stl10(source: Path) -> Split:
    from PIL import Image as pillow

    parts = []
    for number in range(4):
        path = source / f"train_{number}.webp"
        if not path.is_file():
            raise UsageError(
                f"source={str(source)!r}: no {path.name}: expected it there, or train_X.bin"
            )
        with pillow.open(path) as picture:
            mosaic = np.asarray(picture.convert("RGB"))
        if mosaic.shape != (9600, 960, 3):
            raise UsageError(f"{path}: {mosaic.shape}: expected a mosaic of 9600 rows by 960")
        mosaic = mosaic.reshape(100, 96, 10, 96, 3)
        parts.append(mosaic.transpose(0, 2, 1, 3, 4).reshape(1000, 96, 96, 3))
    labels = source / "train_labels.npy"
    if not labels.is_file():
        raise UsageError(f"{labels}: no such file: expected the labels of the mosaics beside them")
    return np.concatenate(parts), np.load(labels, allow_pickle=False).astype(np.uint8)


def _bytes(path: Path) -> np.ndarray:
    try:
        return np.fromfile(path, np.uint8)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}: expected one of STL-10's files") from error


def main(arguments: Sequence[str] | None = None) -> int:
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m experiments.prepare",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--dataset", required=True, help=", ".join(CLASSES))
    parser.add_argument("--source", required=True, help="the folder of the original files")
    parser.add_argument("--data_dir", required=True, help="where TFDS will look")
    parser.add_argument("--limit", type=int, help="images of each split, at most")
    given = parser.parse_args(arguments)
    start = time.monotonic()
    try:
        folder = prepare(given.dataset, given.source, given.data_dir, given.limit)
    except UsageError as error:
        print(f"experiments.prepare: {error}", file=sys.stderr)
        return 2
    print(f"{folder}: ready after {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
