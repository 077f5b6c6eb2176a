"""The judge: whether an image is classified rightly, by keys of its own, within the threat.

An attack returns an image; whether it succeeded is decided here. On given images verdicts depend
neither on the batch size nor on the number of devices: `boundary` sees to those that rounding could
turn. (What an attack finds does depend on them: a gradient that rounds to another sign leads it to
another image, as another random start would.)
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rain_jax.checks import whole
from rain_jax.data import as_float
from rain_jax.evaluation import boundary
from rain_jax.norms import allowed
from rain_jax.parallel import Devices, image_keys, round_up, rows_of_process
from rain_jax.types import (
    Array,
    AxisName,
    Batch,
    Image,
    Key,
    LogitsFn,
    PyTree,
    Scalar,
    Target,
    Threat,
    Variables,
)

# By how much an image may leave a threat. Pixels are float32 numbers up to 1, so each is right to
# 2^-24 at best; an attack adds, projects and clips, and each of these rounds once. The radius is a
# float32 in the program, too.
_PIXEL, _RADIUS = 2.0**-22, 1e-6

LogitsFnOf = Callable[[Variables], LogitsFn]
ModelOf = Callable[[Variables, PyTree], LogitsFn]
"""A model whose settings may differ from image to image, given variables and an image's values."""


class Lanes(NamedTuple):
    """A `Batch` whose images may appear more than once, each time under settings of its own.

    Fields are those of `Batch`, with `values`, a pytree of arrays [B, ...] whose rows belong to the
    images, and how many `steps` an attack takes with them.
    """

    image: Any
    label: Any
    # A tuple's own `index` gives way, as in `Batch`.
    index: Any
    valid: Any
    values: PyTree
    steps: Any  # [B] int32


def values_of(batch: Batch | Lanes) -> PyTree:
    """The values of each image; of a `Batch` there are none."""
    return batch.values if isinstance(batch, Lanes) else ()


class Judgement(NamedTuple):
    """What the judge saw of each image; arrays [N], in the order of the data set.

    Those of JAX inside a program, of NumPy outside.
    """

    index: Any  # place in the data set
    label: Any
    right: Any  # bool: the mean logits over the draws favour the label
    share: Any  # float32 in [0, 1]: of the single draws, those that favour the label
    margin: Any  # float32, of the mean logits; positive = misclassified
    prediction: Any  # int32, the class of the largest mean logit
    allowed: Any  # bool: the image keeps to the threat; one that does not counts as unbroken
    distance: Any  # in the threat's norm, from the clean image
    rounding: Any  # float32: a bound on how far rounding may move the margin
    # bool: a margin lay within that of zero, so the verdict is that of the program of one image
    near_boundary: Any


class Found(NamedTuple):
    """Images that are done, NumPy arrays [n, ...]; which ones come together means nothing."""

    batch: Batch | Lanes  # the clean images
    image: np.ndarray  # float32 [n, H, W, C], what the attack returns
    score: np.ndarray  # positive where the attack thinks them broken
    steps: np.ndarray  # int32, that were taken
    queries: np.ndarray  # int32, for attacks that count them; else -1


class Rules(NamedTuple):
    """How images are judged: within which threat, by how many draws, as which numbers."""

    threat: Threat
    draws: int = 1  # of a random model, for each verdict
    eight_bit: bool = False  # whether images are rounded first, as if they had been saved


def judge(
    logits_fn: LogitsFn, rules: Rules, key: Key, clean: Image, candidate: Image, label: Target,
    bound: float = boundary.FLOAT32,
) -> tuple[tuple[Scalar, ...], Image]:  # fmt: skip
    """The fields of a `Judgement` from `right` on, and the image that was judged.

    That is `candidate`, rounded where the rules say so. Random models are judged by their mean
    logits over fresh keys. Logits that are not numbers are wrong, whatever they favour, and so are
    ties: a constant classifier must not look right for one of the classes. `bound` is on rounding,
    in units of the largest logit.
    """
    if rules.eight_bit:
        candidate = rounded(rules.threat, clean, candidate)

    def right(logits: Array) -> tuple[Array, Scalar]:
        wrong = jnp.where(jnp.arange(logits.shape[-1]) == label, -jnp.inf, logits)
        margin = jnp.max(wrong) - logits[label]
        return jnp.all(jnp.isfinite(logits)) & (margin < 0), margin

    keys = jax.random.split(key, rules.draws)
    logits = jax.vmap(lambda k: logits_fn(k, candidate))(keys)
    mean = jnp.mean(logits, axis=0)
    verdict, margin = right(mean)
    single, margins = jax.vmap(right)(logits)
    share = jnp.mean(single, dtype=jnp.float32)
    prediction = jnp.argmax(mean).astype(jnp.int32)
    distance = rules.threat.norm.measure(candidate - clean)
    keeps = allowed(rules.threat, clean, candidate)
    rounding = jnp.float32(bound * jnp.max(jnp.abs(logits)))
    near = (jnp.abs(margin) <= rounding) | jnp.any(jnp.abs(margins) <= rounding)
    near &= jnp.isfinite(rounding)  # logits that are not finite are wrong, however they round
    return (verdict, share, margin, prediction, keeps, distance, rounding, near), candidate


def rounded(threat: Threat, clean: Image, candidate: Image) -> Image:
    """The image of 256 levels nearest to `candidate`, or next to it where that leaves the threat.

    There pixels are rounded towards `clean`, which keeps any threat if `clean` has 256 levels.
    """
    levels = candidate * 255.0
    near = jnp.round(levels) / 255.0
    # Half of what `kept_in_float64` lets pass: what float32 finds to keep the threat here must keep
    # it there, and a level reached through arithmetic in float32 lies a few ulp beside itself.
    slack = _PIXEL / 2
    inward = jnp.where(
        candidate > clean, jnp.floor(levels + 255 * slack), jnp.ceil(levels - 255 * slack)
    )
    return jnp.where(allowed(threat, clean, near, slack), near, inward / 255.0)


def split_for_judge(key: Key) -> tuple[Key, Key]:
    """(attack's key, judge's key) of one image.

    Scored on the draws that it was tuned on, an attack against a random model looks stronger than
    it is.
    """
    attack_key, judge_key = jax.random.split(key)
    return attack_key, judge_key


class Verdicts(NamedTuple):
    """Judged images: their judgement, and NumPy arrays [n, ...] of what was judged."""

    judgement: Judgement
    image: np.ndarray  # float32 [n, H, W, C], rounded where the rules say so
    steps: np.ndarray  # int32, of the attack
    queries: np.ndarray  # int32, for attacks that count them; else -1
    values: PyTree = ()  # of `Lanes`


Judging = Callable[[Variables, Key, Iterable[Found]], Iterator[Verdicts]]


def judging(
    logits_fn_of: LogitsFnOf, rules: Rules, devices: Devices, *, batch_size: int
) -> Judging:
    """A program that judges found images, `batch_size` at a time: `(variables, key, found)`.

    Distances, and whether the threat was kept, are computed again in float64 on the host.
    """
    whole("draws", rules.draws, 1)

    def model_of(variables: Variables, values: PyTree) -> LogitsFn:
        return logits_fn_of(variables)

    return judging_lanes(model_of, lambda values: rules, devices, batch_size=batch_size)


def judging_lanes(
    model_of: ModelOf, rules_of: Callable[[PyTree], Rules], devices: Devices, *, batch_size: int
) -> Judging:
    """`judging` for images of `Lanes`: each by the rules and by the model of its values.

    `rules_of` is given the traced values of one image, and NumPy's of many: a radius may be among
    them, nothing else of the rules.
    """
    judging_of = _Judging(model_of, rules_of, devices)
    program = devices.map(judging_of.body, inputs=(False, False, True, True), outputs=(True, True))
    size = round_up(batch_size, devices.size)

    def judged(variables: Variables, key: Key, found: Found) -> Verdicts:
        count = len(found.batch.index)
        full = jax.tree.map(lambda leaf: _padded(leaf, size), (found.batch, found.image))
        seen = devices.gather(program(variables, key, *devices.split(rows_of_process(full))))
        judgement, images = jax.tree.map(lambda leaf: leaf[:count], seen)
        judgement, images = judging_of.settle(
            variables, key, found.batch, found.image, judgement, images
        )
        values = values_of(found.batch)
        threat = rules_of(values).threat
        keeps, distance = kept_in_float64(threat, as_float(found.batch.image), images)
        judgement = judgement._replace(allowed=keeps, distance=distance)
        return Verdicts(judgement, images, found.steps, found.queries, values)

    def judge_all(variables: Variables, key: Key, found: Iterable[Found]) -> Iterator[Verdicts]:
        for some in _regrouped(found, size):
            yield judged(variables, key, some)

    return judge_all


class _Judging:
    """What judges a batch, on one device, and settles what rounding may have turned."""

    def __init__(self, model_of: ModelOf, rules_of: Callable[[PyTree], Rules], devices: Devices):
        self._model_of, self._rules_of = model_of, rules_of
        self._platform = devices.mesh.devices.flat[0].platform
        self._alone = boundary.one_by_one(self.body, devices)

    def body(
        self, variables: Variables, key: Key, batch: Batch | Lanes, found: Array,
        axis_name: AxisName = None,
    ) -> tuple[Judgement, Array]:  # fmt: skip
        """Judges the images `found` of a batch, by the keys of its images."""

        def one(
            bound: float, key: Key, clean: Image, found: Image, label: Target, values: PyTree
        ) -> Any:
            rules, logits_fn = self._rules_of(values), self._model_of(variables, values)
            judge_key = split_for_judge(key)[1]
            return judge(logits_fn, rules, judge_key, clean, found, label, bound)

        keys = image_keys(key, batch.index)
        rows = keys, as_float(batch.image), found, batch.label, values_of(batch)
        bound = self._bound(variables, *jax.tree.map(lambda leaf: leaf[0], rows))
        seen, images = jax.vmap(partial(one, bound))(*rows)
        return Judgement(batch.index, batch.label, *seen), images

    def _bound(
        self, variables: Variables, key: Key, clean: Image, found: Image, label: Target, values: Any
    ) -> float:
        """How far rounding may move the margin, by the types that the model computes in."""
        model = lambda variables, key, image, values: self._model_of(variables, values)(key, image)
        return boundary.rounding(model, variables, key, found, values, platform=self._platform)

    def settle(
        self, variables: Variables, key: Key, batch: Batch | Lanes, found: np.ndarray,
        judgement: Judgement, images: np.ndarray,
    ) -> tuple[Judgement, np.ndarray]:  # fmt: skip
        """The same judgements, but of images near the boundary those of the program of one image.

        All arrays are NumPy's, [n, ...] of any batch; `found` is what `body` was given.
        """
        places = np.flatnonzero(judgement.near_boundary)
        if not len(places):
            return judgement, images
        some = jax.tree.map(lambda leaf: np.asarray(leaf)[places], (batch, found))
        seen, again = self._alone(variables, key, *some)
        before = judgement.margin[places]
        boundary.warn_where_it_is_too_narrow(before, seen.margin, seen.rounding)
        seen = seen._replace(near_boundary=np.ones(len(places), bool))
        return boundary.replaced((judgement, images), places, (seen, again))


def as_they_are(batches: Iterable[Batch | Lanes]) -> Iterator[Found]:
    """The clean images as if an attack had found them: judged, they give the clean accuracy."""
    for batch in batches:
        valid = np.asarray(batch.valid)
        some = jax.tree.map(lambda leaf, v=valid: np.asarray(leaf)[v], batch)
        zeros = np.zeros(len(some.index), np.int32)
        yield Found(some, as_float(some.image), zeros.astype(np.float32), zeros, zeros - 1)


def kept_in_float64(
    threat: Threat, clean: np.ndarray, found: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Whether images [n, H, W, C] keep to the threat, bool [n], and their distances float32 [n].

    In float64, to a tolerance of 2^-22 for each pixel value (added up as the norm adds them) and a
    millionth of the radius, which may be [n]. Bounds are exact.
    """
    change = (found.astype(np.float64) - clean.astype(np.float64)).reshape(len(found), -1)
    distance = np.linalg.norm(change, ord=threat.norm.order, axis=1)
    slack = _PIXEL * float(change.shape[1]) ** (1 / threat.norm.order)
    radius = np.asarray(threat.radius, np.float64)
    low, high = np.float32(threat.low), np.float32(threat.high)
    # Written so that not-a-number is never allowed.
    bounded = np.all((found >= low) & (found <= high), axis=(1, 2, 3))
    return bounded & (distance <= radius * (1 + _RADIUS) + slack), distance.astype(np.float32)


def _padded(leaf: np.ndarray, size: int) -> np.ndarray:
    return np.pad(leaf, ((0, size - len(leaf)), *((0, 0) for _ in leaf.shape[1:])))


def _regrouped(found: Iterable[Found], size: int) -> Iterator[Found]:
    """The same images, `size` at a time and the rest at the end."""
    waiting: Found | None = None
    for some in found:
        both = [some] if waiting is None else [waiting, some]
        waiting = jax.tree.map(lambda *leaves: np.concatenate(leaves), *both)
        while waiting is not None and len(waiting.steps) >= size:
            yield jax.tree.map(lambda leaf: leaf[:size], waiting)
            waiting = jax.tree.map(lambda leaf: leaf[size:], waiting)
    if waiting is not None and len(waiting.steps):
        yield waiting
