"""The judge: whether an image is classified rightly, by keys of its own, within the threat.

An attack returns an image; whether it succeeded is decided here. Verdicts are per image and do not
depend on the batch size or on the number of devices.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rain_jax.checks import whole
from rain_jax.data import as_float
from rain_jax.norms import allowed
from rain_jax.parallel import Devices, image_keys, round_up, rows_of_process
from rain_jax.types import (
    Array,
    Attack,
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
    logits_fn: LogitsFn, rules: Rules, key: Key, clean: Image, candidate: Image, label: Target
) -> tuple[tuple[Scalar, ...], Image]:
    """The fields of a `Judgement` from `right` on, and the image that was judged.

    That is `candidate`, rounded where the rules say so. Random models are judged by their mean
    logits over fresh keys. Logits that are not numbers are wrong, whatever they favour, and so are
    ties: a constant classifier must not look right for one of the classes.
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
    share = jnp.mean(jax.vmap(lambda one: right(one)[0])(logits), dtype=jnp.float32)
    prediction = jnp.argmax(mean).astype(jnp.int32)
    distance = rules.threat.norm.measure(candidate - clean)
    keeps = allowed(rules.threat, clean, candidate)
    return (verdict, share, margin, prediction, keeps, distance), candidate


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


class Evaluator(NamedTuple):
    """Programs that attack and judge batches on all devices; made once, run on any batch."""

    clean: Callable[..., tuple[Judgement, Array]]
    attacks: dict[str, Callable[..., tuple[Judgement, Array]]]
    devices: Devices


def evaluator(
    logits_fn_of: LogitsFnOf, rules: Rules, attacks: dict[str, Attack], devices: Devices
) -> Evaluator:
    """Compiles lazily, one program for each attack: `(variables, key, batch) -> judgement, images`.

    Every image goes through the whole attack, broken or not: for looks at a model while it trains.
    `logits_fn_of(variables)` is the model; variables are data, so that one program serves every
    checkpoint.
    """
    whole("draws", rules.draws, 1)

    def program(attack: Attack | None) -> Callable[..., tuple[Judgement, Array]]:
        def body(
            variables: Variables, key: Key, batch: Batch, axis_name: AxisName = None
        ) -> tuple[Judgement, Array]:
            logits_fn = logits_fn_of(variables)

            def one(key: Key, image: Image, label: Target) -> tuple[tuple[Scalar, ...], Image]:
                attack_key, judge_key = split_for_judge(key)
                found = image if attack is None else attack(attack_key, logits_fn, image, label)
                return judge(logits_fn, rules, judge_key, image, found, label)

            keys = image_keys(key, batch.index)
            seen, images = jax.vmap(one)(keys, as_float(batch.image), batch.label)
            return Judgement(batch.index, batch.label, *seen), images

        return devices.map(body, inputs=(False, False, True), outputs=(True, True))

    programs = {name: program(attack) for name, attack in attacks.items()}
    return Evaluator(program(None), programs, devices)


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

    def body(
        variables: Variables, key: Key, batch: Batch | Lanes, found: Array,
        axis_name: AxisName = None,
    ) -> tuple[Judgement, Array]:  # fmt: skip
        def one(key: Key, clean: Image, found: Image, label: Target, values: PyTree) -> Any:
            rules, logits_fn = rules_of(values), model_of(variables, values)
            return judge(logits_fn, rules, split_for_judge(key)[1], clean, found, label)

        keys = image_keys(key, batch.index)
        seen, images = jax.vmap(one)(
            keys, as_float(batch.image), found, batch.label, values_of(batch)
        )
        return Judgement(batch.index, batch.label, *seen), images

    program = devices.map(body, inputs=(False, False, True, True), outputs=(True, True))
    size = round_up(batch_size, devices.size)

    def judged(variables: Variables, key: Key, found: Found) -> Verdicts:
        count = len(found.batch.index)
        full = jax.tree.map(lambda leaf: _padded(leaf, size), (found.batch, found.image))
        judgement, images = devices.gather(
            program(variables, key, *devices.split(rows_of_process(full)))
        )
        judgement, images = jax.tree.map(lambda leaf: leaf[:count], (judgement, images))
        values = values_of(found.batch)
        threat = rules_of(values).threat
        keeps, distance = kept_in_float64(threat, as_float(found.batch.image), images)
        judgement = judgement._replace(allowed=keeps, distance=distance)
        return Verdicts(judgement, images, found.steps, found.queries, values)

    def judge_all(variables: Variables, key: Key, found: Iterable[Found]) -> Iterator[Verdicts]:
        for some in _regrouped(found, size):
            yield judged(variables, key, some)

    return judge_all


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


def run(
    program: Callable[..., tuple[Judgement, Array]],
    devices: Devices,
    variables: Variables,
    key: Key,
    batches: Iterable[Batch],
) -> Iterator[tuple[Judgement, np.ndarray]]:
    """Judgements and images of every batch, padding taken off, as NumPy arrays of all processes.

    Results are fetched one batch late, so the devices work while the host counts.
    """
    waiting: tuple[tuple[Judgement, Array], np.ndarray] | None = None

    def fetch(results: tuple[Judgement, Array], valid: np.ndarray) -> tuple[Judgement, np.ndarray]:
        return jax.tree.map(lambda leaf: leaf[valid], devices.gather(results))

    for batch in batches:
        results = program(variables, key, devices.split(rows_of_process(batch)))
        if waiting is not None:
            yield fetch(*waiting)
        waiting = results, np.asarray(batch.valid)
    if waiting is not None:
        yield fetch(*waiting)
