"""The sections of a config that are not calls into `rain_jax`, each with its ranges."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

from rain_jax import data
from rain_jax.checks import UsageError, one_of, within
from rain_jax.image.corruptions import FAMILIES, SEVERITIES
from rain_jax.parallel import Devices, Mapping, Statistics, Sums, choose_devices, place
from rain_jax.types import Image, Key


class Plan(NamedTuple):
    """How long a run is, in steps."""

    batch_size: int
    per_epoch: int
    total: int

    def steps(self, epochs: float) -> int:
        """`epochs` in steps, one at least."""
        return max(1, round(epochs * self.per_epoch))


@dataclass(frozen=True)
class Augment:
    """What happens to each training image, by its own key.

    Random crops after padding by `crop_padding` pixels and horizontal flips, inside the step; and,
    for streams alone, Inception's crop: a random part of `area` = (low, high) of the original
    image, before it is resized.
    """

    crop_padding: int = 0
    flip: bool = False
    pad_mode: Literal["constant", "reflect"] = "constant"
    area: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        within("config.augment.crop_padding", self.crop_padding, 0, 64)
        if self.area is not None:
            low = within("config.augment.area[0]", self.area[0], above=0.0, high=1.0)
            within("config.augment.area[1]", self.area[1], low, 1.0)

    @property
    def change(self) -> Callable[[Key, Image], Image]:
        """The part that runs on the device."""
        return partial(
            data.augment, crop_padding=self.crop_padding, flip=self.flip, pad_mode=self.pad_mode
        )


@dataclass(frozen=True)
class Training:
    """How long, in what batches (over all devices), and how often a line is logged, in steps.

    `feed="resident"` keeps the whole training set on every device and needs no host in the loop;
    "stream" reads through `workers` processes; "auto" takes the first up to a gigabyte.
    `steps_per_dispatch` steps are one call of one program, which spares the host's share of each
    where steps are short, and metrics, checkpoints and signals wait for its end.
    With more than one of `replays` every batch is used so often, each time one backward pass for
    the weights and for a perturbation of the images: Free adversarial training, of the method
    `natural`. `tensorboard` writes event files beside metrics.jsonl.
    """

    epochs: float = 10.0
    batch_size: int = 128
    log_every: int = 50
    feed: Literal["auto", "resident", "stream"] = "auto"
    workers: int = 0
    steps_per_dispatch: int = 1
    replays: int = 1
    tensorboard: bool = False

    def __post_init__(self) -> None:
        within("config.training.epochs", self.epochs, above=0.0)
        within("config.training.batch_size", self.batch_size, 1)
        within("config.training.log_every", self.log_every, 1)
        within("config.training.workers", self.workers, 0, 256)
        within("config.training.steps_per_dispatch", self.steps_per_dispatch, 1)
        within("config.training.replays", self.replays, 1)
        if self.tensorboard and importlib.util.find_spec("tensorboardX") is None:
            raise UsageError(
                "config.training.tensorboard=True: expected tensorboardX to be installed: "
                "pip install 'rain_jax[tensorboard]'"
            )

    def plan(self, images: int) -> Plan:
        """Full batches only: what is left of an epoch's shuffle is dropped, others next time."""
        per_epoch = images // self.batch_size
        return Plan(self.batch_size, per_epoch, max(1, round(self.epochs * per_epoch)))


@dataclass(frozen=True)
class Start:
    """What a defended classifier begins with, and which part of it learns.

    `classifier` is the folder of a finished run, whose weights it takes, or a file of PyTorch's
    (.pt, .pth, or its arrays in an .npz) with a published ResNet's; `defence` is the folder of an
    upscaler's run, or a file `FILE.npz` with weights as their authors published them. Without
    either, weights are random. `trained` is the part that learns; with `drift` the batch statistics
    of a frozen classifier follow the training images, as in the code of RAIN's authors.
    """

    classifier: str | None = None
    defence: str | None = None
    trained: Literal["classifier", "defence", "both"] = "classifier"
    drift: bool = False


@dataclass(frozen=True)
class Ensemble:
    """Several models that differ in one number, `defence.KEY` of `values`, and answer together.

    They train side by side, each from the same start. "vote" is the majority, "mean" the mean of
    their logits.
    """

    key: str
    values: tuple[float, ...]
    combine: Literal["vote", "mean"] = "vote"

    def __post_init__(self) -> None:
        if len(self.values) < 2:
            raise UsageError(f"config.ensemble.values={self.values!r}: expected two at least")


@dataclass(frozen=True)
class Validation:
    """A look at the held-out images every so many epochs; the best checkpoint is chosen by it."""

    every_epochs: float = 1.0
    attack: dict[str, Any] | None = None
    batch_size: int = 256

    def __post_init__(self) -> None:
        within("config.validation.every_epochs", self.every_epochs, above=0.0)
        within("config.validation.batch_size", self.batch_size, 1)


@dataclass(frozen=True)
class Corrupted:
    """Test images under a common corruption, as `experiments.corruptions` makes them.

    `family` is one of `rain_jax.image.corruptions.FAMILIES`, `severity` 1 to 5. `constants` are
    those of ImageNet-C or CIFAR-10-C, by default whichever were made for images of about this size;
    `frost` is a file, or a folder, of photographs for the family of that name.
    """

    family: str
    severity: int
    seed: int = 0
    constants: Literal["auto", "imagenet", "cifar"] = "auto"
    frost: str | None = None

    def __post_init__(self) -> None:
        one_of("config.evaluation.corruption.family", self.family, FAMILIES)
        ends = SEVERITIES[0], SEVERITIES[-1]
        within("config.evaluation.corruption.severity", self.severity, *ends)
        within("config.evaluation.corruption.seed", self.seed, 0, 2**31 - 1)
        if self.family == "frost" and self.frost is None:
            raise UsageError(
                "config.evaluation.corruption.frost is missing: expected photographs of frost, a "
                "file or a folder"
            )


@dataclass(frozen=True)
class Evaluation:
    """What is measured on the test images: `attacks` maps names of columns to attacks.

    `suite` adds the members of one of `rain_jax.attacks.suites`. With `cascade`, which a suite
    brings along, an attack is spared the images that fell to those before it (fewer steps first, a
    suite's members last), and columns tell who stands after all of them so far. `distances` maps
    names to minimum-norm attacks, which tell the accuracy at every radius.

    `ladder` adds the rungs of `config.ladder` and its checks.

    An attack with `through` climbs another form of a defended model than the one that is judged:
    a surrogate of its defence, "classifier" for the one without it, and of an ensemble "mean",
    "margins" or "member:0"; "+" joins two, as in "cubic+margins"; "run:FOLDER" is the model of
    another run. One with a `radius` of its own is a check, and no part of the worst case.

    `images` takes the first so many, all of them by default. `draws` is how often a model is asked
    for each verdict, by default 20 times where it is random and else once; `eight_bit` rounds
    images before they are judged, as if they had been saved: an attack goes on until the rounded
    image is wrong, too. `checkpoint` is the one with the best held-out score, or the last.

    Results are saved after every `block` images, by default four batches, and a killed evaluation
    goes on behind the last of them. `save_images` leaves the images that broke the model in
    adversarial.npy. `checks` looks for what usually makes robustness look larger than it is, and
    marks the numbers where it finds it; the ladder has checks of its own.

    `condition` is what a network with `modulation` is told, by default what its training left: one
    number for all images, which attackers know. `corruption`, see `Corrupted`, makes other images
    of those for testing, and attacks begin at them.
    """

    attacks: dict[str, dict[str, Any]]
    distances: dict[str, dict[str, Any]]
    suite: dict[str, Any] | None = None
    ladder: dict[str, Any] | None = None
    cascade: bool | None = None
    images: int | None = None
    batch_size: int = 256
    draws: int | None = None
    eight_bit: bool = False
    checkpoint: Literal["best", "latest"] = "best"
    block: int | None = None
    save_images: bool = True
    checks: bool = True
    condition: float | None = None
    corruption: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.condition is not None:
            within("config.evaluation.condition", self.condition, 0.0, 1.0)
        if self.block is not None:
            within("config.evaluation.block", self.block, 1)
        if self.images is not None:
            within("config.evaluation.images", self.images, 1)
        within("config.evaluation.batch_size", self.batch_size, 1)
        if self.draws is not None:
            within("config.evaluation.draws", self.draws, 1)
        for section, names in (("attacks", self.attacks), ("distances", self.distances)):
            for name in names:
                if name in ("clean", "worst case"):
                    raise UsageError(
                        f"config.evaluation.{section}.{name}: expected another name: there is a "
                        "column of this one"
                    )
        if not (self.attacks or self.suite or self.ladder or self.distances):
            raise UsageError(
                "config.evaluation.attacks={}: expected an attack at least, such as "
                "dict(pgd=dict(name='pgd', steps=20))"
            )


@dataclass(frozen=True)
class Checkpointing:
    """Saved every so many epochs: the last `keep`, and the best by held-out robust accuracy."""

    every_epochs: float = 1.0
    keep: int = 2
    keep_best: bool = True

    def __post_init__(self) -> None:
        within("config.checkpoints.every_epochs", self.every_epochs, above=0.0)
        within("config.checkpoints.keep", self.keep, 1)


@dataclass(frozen=True)
class Parallel:
    """How many devices (all by default) and by which mapping a step runs on them.

    `sums` is what gradients are sent as from one to the other: bfloat16 is half the bytes, and
    rounds each device's share of a gradient to 8 bits of precision. `statistics` is whose images
    batch normalisation goes by in training: those of "all" devices, the same for any number of
    them, or of each "device", which spares most of what devices say to each other (docs/scaling.md)
    and is what data-parallel training in PyTorch does unless told otherwise. `overlap` asks XLA on
    several GPUs or TPUs to send gradients in parts, while the backward pass goes on; what it gains
    has not been measured.
    """

    mapping: Mapping = "shard_map"
    devices: int | None = None
    sums: Sums = "float32"
    statistics: Statistics = "all"
    overlap: bool = False

    def placed(self, *, training: bool = False) -> Devices:
        """The devices at hand. Evaluation has no gradients that could overlap with anything."""
        chosen = choose_devices(self.devices, training=training)
        return place(self.mapping, chosen, overlap=training and self.overlap)
