"""What `rain_jax.data` and `experiments.prepare` promise, on real images where they are here."""

import collections
import gzip
import hashlib
import itertools
import pickle
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tfds_fixture
from PIL import Image as pillow

from experiments import prepare
from rain_jax import data
from rain_jax.checks import UsageError
from rain_jax.data.augment import crop_box, random_resized_crop, resize_and_centre, shifted_crop

LIMIT = 600


def noise(size, shape=(8, 6, 3), seed=0):
    """Random images and labels of four classes, which all occur."""
    draw = np.random.default_rng(seed)
    image = draw.integers(0, 256, (size, *shape), np.uint8)
    return image, (np.arange(size) * 7 % 4).astype(np.int32)


def noise_source(size, shape=(8, 6, 3), seed=0):
    return data.from_arrays(*noise(size, shape, seed), name="noise")


def contents(images, labels):
    """A bag of labelled images, for what comes in no known order."""
    return collections.Counter(
        (image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
    )


def refused(call, *arguments, says, **options):
    """Asserts that the call is refused in one line with all of `says` in it."""
    with pytest.raises(UsageError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in says:
        assert word in message, message


def idx(path):
    content = gzip.decompress(path.read_bytes())
    shape = (-1, 28, 28, 1) if content[3] == 3 else (-1,)
    return np.frombuffer(content, np.uint8, offset=16 if content[3] == 3 else 8).reshape(shape)


@pytest.fixture(scope="module")
def tfds_dir(shared_data, tmp_path_factory):
    """MNIST and CIFAR-10, the first 600 images of each split, prepared without TensorFlow."""
    out = tmp_path_factory.mktemp("tfds")
    prepare.prepare("mnist", shared_data / "mnist", out, LIMIT)
    prepare.prepare("cifar10", shared_data / "cifar10", out, LIMIT)
    return out


@pytest.fixture(scope="module")
def cifar10(shared_data):
    """The first batch of CIFAR-10 and its test batch, in their original order."""
    return prepare.read("cifar10", shared_data / "cifar10", 10_000)


# Sources


def test_digits_are_split_once_with_the_classes_in_proportion():
    train, valid, test = data.load("digits")
    assert (train.size, valid, test.size) == (1297, None, 500)
    assert train.shape == test.shape == (8, 8, 1)
    assert train.classes == 10
    assert train.class_names == tuple("0123456789")
    (image, label), (test_image, test_label) = data.resident(train), data.resident(test)
    assert image.dtype == np.float32
    assert image.min() == 0
    assert image.max() == 1
    assert label.dtype == np.int32

    from sklearn.datasets import load_digits

    whole = load_digits()
    everything = np.float32(whole.images[..., None] / 16)
    bag = contents(image, label) + contents(test_image, test_label)
    assert bag == contents(everything, whole.target)
    share = np.bincount(whole.target) * 500 / 1797
    assert np.all(np.abs(np.bincount(test_label) - share) <= 1)
    np.testing.assert_array_equal(data.resident(data.load("digits").test)[0], test_image)


def test_from_arrays_adds_a_channel_and_keeps_bytes_where_they_are():
    image, label = noise(5, (4, 3, 1))
    source = data.from_arrays(image, label, name="mine")
    assert source[:5] == ("mine", 5, (4, 3, 1), 4, ("0", "1", "2", "3"))
    assert np.shares_memory(data.resident(source)[0], image)
    grey = data.from_arrays(image[..., 0], label.tolist(), name="mine", class_names="abcd")
    assert grey.shape == (4, 3, 1)
    assert grey.class_names == tuple("abcd")
    np.testing.assert_array_equal(grey.read(3)[0], image[3])
    assert grey.read(3)[1] == label[3]
    floats = data.from_arrays(image / 255, label, name="mine", classes=7)
    assert floats.classes == 7
    assert floats.read(0)[0].dtype == np.float32


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(image=np.zeros((5, 4))), ["mine", "(5, 4)", "[N, H, W, C]"]),
        (dict(image=np.zeros((0, 4, 4, 1))), ["(0, 4, 4, 1)", "empty"]),
        (dict(image=np.full((5, 4, 4), 200.0)), ["[200, 200]", "[0, 1]", "255"]),
        (dict(image=np.full((5, 4, 4), -0.1)), ["-0.1", "[0, 1]"]),
        (dict(image=np.full((5, 4, 4), np.nan)), ["nan", "[0, 1]"]),
        (dict(image=np.zeros((5, 4, 4), np.int64)), ["int64", "uint8"]),
        (dict(label=np.zeros(4, int)), ["(4,)", "[5]"]),
        (dict(label=np.zeros((5, 10), int)), ["(5, 10)", "[5]"]),
        (dict(label=np.zeros(5)), ["float64", "whole"]),
        (dict(label=np.array([0, 1, -1, 0, 0])), ["-1", "image 2", "[0, 2)"]),
        (dict(label=np.arange(5), classes=4), ["label 4", "[0, 4)"]),
        (dict(classes=3, class_names="ab"), ["2 class names", "3"]),
    ],
)
def test_from_arrays_refuses(change, says):
    good = dict(image=np.zeros((5, 4, 4), np.uint8), label=np.zeros(5, int), name="mine")
    refused(data.from_arrays, **(good | change), says=says)


@pytest.fixture
def npz(tmp_path):
    """A good archive, and a function that writes a changed one."""
    (image, label), (test_image, test_label) = noise(30), noise(9, seed=1)
    good = dict(train_image=image, train_label=label, test_image=test_image, test_label=test_label)

    def write(**changes):
        path = tmp_path / "set.npz"
        kept = {k: v for k, v in (good | changes).items() if v is not None}
        np.savez(path, **kept)
        return path

    return write


def test_arrays_are_read_from_a_file(npz):
    image, label = noise(30)
    train, valid, test = data.load(f"arrays:{npz()}")
    np.testing.assert_array_equal(data.resident(train)[0], image)
    np.testing.assert_array_equal(data.resident(train)[1], label)
    assert valid is None
    assert test.size == 9

    more = npz(valid_image=image[:4], valid_label=label[:4] * 0, class_names=list("abcd"))
    train, valid, test = data.load(f"arrays:{more}")
    assert valid.size == 4
    # A split need not have all the classes.
    assert valid.class_names == train.class_names == tuple("abcd")
    refused(data.load, f"arrays:{more}", holdout=3, says=["holdout=3", "0", "4 validation"])


def test_arrays_that_cannot_be_read_are_refused(npz, tmp_path):
    path = npz(test_label=None, tst_label=np.zeros(9, int))
    refused(data.load, f"arrays:{path}", says=["test_label", "expected", "'tst_label'"])
    path = npz(test_image=noise(9, (7, 6, 3))[0])
    refused(data.load, f"arrays:{path}", says=["test_image", "(7, 6, 3)", "(8, 6, 3)"])
    path = npz(train_image=noise(30)[0] * 300.0)
    refused(data.load, f"arrays:{path}", says=["train", "[0, 1]"])
    path = npz()
    content = path.read_bytes()
    path.write_bytes(content[:1000])
    refused(data.load, f"arrays:{path}", says=["set.npz", "expected", ".npz"])
    path.write_bytes(content[:500] + bytes(500) + content[1000:])
    refused(data.load, f"arrays:{path}", says=["set.npz", "expected", ".npz"])
    path.write_bytes(b"")
    refused(data.load, f"arrays:{path}", says=["set.npz", "expected", ".npz"])
    np.save(tmp_path / "one.npy", noise(3)[0])
    refused(data.load, f"arrays:{tmp_path}/one.npy", says=["one.npy", "expected", ".npz"])
    (tmp_path / "set.npz").write_bytes(content)
    refused(data.load, f"arrays:{tmp_path}/sets.npz", says=["no such file", "'set.npz'"])


def write_folder(root, sizes, suffix="png", parts=("train", "test")):
    """Random pictures, `sizes` of each class; returns the arrays by path."""
    written = {}
    for part, name in itertools.product(parts, ("cat", "dog")):
        (root / part / name).mkdir(parents=True)
        for i, shape in enumerate(sizes):
            image = noise(1, shape, seed=len(written))[0][0]
            path = root / part / name / f"{i}.{suffix}"
            pillow.fromarray(image[..., 0] if shape[-1] == 1 else image).save(path, lossless=True)
            written[str(path.relative_to(root))] = image
    return written


@pytest.mark.parametrize("suffix, channels", [("png", 1), ("PNG", 3), ("webp", 3)])
def test_folders_are_read_in_alphabetical_order(tmp_path, suffix, channels):
    written = write_folder(tmp_path, [(5, 4, channels)] * 3, suffix)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    train, valid, test = data.load(f"folder:{tmp_path}")
    assert valid is None
    assert train.class_names == test.class_names == ("cat", "dog")
    assert train.shape == (5, 4, channels)
    image, label = data.resident(train)
    order = sorted(path for path in written if path.startswith("train"))
    np.testing.assert_array_equal(image, [written[path] for path in order])
    np.testing.assert_array_equal(label, [0, 0, 0, 1, 1, 1])
    spaced = data.load(f"folder:{tmp_path}", limit_train=2).train
    np.testing.assert_array_equal(data.resident(spaced)[1], [0, 1])


def test_a_folder_may_have_validation_images(tmp_path):
    write_folder(tmp_path, [(5, 4, 3)], parts=("train", "val"))
    train, valid, test = data.load(f"folder:{tmp_path}")
    assert (valid, test.size) == (None, 2)
    shutil.copytree(tmp_path / "val", tmp_path / "test")
    shutil.rmtree(tmp_path / "val" / "dog")
    train, valid, test = data.load(f"folder:{tmp_path}")
    assert (train.size, valid.size, test.size) == (2, 1, 2)


def test_images_of_varying_sizes_are_resized_and_cropped(tmp_path):
    written = write_folder(tmp_path, [(60, 80, 3), (90, 64, 3)])
    refused(data.load, f"folder:{tmp_path}", says=["60x80", "90x64", "resize=N"])
    train = data.load(f"folder:{tmp_path}", resize=28).train
    assert train.shape == (28, 28, 3)
    image, _ = data.resident(train)
    # 28 * 256 / 224 = 32: 60x80 -> 32x43 and 90x64 -> 45x32, then the middle 28.
    for got, path, size in [
        (image[0], "train/cat/0.png", (43, 32)),
        (image[1], "train/cat/1.png", (32, 45)),
    ]:
        whole = pillow.fromarray(written[path]).resize(size, pillow.Resampling.BICUBIC)
        left, top = (size[0] - 28) // 2, (size[1] - 28) // 2
        np.testing.assert_array_equal(got, np.asarray(whole)[top : top + 28, left : left + 28])


def test_images_of_one_size_are_resized_whole(npz, tmp_path):
    image = np.tile(np.arange(0, 256, 16, dtype=np.uint8)[:, None], (3, 1, 16))[..., None]
    path = npz(train_image=image, train_label=[0, 1, 0], test_image=image, test_label=[0, 1, 0])
    half = data.load(f"arrays:{path}", resize=8).train
    whole = pillow.fromarray(image[0, ..., 0]).resize((8, 8), pillow.Resampling.BICUBIC)
    np.testing.assert_array_equal(half.read(1)[0][..., 0], np.asarray(whole))
    floats = npz(
        train_image=image / 255, train_label=[0, 1, 0], test_image=image / 255, test_label=[0, 1, 0]
    )
    smooth = data.load(f"arrays:{floats}", resize=8).train.read(1)[0]
    assert smooth.dtype == np.float32
    assert 0 <= smooth.min() <= smooth.max() <= 1
    np.testing.assert_allclose(smooth[..., 0], np.asarray(whole) / 255, atol=1.5 / 255)


def test_folders_that_cannot_be_read_are_refused(tmp_path):
    good = tmp_path / "pets"
    write_folder(good, [(60, 80, 3)] * 3)

    def changed(change):
        bad = tmp_path / "bad"
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        change(bad)
        return f"folder:{bad}"

    refused(data.load, f"folder:{tmp_path}/pet", says=["no such folder", "'pets'"])
    name = changed(lambda bad: (bad / "train").rename(bad / "trian"))
    refused(data.load, name, says=["no train/", "'trian'"])
    name = changed(lambda bad: (bad / "test").rename(bad / "tests"))
    refused(data.load, name, says=["no test/", "'tests'"])
    name = changed(lambda bad: (bad / "test" / "cat").rename(bad / "test" / "cats"))
    refused(data.load, name, says=["cats", "expected one of cat, dog", "'cat'"])
    name = changed(lambda bad: [path.unlink() for path in (bad / "train" / "dog").iterdir()])
    refused(data.load, name, says=["train/dog", "no images"])
    name = changed(lambda bad: (bad / "train/cat/1.png").write_bytes(b"not a picture"))
    refused(data.load, name, says=["train/cat/1.png", "undamaged"])

    # A file cut short has a good header: that shows when it is read.
    half = (good / "train/cat/1.png").read_bytes()[:2000]
    source = data.load(changed(lambda bad: (bad / "train/cat/1.png").write_bytes(half))).train
    refused(source.read, 1, says=["train/cat/1.png", "undamaged"])
    refused(data.resident, source, says=["train/cat/1.png", "undamaged"])


def test_a_colour_picture_among_grey_ones_is_not_made_grey_silently(tmp_path, monkeypatch):
    write_folder(tmp_path, [(5, 4, 1)] * 3)
    pillow.fromarray(noise(1, (5, 4, 3))[0][0]).save(tmp_path / "train/cat/1.png")
    assert data.load(f"folder:{tmp_path}").train.shape == (5, 4, 3)
    monkeypatch.setattr(sys.modules["rain_jax.data.files"], "PROBED", 1)
    source = data.load(f"folder:{tmp_path}").train
    assert source.shape == (5, 4, 1)
    refused(source.read, 1, says=["cat/1.png", "RGB", "grey"])


def test_holding_out_is_fixed_and_leaves_the_test_images_alone():
    whole, none, test = data.load("digits")
    train, valid, same_test = data.load("digits", holdout=100)
    assert none is None
    assert (train.size, valid.size) == (1197, 100)
    bags = [contents(*data.resident(source)) for source in (whole, train, valid)]
    assert bags[0] == bags[1] + bags[2]
    share = np.bincount(data.resident(whole)[1]) * 100 / 1297
    assert np.all(np.abs(np.bincount(data.resident(valid)[1]) - share) <= 1)
    np.testing.assert_array_equal(data.resident(test)[0], data.resident(same_test)[0])
    again = data.load("digits", holdout=100, limit_train=50, limit_test=20)
    np.testing.assert_array_equal(data.resident(again.valid)[0], data.resident(valid)[0])
    np.testing.assert_array_equal(data.resident(again.train)[0], data.resident(train)[0][:50])
    np.testing.assert_array_equal(data.resident(again.test)[0], data.resident(test)[0][:20])
    assert data.load("digits", limit_test=10**6).test.size == 500


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(holdout=1297), ["holdout=1297", "1,297"]),
        (dict(holdout=-1), ["holdout=-1"]),
        (dict(holdout=0.1), ["holdout=0.1", "whole"]),
        (dict(limit_train=0), ["limit_train=0", "[1"]),
        (dict(resize=0), ["resize=0", "[1"]),
        (dict(name="digit"), ["'digit'", "'digits'", "tfds:NAME"]),
        (dict(name="mnist"), ["'mnist'", "'tfds:mnist'"]),
        (dict(name="fodler:x"), ["'fodler:x'", "'folder'"]),
        (dict(name="tfds:"), ["'tfds:'", "tfds:NAME"]),
    ],
)
def test_loading_refuses(options, says):
    options = dict(name="digits") | options
    refused(data.load, options.pop("name"), **options, says=says)


# TFDS


def test_mnist_comes_back_from_tfds_exactly(tfds_dir, shared_data):
    splits = data.load("tfds:mnist", data_dir=tfds_dir)
    assert splits.train.shape == (28, 28, 1)
    assert splits.train.class_names == tuple("0123456789")
    for source, prefix in [(splits.train, "train"), (splits.test, "t10k")]:
        folder = shared_data / "mnist"
        image = idx(folder / f"{prefix}-images-idx3-ubyte.gz")[:LIMIT]
        label = idx(folder / f"{prefix}-labels-idx1-ubyte.gz")[:LIMIT]
        # By contents: TFDS shuffles as it writes.
        assert contents(*data.resident(source)) == contents(image, label)
    version = data.load("tfds:mnist:3.0.1", data_dir=tfds_dir)
    assert version.test.size == LIMIT


def test_cifar10_comes_back_from_tfds_exactly(tfds_dir, cifar10):
    splits = data.load("tfds:cifar10", data_dir=tfds_dir)
    assert splits.test.class_names[3] == "cat"
    for split, source in [("train", splits.train), ("test", splits.test)]:
        image, label = cifar10[split]
        assert contents(*data.resident(source)) == contents(image[:LIMIT], label[:LIMIT])


def test_tfds_has_a_default_folder(tfds_dir, monkeypatch):
    import tensorflow_datasets as tfds

    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tfds_dir))
    assert data.load("tfds:mnist").train.size == LIMIT


def test_data_sets_like_imagenet(tmp_path):
    """Images of any size, and test images without labels."""
    images = [noise(1, (40 + 3 * i, 50, 3), i)[0][0] for i in range(6)]
    labelled = [(image, i % 2) for i, image in enumerate(images)]
    hidden = [(image, -1) for image in images]
    features = tfds_fixture.image_features((None, None, 3), ["cat", "dog"])
    splits = {"train": labelled, "validation": labelled[:4], "test": hidden}
    tfds_fixture.write(tmp_path, "like_imagenet", features, splits)
    refused(data.load, "tfds:like_imagenet", data_dir=tmp_path, says=["None", "resize=N"])
    train, valid, test = data.load("tfds:like_imagenet", data_dir=tmp_path, resize=28)
    assert (train.size, valid, test.size) == (6, None, 4)
    assert contents(*data.resident(test)) == contents(
        [resize_and_centre(image, 28, 32) for image in images[:4]], [0, 1, 0, 1]
    )


def test_a_validation_split_beside_labelled_test_images(tmp_path):
    image, label = noise(12)
    pairs = list(zip(image, label.tolist(), strict=True))
    features = tfds_fixture.image_features((8, 6, 3), "abcd")
    splits = {"train": pairs, "validation": pairs[:3], "test": pairs[:5]}
    folder = tfds_fixture.write(tmp_path, "three", features, splits, shards=2)
    assert len(list(folder.glob("three-train*"))) == 2
    train, valid, test = data.load("tfds:three", data_dir=tmp_path)
    assert (train.size, valid.size, test.size) == (12, 3, 5)
    assert contents(*data.resident(train)) == contents(image, label)


def test_data_sets_that_cannot_be_classified_are_refused(tmp_path):
    import tensorflow_datasets as tfds

    image, label = noise(4)
    pairs = list(zip(image, label.tolist(), strict=True))
    features = tfds_fixture.image_features((8, 6, 3), "abcd")
    tfds_fixture.write(tmp_path, "untested", features, {"train": pairs})
    refused(data.load, "tfds:untested", data_dir=tmp_path, says=["splits train", "test"])
    numbers = {"image": features["image"], "angle": tfds.features.Scalar(np.int64)}
    tfds_fixture.write(tmp_path, "angles", numbers, {"train": pairs, "test": pairs})
    says = ["features", "image: Image", "angle: Scalar", "label: ClassLabel"]
    refused(data.load, "tfds:angles", data_dir=tmp_path, says=says)


@pytest.mark.parametrize(
    "name, says",
    [
        ("mnits", ["'mnits'", "did you mean 'mnist'"]),
        ("fashion_mnist", ["looked in", "tfds build fashion_mnist", "array_record", "prepare"]),
        ("stl10", ["looked in", "tfds build stl10", "--file_format=array_record"]),
        ("mnist:9.9.9", ["mnist:9.9.9", "expected one of mnist:3.0.1"]),
        ("mnist/tiny", ["mnist/tiny", "expected one of mnist:3.0.1"]),
        ("mn ist", ["mn ist", "NAME:VERSION"]),
    ],
)
def test_names_that_tfds_does_not_have(tfds_dir, name, says):
    refused(data.load, f"tfds:{name}", data_dir=tfds_dir, says=[*says, str(tfds_dir)])


@pytest.mark.parametrize("damage", ["gone", "empty", "short", "inside", "features", "info"])
def test_damaged_tfds_directories_name_the_file(tfds_dir, tmp_path, damage):
    folder = tmp_path / "mnist" / "3.0.1"
    shutil.copytree(tfds_dir / "mnist" / "3.0.1", folder)
    record = folder / "mnist-train.array_record-00000-of-00001"
    content = record.read_bytes()
    if damage in ("features", "info"):
        name = dict(features="features.json", info="dataset_info.json")[damage]
        (folder / name).write_text("{")
        refused(data.load, "tfds:mnist", data_dir=tmp_path, says=[str(tmp_path), "undamaged"])
    elif damage == "gone":
        record.unlink()
        refused(data.load, "tfds:mnist", data_dir=tmp_path, says=[str(record), "no such file"])
    elif damage == "inside":
        record.write_bytes(content[:60_000] + bytes(20_000) + content[80_000:])
        source = data.load("tfds:mnist", data_dir=tmp_path).train
        refused(data.resident, source, says=[str(record), "undamaged"])
        refused(list, data.evaluation_batches(source, 100), says=[str(record)])
    else:
        record.write_bytes(content[: dict(empty=0, short=len(content) - 100)[damage]])
        refused(data.load, "tfds:mnist", data_dir=tmp_path, says=[str(record), "undamaged"])


def test_other_record_formats_are_refused(tfds_dir, tmp_path):
    folder = tmp_path / "mnist" / "3.0.1"
    shutil.copytree(tfds_dir / "mnist" / "3.0.1", folder)
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    says = ["tfrecord", "array_record", "tfds build mnist"]
    refused(data.load, "tfds:mnist", data_dir=tmp_path, says=says)


# Preparing the original files


def test_the_mosaics_are_the_original_batches(cifar10):
    image, label = cifar10["train"]
    planes = image.transpose(0, 3, 1, 2).reshape(-1, 3072)
    binary = np.concatenate([label[:, None], planes], 1).tobytes()
    # Of data_batch_1.bin, as published.
    assert hashlib.md5(binary).hexdigest() == "5dd7e06a14cb22eb9f671a540d1b7c25"


def cifar_files(folder, cifar10, version):
    """The first training file and the test file as the binary or the Python version has them."""
    folder.mkdir(parents=True)
    for name, (image, label) in zip(("data_batch_1", "test_batch"), cifar10.values(), strict=True):
        planes = np.ascontiguousarray(image.transpose(0, 3, 1, 2).reshape(-1, 3072))
        if version == "binary":
            rows = np.concatenate([label[:, None], planes], 1)
            (folder / f"{name}.bin").write_bytes(rows.tobytes())
        else:
            content = pickle.dumps({b"data": planes, b"labels": label.tolist()}, protocol=2)
            # As NumPy was arranged when those files were made.
            content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            (folder / name).write_bytes(content)


@pytest.mark.parametrize("version", ["binary", "python"])
def test_cifar10_is_read_as_it_is_distributed(tmp_path, cifar10, version):
    folder = "cifar-10-batches-bin" if version == "binary" else "cifar-10-batches-py"
    cifar_files(tmp_path / folder, cifar10, version)
    for source in (tmp_path, tmp_path / folder):
        splits = prepare.read("cifar10", source, 10_000)
        for split, (image, label) in cifar10.items():
            np.testing.assert_array_equal(splits[split][0], image)
            np.testing.assert_array_equal(splits[split][1], label)


def stl10_files(folder, part, image, label):
    """Images [N, H, W, C] as STL-10 is distributed: column by column, labels from 1 on."""
    folder.mkdir(exist_ok=True)
    (folder / f"{part}_X.bin").write_bytes(image.transpose(0, 3, 2, 1).tobytes())
    (folder / f"{part}_y.bin").write_bytes((label + 1).astype(np.uint8).tobytes())


def test_stl10_is_read_as_it_is_distributed(tmp_path):
    label = np.arange(5, dtype=np.uint8)
    image = np.zeros((5, 96, 96, 3), np.uint8)
    for number in range(5):  # one pixel each: its row, its column and its channel can be told
        image[number, 10 + number, 50, number % 3] = 100 + number
    for part, some in (("train", slice(3)), ("test", slice(3, 5))):
        stl10_files(tmp_path / "stl10_binary", part, image[some], label[some])
    for source in (tmp_path, tmp_path / "stl10_binary"):
        splits = prepare.read("stl10", source)
        np.testing.assert_array_equal(np.concatenate([splits[s][0] for s in splits]), image)
        np.testing.assert_array_equal(np.concatenate([splits[s][1] for s in splits]), label)
    refused(prepare.read, "stl10_part", tmp_path, says=["3 images", "expected 4,000 or more"])
    (tmp_path / "stl10_binary" / "train_y.bin").write_bytes(b"\1\2")
    refused(prepare.read, "stl10", tmp_path, says=["damaged", "2 labels", "27,648 bytes"])


def test_our_cut_of_stl10_is_the_same_from_either_kind_of_file(tmp_path, shared_data):
    cut = prepare.read("stl10_part", shared_data / "stl10")
    assert {split: len(image) for split, (image, _) in cut.items()} == {"train": 3000, "test": 1000}
    image, label = (np.concatenate([cut[split][which] for split in cut]) for which in (0, 1))
    # The original has more, which are left out.
    more = np.concatenate([image, 255 - image[:10]]), np.concatenate([label, label[:10]])
    stl10_files(tmp_path, "train", *more)
    found = prepare.read("stl10_part", tmp_path)
    for split, parts in cut.items():
        np.testing.assert_array_equal(found[split][0], parts[0])
        np.testing.assert_array_equal(found[split][1], parts[1])


def test_a_pickle_of_anything_but_arrays_is_refused(tmp_path):
    class Harm:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "harm",))

    for name in ("data_batch_1", "test_batch"):
        (tmp_path / name).write_bytes(pickle.dumps(Harm()))
    says = ["data_batch_1", "damaged", "expected 10,000 images", "it holds"]
    refused(prepare.read, "cifar10", tmp_path, 1, says=says)
    assert not (tmp_path / "harm").exists()


def test_preparing_refuses_what_it_cannot_read(tmp_path, shared_data):
    mnist = shared_data / "mnist"
    out = tmp_path / "out"
    refused(prepare.prepare, "mnits", mnist, out, says=["'mnits'", "'mnist'"])
    refused(prepare.prepare, "mnist", mnist, out, 0, says=["limit=0"])
    refused(
        prepare.prepare, "mnist", shared_data / "mnits", out, says=["no such folder", "'mnist'"]
    )
    refused(prepare.prepare, "mnist", tmp_path, out, says=["train-images-idx3-ubyte", "expected"])
    refused(prepare.prepare, "cifar10", tmp_path, out, says=["data_batch_1.bin", "expected"])
    (tmp_path / "data_batch_1.bin").write_bytes(bytes(1000))
    refused(prepare.prepare, "cifar10", tmp_path, out, says=["no data_batch_2.bin"])
    (tmp_path / "test_batch.bin").write_bytes(bytes(1000))
    says = ["data_batch_1.bin", "damaged"]
    refused(prepare.prepare, "cifar10", tmp_path, out, 10, says=says)
    # Unpacked, and the training images cut short.
    for path in mnist.iterdir():
        (tmp_path / path.stem).write_bytes(gzip.decompress(path.read_bytes())[:10_000])
    refused(prepare.prepare, "mnist", tmp_path, out, says=["train-images-idx3-ubyte", "damaged"])
    assert not out.exists()


def test_the_command_prepares_once(tmp_path, shared_data):
    arguments = [f"--source={shared_data}/mnist", f"--data_dir={tmp_path}", "--dataset=mnist"]
    command = [sys.executable, "-m", "experiments.prepare", *arguments, "--limit=30"]
    root = Path(__file__).parents[1]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert data.load("tfds:mnist", data_dir=tmp_path).train.size == 30
    again = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "exists" in again.stderr
    assert "Traceback" not in again.stderr


# Feeds on the device


def test_bytes_become_the_same_floats_everywhere():
    every = np.arange(256, dtype=np.uint8)
    host = data.as_float(every)
    assert host.dtype == np.float32
    assert (host[0], host[-1]) == (0, 1)
    np.testing.assert_allclose(host, every / 255, rtol=1e-7)
    np.testing.assert_array_equal(data.as_float(jnp.asarray(every)), host)
    np.testing.assert_array_equal(jax.jit(data.as_float)(every), host)
    np.testing.assert_array_equal(np.round(host * 255), every)
    assert data.as_float(np.float64([0.5])).dtype == np.float32
    refused(data.as_float, np.zeros(3, np.int32), says=["int32", "uint8"])


def test_an_epoch_is_a_permutation_that_its_key_and_number_decide(key):
    order = jax.jit(data.epoch_order, static_argnums=2)
    first, second = order(key, 0, 1000), order(key, 1, 1000)
    assert first.dtype == jnp.int32
    np.testing.assert_array_equal(np.sort(first), np.arange(1000))
    np.testing.assert_array_equal(np.sort(second), np.arange(1000))
    np.testing.assert_array_equal(data.epoch_order(key, 0, 1000), first)
    assert np.mean(np.asarray(first) == np.asarray(second)) < 0.02
    assert np.any(order(jax.random.key(1), 0, 1000) != first)


def test_taking_batches_inside_a_program(key):
    image, label = noise(50)
    order = data.epoch_order(key, 3, 50)

    @jax.jit
    def every(images, labels):
        return jax.lax.map(lambda k: data.take(images, labels, order, k, 16), jnp.arange(3))

    batch = every(image, label)
    assert batch.image.shape == (3, 16, 8, 6, 3)
    assert batch.image.dtype == jnp.float32
    assert batch.label.dtype == batch.index.dtype == jnp.int32
    assert batch.valid.all()
    np.testing.assert_array_equal(batch.index.ravel(), order[:48])
    np.testing.assert_array_equal(batch.image, data.as_float(image[batch.index]))
    np.testing.assert_array_equal(batch.label, label[batch.index])
    says = ["batch_size=51", "50"]
    refused(data.take, jnp.asarray(image), jnp.asarray(label), order, 0, 51, says=says)


@pytest.mark.parametrize("batch_size", [16, 50, 256])
@pytest.mark.parametrize("in_memory", [True, False])
def test_evaluation_sees_every_image_exactly_once(batch_size, in_memory):
    source = noise_source(117)
    image, label = source.arrays
    if not in_memory:
        source = source._replace(arrays=None)
    batches = list(data.evaluation_batches(source, batch_size))
    assert len(batches) == -(-117 // batch_size)
    assert all(batch.image.shape == (batch_size, 8, 6, 3) for batch in batches)
    whole = jax.tree.map(lambda *parts: np.concatenate(parts), *batches)
    assert whole.image.dtype == np.uint8
    assert whole.label.dtype == whole.index.dtype == np.int32
    valid = whole.valid
    assert valid.sum() == 117
    np.testing.assert_array_equal(whole.index, np.arange(len(valid)))
    np.testing.assert_array_equal(valid, whole.index < 117)
    np.testing.assert_array_equal(whole.image[valid], image)
    np.testing.assert_array_equal(whole.label[valid], label)
    assert not whole.image[~valid].any()
    assert not whole.label[~valid].any()


def test_evaluation_refuses_its_batch_size_before_the_first_batch():
    for wrong in (0, 2.5):
        refused(data.evaluation_batches, noise_source(3), wrong, says=[f"batch_size={wrong}"])


# Streams


def some(batches, count):
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        chex.assert_trees_all_equal(batch, other)
        assert [part.dtype for part in batch] == [part.dtype for part in other]


@pytest.fixture(scope="module")
def mnist(tfds_dir):
    return data.load("tfds:mnist", data_dir=tfds_dir).train


def test_a_stream_gives_full_shuffled_epochs_of_the_resident_images(mnist):
    image, label = data.resident(mnist)
    batches = some(data.stream(mnist, 128, seed=3), 9)
    for batch in batches:
        assert batch.image.dtype == np.uint8
        assert batch.label.dtype == batch.index.dtype == np.int32
        assert batch.valid.all()
        np.testing.assert_array_equal(batch.image, image[batch.index])
        np.testing.assert_array_equal(batch.label, label[batch.index])
    # 600 images: epochs of 4 batches of 128, and 88 images that wait for the next.
    epochs = [np.concatenate([b.index for b in batches[e : e + 4]]) for e in (0, 4)]
    assert [len(np.unique(epoch)) for epoch in epochs] == [512, 512]
    assert len(np.union1d(*epochs)) > 512
    assert np.any(epochs[0] != epochs[1])
    other = some(data.stream(mnist, 128, seed=4), 1)[0]
    assert np.any(other.index != batches[0].index)


def test_a_stream_goes_on_at_any_step_as_if_it_had_not_stopped(mnist):
    whole = some(data.stream(mnist, 128, seed=3), 9)
    for first_step in (1, 4, 6):
        part = some(data.stream(mnist, 128, seed=3, first_step=first_step, prefetch=1), 3)
        assert_same(part, whole[first_step : first_step + 3])


def test_worker_processes_change_nothing(mnist):
    whole = some(data.stream(mnist, 128, seed=3), 9)
    assert_same(some(data.stream(mnist, 128, seed=3, first_step=3, workers=2), 5), whole[3:8])


def test_processes_share_out_the_batch_of_one(mnist):
    whole = some(data.stream(mnist, 128, seed=3), 6)
    parts = [
        some(data.stream(mnist, 128, seed=3, process_index=p, process_count=2), 6) for p in (0, 1)
    ]
    joined = [
        jax.tree.map(lambda *x: np.concatenate(x), *pair) for pair in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)


def test_a_stream_crops_the_original_images(tmp_path):
    written = write_folder(tmp_path, [(60, 80, 3), (90, 64, 3), (50, 50, 3)])
    train = data.load(f"folder:{tmp_path}", resize=16).train
    whole = some(data.stream(train, 4, seed=0, crop=(0.3, 1.0)), 6)
    assert all(batch.image.shape == (4, 16, 16, 3) for batch in whole)
    assert_same(some(data.stream(train, 4, seed=0, crop=(0.3, 1.0), first_step=2), 4), whole[2:])
    # Another crop in each epoch, and the same images as without crops.
    seen = collections.defaultdict(set)
    for batch in whole:
        for image, index in zip(batch.image, batch.index, strict=True):
            seen[int(index)].add(image.tobytes())
    assert max(map(len, seen.values())) > 1
    plain = some(data.stream(train, 4, seed=0), 6)
    for batch, other in zip(whole, plain, strict=True):
        np.testing.assert_array_equal(batch.index, other.index)
    # The whole of a square image, when the crop must have all of its area and fits only so.
    square = data.from_arrays(written["train/cat/2.png"][None], [0], name="one")
    batch = some(data.stream(square, 1, seed=0, crop=(1.0, 1.0)), 1)[0]
    assert batch.image.shape == (1, 50, 50, 3)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_ends_a_stream_with_its_name(tmp_path, workers):
    write_folder(tmp_path, [(60, 80, 3)] * 3)
    path = tmp_path / "train" / "cat" / "1.png"
    path.write_bytes(path.read_bytes()[:2000])
    batches = data.stream(data.load(f"folder:{tmp_path}").train, 6, seed=0, workers=workers)
    refused(next, batches, says=[str(path), "undamaged"])


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(batch_size=0), ["batch_size=0"]),
        (dict(batch_size=118), ["batch_size=118", "117"]),
        (dict(batch_size=True), ["batch_size=True"]),
        (dict(seed=-1), ["seed=-1"]),
        (dict(first_step=-1), ["first_step=-1"]),
        (dict(workers=-1), ["workers=-1"]),
        (dict(prefetch=0), ["prefetch=0"]),
        (dict(process_index=2, process_count=2), ["process_index=2", "[0, 1]"]),
        (dict(process_count=3), ["batch_size=16", "3 processes"]),
        (dict(crop=(0, 1)), ["crop=0"]),
        (dict(crop=(0.5, 0.2)), ["crop=0.2", "[0.5, 1]"]),
    ],
)
def test_a_stream_refuses_before_the_first_batch(options, says):
    options = dict(batch_size=16, seed=0) | options
    refused(data.stream, noise_source(117), options.pop("batch_size"), **options, says=says)


# Augmentation


@pytest.fixture
def numbered():
    """An image [5, 4, 2] whose every value is another."""
    return jnp.arange(1, 41, dtype=jnp.float32).reshape(5, 4, 2) / 40


@pytest.mark.parametrize("pad_mode", ["constant", "reflect"])
def test_a_crop_is_a_window_of_the_padded_image(numbered, pad_mode):
    for dy, dx in itertools.product(range(5), repeat=2):
        found = shifted_crop(numbered, dy, dx, padding=2, pad_mode=pad_mode)
        for y, x in itertools.product(range(5), range(4)):
            row, column = y + dy - 2, x + dx - 2  # in the image, or beyond it
            if pad_mode == "constant" and not (0 <= row < 5 and 0 <= column < 4):
                expected = jnp.zeros(2)
            else:
                row = abs(row) if row < 5 else 8 - row
                column = abs(column) if column < 4 else 6 - column
                expected = numbered[row, column]
            np.testing.assert_array_equal(found[y, x], expected)


def test_every_crop_and_both_directions_occur_about_equally(numbered):
    keys = jax.random.split(jax.random.key(0), 4000)
    apply = jax.jit(jax.vmap(lambda k: data.augment(k, numbered, crop_padding=2, flip=True)))
    found = collections.Counter(image.tobytes() for image in np.asarray(apply(keys)))
    expected = set()
    for dy, dx in itertools.product(range(5), repeat=2):
        window = np.asarray(shifted_crop(numbered, dy, dx, padding=2, pad_mode="constant"))
        expected |= {window.tobytes(), window[:, ::-1].tobytes()}
    assert len(expected) == 50
    assert set(found) == expected
    # 80 of each on average, standard deviation 9: six of them on either side.
    assert min(found.values()) > 26
    assert max(found.values()) < 134


def test_a_batch_is_augmented_as_its_images_are(numbered, key):
    images = jnp.stack([numbered, numbered[::-1], 1 - numbered])
    keys = jax.random.split(key, 3)
    one = lambda key, image: data.augment(key, image, crop_padding=1, flip=True, pad_mode="reflect")
    together = jax.vmap(one)(keys, images)
    alone = [one(k, image) for k, image in zip(keys, images, strict=True)]
    np.testing.assert_array_equal(together, alone)


def test_no_augmentation_is_the_image_itself(numbered, key):
    np.testing.assert_array_equal(data.augment(key, numbered), numbered)
    flips = {data.augment(k, numbered, flip=True).tobytes() for k in jax.random.split(key, 20)}
    assert flips == {numbered.tobytes(), numbered[:, ::-1].tobytes()}


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(crop_padding=-1), ["crop_padding=-1"]),
        (dict(crop_padding=1.5), ["crop_padding=1.5", "whole"]),
        (dict(crop_padding=4, pad_mode="reflect"), ["crop_padding=4", "[0, 3]"]),
        (dict(crop_padding=1, pad_mode="zeros"), ["'zeros'", "constant, reflect"]),
    ],
)
def test_augmentation_refuses(numbered, key, options, says):
    refused(data.augment, key, numbered, **options, says=says)


def test_random_crops_are_parts_of_the_asked_area_and_shape():
    draw = np.random.default_rng(0)
    areas, ratios = [], []
    for _ in range(500):
        left, top, right, bottom = crop_box(draw, 300, 400, (0.2, 0.5))
        assert 0 <= left < right <= 400
        assert 0 <= top < bottom <= 300
        areas.append((right - left) * (bottom - top) / 120_000)
        ratios.append((right - left) / (bottom - top))
    assert 0.195 < min(areas) < 0.22
    assert 0.48 < max(areas) < 0.505
    assert 0.74 < min(ratios) < 0.78
    assert 1.28 < max(ratios) < 1.35
    # Nothing of that area fits: the middle, as wide as may be.
    assert crop_box(draw, 30, 4000, (0.9, 1.0)) == (1980, 0, 2020, 30)


def test_a_random_crop_of_a_flat_image_is_flat():
    flat = np.full((30, 40, 3), 77, np.uint8)
    found = random_resized_crop(np.random.default_rng(0), flat, (16, 16), (0.1, 1.0))
    np.testing.assert_array_equal(found, np.full((16, 16, 3), 77))


# Extra images


def two_sources(size=53, more=29, fraction=0.6):
    """A source with extra images: images of the two kinds are told apart by their pixels."""
    image, label = noise(size)
    others, their = noise(more, seed=1)
    train = data.from_arrays(image, label, name="real")
    return train._replace(
        extra=data.Extra(data.from_arrays(others, their, name="made", classes=4), fraction)
    )


def assert_shared(batches, source, each):
    """Every batch has `each` extra images, and is what its indices say; no image comes twice."""
    images, labels = data.pooled(source)
    for batch in batches:
        assert np.sum(batch.index >= source.size) == each
        assert len(set(np.asarray(batch.index).tolist())) == len(batch.index)
        np.testing.assert_array_equal(batch.image, images[batch.index])
        np.testing.assert_array_equal(batch.label, labels[batch.index])
        assert np.all(batch.valid)


@pytest.mark.parametrize("fraction, each", [(0.6, 6), (0.25, 2), (0.9, 9), (0.7, 7)])
def test_every_batch_of_a_stream_has_its_share_of_extra_images(fraction, each):
    source = two_sources(fraction=fraction)
    batches = some(data.stream(source, 10, seed=3), 12)
    assert_shared(batches, source, each)
    # Both kinds are gone through before any of them comes again.
    for begin, size, count in ((0, 53, 10 - each), (53, 29, each)):
        steps = size // count
        index = np.concatenate([batch.index for batch in batches[:steps]])
        mine = index[(index >= begin) & (index < begin + size)]
        assert len(set(mine.tolist())) == len(mine) == min(steps, 12) * count


def test_a_stream_with_extra_images_goes_on_and_is_split_as_without():
    source = two_sources()
    whole = some(data.stream(source, 10, seed=3), 9)
    for first_step in (1, 7):
        part = some(data.stream(source, 10, seed=3, first_step=first_step), 2)
        assert_same(part, whole[first_step : first_step + 2])
    halves = [
        some(data.stream(source, 10, seed=3, process_index=p, process_count=2), 9) for p in (0, 1)
    ]
    joined = [
        jax.tree.map(lambda *part: np.concatenate(part), *pair)
        for pair in zip(*halves, strict=True)
    ]
    assert_same(joined, whole)
    # Each process has its part of both kinds.
    assert all(np.sum(batch.index >= 53) == 3 for half in halves for batch in half)
    # What is mixed in does not change the order of what it is mixed into.
    other = two_sources(more=40)
    real = [batch.index[batch.index < 53] for batch in whole]
    again = [b.index[b.index < 53] for b in some(data.stream(other, 10, seed=3), 9)]
    np.testing.assert_array_equal(real, again)


@pytest.mark.parametrize("fraction, each", [(0.6, 6), (0.9, 9)])
def test_epochs_on_the_device_share_their_batches_too(key, fraction, each):
    """The batches are those of one endless sequence, cut anywhere into epochs."""
    source = two_sources(fraction=fraction)
    parts = data.parts_of(source, 10)
    assert [part.share for part in parts] == [10 - each, each]
    order = jax.jit(data.shared_order, static_argnames=("parts", "steps"))
    whole = np.asarray(order(key, 0, parts=parts, steps=15))
    assert whole.dtype == np.int32
    epochs = [order(key, epoch, parts=parts, steps=5) for epoch in range(3)]
    np.testing.assert_array_equal(np.concatenate(epochs), whole)
    batches = whole.reshape(15, 10)
    assert np.all(np.sum(batches >= 53, axis=1) == each)
    for begin, size, count in ((0, 53, 10 - each), (53, 29, each)):
        mine = batches[(batches >= begin) & (batches < begin + size)].reshape(15, count)
        steps = min(15, size // count)
        assert len(set(mine[:steps].ravel().tolist())) == steps * count
        if size // count < 15:
            assert set(mine[steps : 2 * steps].ravel()) & set(mine[:steps].ravel())
    # Any part of a batch has its share, within one.
    for devices in (2, 5):
        shares = np.sum(batches.reshape(15, devices, -1) >= 53, axis=2)
        assert np.all(np.abs(shares - each / devices) < 1)


def test_extra_images_come_from_a_file_and_are_checked(tmp_path, npz):
    image, label = noise(7, seed=5)

    def written(**arrays):
        path = tmp_path / "extra.npz"
        np.savez(path, **arrays)
        return f"arrays:{path}"

    whole = f"arrays:{npz()}"
    good = written(image=image, label=label)
    train, valid, test = data.load(whole, holdout=4, extra=good, extra_fraction=0.25)
    assert train.extra is not None
    assert (train.size, train.extra.fraction) == (26, 0.25)
    np.testing.assert_array_equal(data.resident(train.extra.source)[0], image)
    np.testing.assert_array_equal(data.pooled(train)[1][26:], label)
    # What is held out, tested and trained on beside them is what it is without them.
    plain = data.load(whole, holdout=4)
    for one, other in zip((train, valid, test), plain, strict=True):
        np.testing.assert_array_equal(data.resident(one)[0], data.resident(other)[0])
    assert valid.extra is test.extra is plain.train.extra is None

    refuses = partial(refused, data.load, whole)
    refuses(extra="tfds:mnist", says=["extra='tfds:mnist'", "arrays:FILE.npz"])
    refuses(extra=f"arrays:{tmp_path / 'non.npz'}", says=["non.npz", "no such file"])
    refuses(extra=good, extra_fraction=1.0, says=["extra_fraction=1.0"])
    small = written(image=image[:, :4], label=label)
    refuses(extra=small, says=["extra.npz", "(4, 6, 3) uint8", "(8, 6, 3) uint8"])
    refuses(extra=written(image=image / 255, label=label), says=["float32", "(8, 6, 3) uint8"])
    refuses(extra=written(image=image, labels=label), says=["no label", "did you mean 'labels'"])
    refuses(extra=written(image=image, label=label + 9), says=["label", "[0, 4)"])
    refused(data.parts_of, two_sources(fraction=0.01), 10, says=["extra_fraction=0.01", "of 10"])
    refused(data.parts_of, two_sources(more=5), 10, says=["batch_size=10", "5 images of made"])
