"""How robust any model is, in one call: attack after attack on the images that still stand."""

import math
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from rain_jax.checks import UsageError, whole, within
from rain_jax.data import as_float
from rain_jax.evaluation.counts import standing
from rain_jax.evaluation.packing import Drive, packed
from rain_jax.evaluation.verdicts import Rules, Verdicts, as_they_are, judging
from rain_jax.keys import is_key
from rain_jax.norms import linf
from rain_jax.parallel import Devices, choose_devices, place
from rain_jax.types import Array, Attack, Batch, Image, Iteration, Key, LogitsFn, PyTree, Threat

Judge = Callable[..., Iterator[Verdicts]]
Name = TypeVar("Name", bound=Hashable)


def attacked(
    model: Callable[[PyTree, Key, Image], Array],
    variables: PyTree,
    attacks: Mapping[str, Attack | Iteration],
    threat: Threat,
    images: Any,
    labels: Any,
    *,
    key: Key | None = None,
    batch_size: int = 256,
    draws: int = 1,
    eight_bit: bool = False,
    devices: Devices | None = None,
) -> dict[str, np.ndarray]:
    """Who stands: bool [N] under "clean", and under each attack's name after it and those before.

    `model(variables, key, image)` gives the logits [K] of one image [H, W, C], pixels in [0, 1],
    which is what an attack sees. One that does not draw ignores the key; of one that does the mean
    of `draws` passes is judged, and one pass says little of it. `attacks` is
    `rain_jax.attacks.suites.standard(threat)`, or {"pgd": pgd(threat, steps=40)}. `images`
    [N, H, W, C] are uint8, or floats in [0, 1]; `labels` [N] are whole numbers below K.
    `batch_size` images are shown to the model at once, over all `devices` (all that there are
    unless given), and draws do not turn on either.

    An attack gets the images that those before it left standing. What it returns, with `eight_bit`
    rounded to 256 levels, is judged by fresh keys, and counts only where it keeps to `threat`
    (radius in pixel values: 8 / 255, not 8), which is looked at in float64.

    Raises `UsageError` for images, labels and threats of other kinds. Warns where an attack leaves
    the threat, and of a first few images' logits that are not finite, look like probabilities, or
    are drawn where one draw is judged. Whether gradients are of any use is no part of this:
    `experiments.evaluate` looks into that, too.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    whole("batch_size", batch_size, 1)
    whole("draws", draws, 1)
    if jnp.issubdtype(images.dtype, jnp.floating):  # bfloat16 among them
        images = images.astype(np.float32)
    if not isinstance(threat, Threat):
        raise UsageError(f"threat={threat!r:.60}: expected a Threat(norm, radius)")
    _check(model, variables, threat, images, labels)
    if not isinstance(attacks, Mapping):
        raise UsageError(
            f"attacks are a {type(attacks).__name__}: expected names and attacks, "
            '{"pgd": pgd(threat, steps=40)}'
        )
    if "clean" in attacks:
        raise UsageError("attacks: expected another name than 'clean', which is taken")
    if key is not None and not is_key(key):
        raise UsageError(f"key={key!r:.60}: expected one as jax.random.key makes it")
    _look(model, variables, images, draws)
    devices = place("shard_map", choose_devices()) if devices is None else devices
    rules = Rules(threat, draws, eight_bit)

    def logits_fn_of(variables: PyTree) -> LogitsFn:
        return lambda key, image: model(variables, key, image)

    def batches(wanted: np.ndarray) -> Iterator[Batch]:
        for start in range(0, len(labels), batch_size):
            rows = slice(start, start + batch_size)
            index: Any = np.arange(len(labels), dtype=np.int32)[rows]
            image: Any = images[rows]
            label: Any = labels[rows].astype(np.int32)
            valid: Any = wanted[rows]
            yield Batch(image, label, index, valid)

    judge = judging(logits_fn_of, rules, devices, batch_size=batch_size)
    # Of a model that draws the worst mean is wanted, not the first that is bad enough.
    early = (judge if eight_bit else True) if draws == 1 else False
    drives: dict[str, Drive] = {
        "clean": lambda variables, key, batches: as_they_are(batches),
        **{
            name: packed(attack, logits_fn_of, devices, batch_size=batch_size, early=early)
            for name, attack in attacks.items()
        },
    }
    root = jax.random.key(0) if key is None else key
    return cascade(drives, judge, devices.replicate(variables), root, batches, len(labels))


def cascade(
    drives: Mapping[Name, Drive],
    judge: Judge,
    variables: PyTree,
    key: Key,
    batches: Callable[[np.ndarray], Iterable[Batch]],
    count: int,
) -> dict[Name, np.ndarray]:
    """Who of `count` images stands after each of some drives, which are given those that stood.

    `batches(wanted)` are the images, valid where `wanted` (bool [N]) is true. Warns of a drive
    whose images leave the threat, for which they count as unbroken.
    """
    stands = np.ones(count, bool)
    found: dict[Name, np.ndarray] = {}
    for number, (name, drive) in enumerate(drives.items()):
        own = jax.random.fold_in(key, number)
        outside = given = 0
        for some in judge(variables, own, drive(variables, own, batches(stands))):
            stands[some.judgement.index] = standing(some.judgement)
            outside += int(np.sum(~some.judgement.allowed))
            given += len(some.judgement.index)
        if outside:
            warnings.warn(
                f"{name}: {outside:,} of {given:,} images are outside of the threat and count as "
                "unbroken: an attack for another radius, norm or range?",
                stacklevel=3,
            )
        found[name] = stands.copy()
    return found


def _look(model: Any, variables: PyTree, images: np.ndarray, draws: int) -> None:
    """Warns of what the logits of a few images say against the numbers to come."""
    few = jnp.asarray(as_float(images[:4]))
    # Two calls: a module of PyTorch that draws in secret answers all keys of one alike.
    program = jax.jit(lambda variables, key: jax.vmap(model, (None, None, 0))(variables, key, few))
    one, other = (
        np.asarray(program(variables, jax.random.key(seed)), np.float32) for seed in (0, 1)
    )
    found = []
    if not np.all(np.isfinite(one)):
        found.append(
            "the first images' logits are not finite: they count as wrong, attacked or not"
        )
    elif np.all(one >= 0) and np.allclose(np.sum(one, axis=-1), 1.0, atol=1e-3):
        found.append("the model seems to give probabilities: attacks climb logits")
    if draws == 1 and not np.array_equal(one, other, equal_nan=True):
        found.append(
            "the model draws, and one draw is judged: give draws=20, and attacks along means, "
            "estimator=eot(draws=20)"
        )
    for text in found:
        warnings.warn(text, stacklevel=3)


def _check(model: Any, variables: PyTree, threat: Threat, images: Any, labels: Any) -> None:
    """Refuses what an attack would make nonsense of, before anything is compiled."""
    most = threat.high - threat.low if threat.norm is linf else math.inf
    if isinstance(threat.radius, str):
        raise UsageError(f"threat.radius={threat.radius!r}: expected a number")
    radius = float(threat.radius)
    if most < radius <= 255 * most:
        raise UsageError(
            f"threat.radius={radius:g}: expected a number in [0, {most:g}]; pixels are in "
            f"[{threat.low:g}, {threat.high:g}]: did you mean {radius:g} / 255?"
        )
    if radius == math.inf:
        raise UsageError("threat.radius=inf: expected a distance that can be kept")
    within("threat.radius", radius, 0.0, most)
    if images.ndim != 4 or not len(images):
        raise UsageError(f"images are {list(images.shape)}: expected [N, H, W, C]")
    if images.dtype != np.uint8 and images.dtype != np.float32:
        raise UsageError(f"images are {images.dtype}: expected uint8, or floats in [0, 1]")
    floats = images.dtype != np.uint8
    if floats and (unknown := np.count_nonzero(np.isnan(images).any(axis=(1, 2, 3)))):
        raise UsageError(f"images: {unknown:,} of {len(images):,} have pixels that are no numbers")
    low, high = float(as_float(np.min(images))), float(as_float(np.max(images)))
    if not (threat.low <= low and high <= threat.high):
        other = "" if images.dtype == np.uint8 else ", or uint8"
        raise UsageError(
            f"images have pixels in [{low:.3g}, {high:.3g}]: expected "
            f"[{threat.low:g}, {threat.high:g}]{other}"
        )
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise UsageError(
            f"labels are {labels.dtype} {list(labels.shape)}: expected whole numbers "
            f"[{len(images)}]"
        )
    image = jax.ShapeDtypeStruct(images.shape[1:], jnp.float32)
    logits = jax.eval_shape(model, variables, jax.eval_shape(jax.random.key, 0), image)
    if getattr(logits, "ndim", None) != 1:
        raise UsageError(
            f"the model gives {getattr(logits, 'shape', type(logits).__name__)} for one image "
            f"{list(image.shape)}: expected logits [K], as model.apply(variables, image[None])[0]"
        )
    if np.min(labels) < 0 or np.max(labels) >= logits.shape[0]:
        raise UsageError(
            f"labels are {np.min(labels)} to {np.max(labels)}: expected 0 to "
            f"{logits.shape[0] - 1}, the model's classes"
        )
