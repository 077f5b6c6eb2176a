"""From the name of a data set to its sources."""

import os

import numpy as np

from rain_jax.checks import UsageError, nearest, within
from rain_jax.data.files import extra_from_npz, from_folder, from_npz
from rain_jax.data.source import Extra, Splits, draw, from_arrays, limited, resized, subset
from rain_jax.data.tfds import from_tfds

KINDS = ("digits", "tfds:NAME", "arrays:FILE.npz", "folder:PATH")
DIGITS_TEST = 500  # of 1,797


def load(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    holdout: int = 0,
    resize: int | None = None,
    limit_train: int | None = None,
    limit_test: int | None = None,
    extra: str | None = None,
    extra_fraction: float = 0.7,
) -> Splits:
    """Opens a data set.

    `name` is one of

    - `"digits"`: scikit-learn's 1,797 handwritten digits, 8x8x1 in steps of 1/16; 500 of them,
      drawn once with the classes in proportion, are the test images;
    - `"tfds:NAME"`: any TFDS data set with an image and a class label, written as TFDS writes it
      (`mnist`, `mnist:3.0.1`, `imagenet_resized/64x64`), prepared in `data_dir` (by default
      TFDS's own, `TFDS_DATA_DIR`) as array_record. It is read without TensorFlow. Tested on its
      `test` split, or on `validation` where `test` does not exist or has no labels;
    - `"arrays:FILE.npz"`: with train_image, train_label, test_image, test_label and perhaps
      valid_image, valid_label, class_names, as `from_arrays` takes them;
    - `"folder:PATH"`: `PATH/train/CLASS/*.png` (or jpg, webp, ..) and `PATH/test/CLASS/`, or
      `val/` where there is no `test/`; classes and files in alphabetical order.

    `holdout` training images become `valid`: always the same ones, never from the test images,
    the classes in proportion where labels are in memory. A data set that has validation images
    of its own beside its test images gives those, and then `holdout` must be 0.

    `resize` gives [resize, resize, C]: the shorter side is scaled (bicubic, antialiased) and the
    middle kept. Images of one size are scaled to `resize` itself, images of varying sizes, for
    which it is required, to resize * 256 / 224. `limit_train` (after `holdout`) and `limit_test`
    keep that many images at most: the first ones, or in a folder, whose order is class by class,
    evenly spaced ones.

    `extra` = `"arrays:FILE.npz"` mixes the images of a file into the training batches, in each of
    which they are `extra_fraction`, rounded: `image` [N, H, W, C] and `label` [N], of the shape,
    type and classes of the training images, as generated ones are published (Gowal et al.,
    arXiv:2110.09468, Wang et al., arXiv:2302.04638). Epochs are counted as theirs are, by the
    number of the data set's own images, which are then seen less often. What is held out, and
    tested on, is never mixed. The file is read into memory as it is.

    Raises `UsageError` for an unknown name, a data set that is not there or not prepared, a
    damaged file, images without labels, and numbers out of range.
    """
    kind, colon, rest = name.partition(":")
    limits = {"holdout": holdout, "resize": resize}
    limits |= {"limit_train": limit_train, "limit_test": limit_test}
    for where, value in limits.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise UsageError(f"{where}={value!r}: expected a whole number")
        if value is not None:
            within(where, value, 0 if where == "holdout" else 1)
    within("extra_fraction", extra_fraction, above=0.0, below=1.0)
    if extra is not None and not extra.startswith("arrays:"):
        raise UsageError(f"extra={extra!r}: expected arrays:FILE.npz")
    if name == "digits":
        splits = from_digits()
    elif kind == "tfds" and rest:
        splits = from_tfds(rest, data_dir, resize)
    elif kind == "arrays" and rest:
        splits = from_npz(rest)
    elif kind == "folder" and rest:
        splits = from_folder(rest, resize)
    else:
        known = ("digits", "tfds", "arrays", "folder")
        hint = "" if kind in known[1:] else nearest(kind, known)
        if not hint and not colon:
            hint = f"; did you mean 'tfds:{name}'?"
        raise UsageError(f"name={name!r}: expected one of {', '.join(KINDS)}{hint}")

    train, valid, test = splits
    if holdout:
        if valid is not None:
            raise UsageError(
                f"holdout={holdout}: expected 0, since {name} has {valid.size:,} validation images"
            )
        within("holdout", holdout, 0, below=train.size, hint=f" ({train.size:,} training images)")
        held = draw(train.arrays[1] if train.arrays else np.zeros(train.size, int), holdout)
        valid = subset(train, held)
        train = subset(train, np.setdiff1d(np.arange(train.size), held))
    spaced = kind == "folder"
    train, test = limited(train, limit_train, spaced), limited(test, limit_test, spaced)
    if resize is not None and kind not in ("tfds", "folder"):
        train, test = resized(train, resize, resize), resized(test, resize, resize)
        valid = None if valid is None else resized(valid, resize, resize)
    if extra is not None:
        more = extra_from_npz(extra.removeprefix("arrays:"), like=train)
        train = train._replace(extra=Extra(more, extra_fraction))
    return Splits(train, valid, test)


def from_digits() -> Splits:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    source = from_arrays(bunch.images / 16, bunch.target, name="digits", classes=10)
    test = draw(bunch.target, DIGITS_TEST)
    train = np.setdiff1d(np.arange(source.size), test)
    return Splits(subset(source, train), None, subset(source, test))
