"""Sources from the user's own files: arrays in an .npz, and folders of images."""

import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rain_jax.checks import UsageError, nearest
from rain_jax.data.source import MARGIN, Source, Splits, from_arrays, one_line, resized

PROBED = 64  # images of a folder whose headers are read for their size and colours
SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)


def _stored(file: str, wanted: Sequence[str]) -> tuple[Path, set[str], dict[str, np.ndarray]]:
    """The path of an .npz, the names of all its arrays, and those `wanted` that it has."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise UsageError(f"arrays:{file}: no such file: expected an .npz{_neighbours(path)}")
    try:
        # np.load would return the array of an .npy, and refuse an unreadable file in many ways.
        with open(path, "rb") as content, np.load(content, allow_pickle=False) as archive:
            keys = set(archive.files)
            return path, keys, {key: archive[key] for key in wanted if key in keys}
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zlib.error) as error:
        raise UsageError(
            f"{path}: not a readable .npz: expected one by np.savez ({one_line(error)})"
        ) from error
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise UsageError(
            f"{path}: damaged .npz: expected one by np.savez ({one_line(error)})"
        ) from error


def extra_from_npz(file: str, like: Source) -> Source:
    """The arrays `image` and `label` of a file, which must be as the images of `like` are."""
    path, keys, stored = _stored(file, ("image", "label"))
    for key in ("image", "label"):
        if key not in stored:
            raise UsageError(
                f"{path}: no {key} among {', '.join(sorted(keys)) or 'nothing'}: expected image, "
                f"label{nearest(key, keys)}"
            )
    names = like.class_names
    source = from_arrays(stored["image"], stored["label"], name=str(path), class_names=names)
    ours, theirs = (like.shape, like.read(0)[0].dtype), (source.shape, source.read(0)[0].dtype)
    if theirs != ours:
        raise UsageError(
            f"{path}: image has images of {theirs[0]} {theirs[1]}: expected {ours[0]} {ours[1]} as "
            f"in {like.name}"
        )
    return source


def from_npz(file: str) -> Splits:
    required = ("train_image", "train_label", "test_image", "test_label")
    wanted = (*required, "valid_image", "valid_label", "class_names")
    path, keys, stored = _stored(file, wanted)
    parts = ["train", "test"] + ["valid"] * ("valid_image" in stored or "valid_label" in stored)
    for part in parts:
        for key in (f"{part}_image", f"{part}_label"):
            if key not in stored:
                raise UsageError(
                    f"{path}: no {key} among {', '.join(sorted(keys)) or 'nothing'}: expected "
                    f"{', '.join(required)}{nearest(key, keys)}"
                )
    class_names = stored.get("class_names")
    names = None if class_names is None else [str(n) for n in np.ravel(class_names)]
    sources = {
        part: from_arrays(
            stored[f"{part}_image"],
            stored[f"{part}_label"],
            name=f"{path}:{part}",
            class_names=names,
        )
        for part in parts
    }
    kinds = {part: (source.shape, source.read(0)[0].dtype) for part, source in sources.items()}
    for part, (shape, dtype) in kinds.items():
        if (shape, dtype) != kinds["train"]:
            raise UsageError(
                f"{path}: {part}_image has images of {shape} {dtype}: expected "
                f"{kinds['train'][0]} {kinds['train'][1]} as in train_image"
            )
    # A split may lack the last classes: what one knows, all know.
    most = max(sources.values(), key=lambda source: source.classes)
    for part, source in sources.items():
        sources[part] = source._replace(classes=most.classes, class_names=most.class_names)
    return Splits(sources["train"], sources.get("valid"), sources["test"])


@dataclass(frozen=True)
class _FromFiles:
    """Reads image files; `shape` is None where they may vary in size."""

    files: tuple[str, ...]
    label: np.ndarray
    channels: int
    shape: tuple[int, int, int] | None

    def __call__(self, place: int) -> tuple[np.ndarray, int]:
        from PIL import Image as pillow

        file = self.files[place]
        try:
            with pillow.open(file) as picture:
                grey = _grey(picture.mode, file)
                if self.channels == 1 and not grey:
                    raise UsageError(
                        f"{file}: colours ({picture.mode}): expected grey as the other images; "
                        "convert them all to RGB"
                    )
                # A palette may hold transparency, which pillow drops by way of RGBA alone.
                full = picture.convert("RGBA") if picture.mode == "P" else picture
                image = np.array(full.convert("L" if self.channels == 1 else "RGB"))
        except UsageError:
            raise
        except Exception as error:  # by format and damage: OSError, SyntaxError, ValueError, ..
            raise _damaged(file, error) from error
        image = image.reshape(*image.shape[:2], self.channels)
        if self.shape is not None and image.shape != self.shape:
            raise _varying(file, (image.shape, self.shape))
        return image, int(self.label[place])


def _grey(mode: str, file: str) -> bool:
    if mode.startswith(("I", "F")):
        raise UsageError(f"{file}: pixels of mode {mode}: expected 8 bits a channel")
    return mode in ("1", "L", "LA")


def _damaged(file: str, error: Exception) -> UsageError:
    return UsageError(f"{file}: cannot be read: expected an undamaged image ({one_line(error)})")


def _varying(where: str, shapes: Sequence[tuple[int, ...]]) -> UsageError:
    listed = " and ".join("x".join(map(str, shape)) for shape in shapes)
    return UsageError(f"{where}: images of shapes {listed}: expected one shape, or resize=N")


def from_folder(name: str, resize: int | None) -> Splits:
    from PIL import Image as pillow

    root = Path(name).expanduser()
    if not root.is_dir():
        raise UsageError(
            f"folder:{name}: no such folder: expected PATH with train/{_neighbours(root)}"
        )
    if not (root / "train").is_dir():
        raise UsageError(
            f"folder:{name}: no train/ in it: expected one{_neighbours(root / 'train')}"
        )
    parts = ["train", *(part for part in ("test", "val") if (root / part).is_dir())]
    if len(parts) == 1:
        raise UsageError(
            f"folder:{name}: no test/ or val/ in it: expected one{_neighbours(root / 'test')}"
        )
    class_names = tuple(sorted(_subfolders(root / "train")))
    if not class_names:
        raise UsageError(f"{root / 'train'}: no folders in it: expected one for each class")
    listed: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    for part in parts:
        files: list[str] = []
        labels: list[int] = []
        for folder in sorted(_subfolders(root / part)):
            if folder not in class_names:
                raise UsageError(
                    f"{root / part / folder}: a class that is not in train/: expected one of "
                    f"{', '.join(class_names[:10])}{', ..' * (len(class_names) > 10)}"
                    f"{nearest(folder, class_names)}"
                )
            own = sorted(_images(root / part / folder))
            if not own:
                raise UsageError(
                    f"{root / part / folder}: no images in it: expected png, jpg, webp, .."
                )
            files += own
            labels += [class_names.index(folder)] * len(own)
        if not files:
            raise UsageError(f"{root / part}: no images in it: expected CLASS/*.png, jpg, webp, ..")
        listed[part] = (tuple(files), np.array(labels, np.int32))

    every = [file for files, _ in listed.values() for file in files]
    sizes: set[tuple[int, int]] = set()
    grey = True
    for i in range(min(PROBED, len(every))):
        file = every[i * len(every) // min(PROBED, len(every))]
        try:
            with pillow.open(file) as picture:
                sizes.add((picture.height, picture.width))
                mode = picture.mode
        except Exception as error:
            raise _damaged(file, error) from error
        grey &= _grey(mode, file)
    channels = 1 if grey else 3
    if len(sizes) > 1 and resize is None:
        raise _varying(f"folder:{name}", sorted(sizes)[:2])
    height, width = sorted(sizes)[0]

    def part_source(part: str) -> Source:
        files, label = listed[part]
        shape = (height, width, channels)
        reader = _FromFiles(files, label, channels, shape if resize is None else None)
        source = Source(f"folder:{name}", len(files), shape, len(class_names), class_names, reader)
        if resize is None:
            return source
        return resized(source, resize, round(resize * MARGIN) if len(sizes) > 1 else resize)

    sources = {part: part_source(part) for part in parts}
    test = sources.pop("test", None) or sources.pop("val")
    return Splits(sources["train"], sources.get("val"), test)


def _subfolders(folder: Path) -> Iterator[str]:
    with os.scandir(folder) as entries:
        yield from (e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _images(folder: Path) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            if suffix in SUFFIXES and not entry.name.startswith("."):
                yield entry.path


def _neighbours(path: Path) -> str:
    """A hint at a like name in the same place, or at the part of the path that is missing."""
    if path.parent.is_dir():
        return nearest(path.name, (entry.name for entry in os.scandir(path.parent)))
    return f"; {path.parent} is not there either"
