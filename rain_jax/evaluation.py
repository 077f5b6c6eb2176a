"""The judge: clean and robust accuracy, counted over all images.

An attack returns an image; whether it succeeded is decided here, with keys of the judge's own, on
an image that is checked against the threat. Verdicts are per image and do not depend on the batch
size or on the number of devices, so the worst case over attacks is one `and`.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rain_jax.checks import UsageError, within
from rain_jax.data import as_float
from rain_jax.norms import allowed
from rain_jax.parallel import Devices, image_keys
from rain_jax.types import (
    Array,
    Attack,
    AxisName,
    Batch,
    Image,
    Key,
    LogitsFn,
    Scalar,
    Target,
    Threat,
    Variables,
)


class Judgement(NamedTuple):
    """What the judge saw of each image; arrays [N], in the order of the data set.

    Those of JAX inside a program, of NumPy outside.
    """

    index: Any  # place in the data set
    label: Any
    right: Any  # bool: the mean over the draws favours the label
    margin: Any  # float32, mean over the draws; positive = misclassified
    prediction: Any  # int32, the class of the largest mean logit
    allowed: Any  # bool: the image keeps to the threat; one that does not counts as unbroken
    distance: Any  # in the threat's norm, from the clean image


def judge(
    logits_fn: LogitsFn,
    threat: Threat,
    key: Key,
    clean: Image,
    candidate: Image,
    label: Target,
    *,
    draws: int = 1,
) -> tuple[Scalar, Scalar, Scalar, Scalar, Scalar]:
    """(right, margin, prediction, allowed, distance) of one `candidate` for the image `clean`.

    Random models are judged by their mean logits over `draws` fresh keys. Logits that are not
    numbers are wrong, whatever they favour.
    """
    keys = jax.random.split(key, draws)
    logits = jnp.mean(jax.vmap(lambda k: logits_fn(k, candidate))(keys), axis=0)
    wrong = jnp.where(jnp.arange(logits.shape[-1]) == label, -jnp.inf, logits)
    margin = jnp.max(wrong) - logits[label]
    # Ties are misclassified: a constant classifier must not look right for one of the classes.
    right = jnp.all(jnp.isfinite(logits)) & (margin < 0)
    prediction = jnp.argmax(logits).astype(jnp.int32)
    return (
        right, margin, prediction, allowed(threat, clean, candidate),
        threat.norm.measure(candidate - clean),
    )  # fmt: skip


LogitsFnOf = Callable[[Variables], LogitsFn]


class Evaluator(NamedTuple):
    """Programs that attack and judge batches on all devices; made once, run on any batch."""

    clean: Callable[..., tuple[Judgement, Array]]
    attacks: dict[str, Callable[..., tuple[Judgement, Array]]]
    devices: Devices


def evaluator(
    logits_fn_of: LogitsFnOf,
    threat: Threat,
    attacks: dict[str, Attack],
    devices: Devices,
    *,
    draws: int = 1,
) -> Evaluator:
    """Compiles lazily, one program for each attack: `(variables, key, batch) -> judgement, images`.

    `logits_fn_of(variables)` is the model; variables are data, so that one program serves every
    checkpoint.
    """
    within("draws", draws, 1)

    def program(attack: Attack | None) -> Callable[..., tuple[Judgement, Array]]:
        def body(
            variables: Variables, key: Key, batch: Batch, axis_name: AxisName = None
        ) -> tuple[Judgement, Array]:
            logits_fn = logits_fn_of(variables)

            def one(key: Key, image: Image, label: Target) -> tuple[tuple[Scalar, ...], Image]:
                # The judge draws its own keys: scored on the draws that it was tuned on, an
                # attack against a random model looks stronger than it is.
                attack_key, judge_key = jax.random.split(key)
                found = image if attack is None else attack(attack_key, logits_fn, image, label)
                return judge(logits_fn, threat, judge_key, image, found, label, draws=draws), found

            keys = image_keys(key, batch.index)
            seen, images = jax.vmap(one)(keys, as_float(batch.image), batch.label)
            return Judgement(batch.index, batch.label, *seen), images

        return devices.map(body, inputs=(False, False, True), outputs=(True, True))

    programs = {name: program(attack) for name, attack in attacks.items()}
    return Evaluator(program(None), programs, devices)


def rows_of_process(batch: Batch) -> Batch:
    """This process's share of a global batch [B, ...] of NumPy arrays."""
    count, place = jax.process_count(), jax.process_index()
    share = len(batch.index) // count
    return jax.tree.map(lambda leaf: leaf[place * share : (place + 1) * share], batch)


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


def join(judgements: Iterable[Judgement]) -> Judgement:
    """Judgements of several batches as one."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *judgements)


def standing(judgement: Judgement) -> np.ndarray:
    """Images [N] bool that the classifier still gets right, or that broke the rules to be wrong."""
    return np.asarray(judgement.right | ~judgement.allowed)


def worst_case(clean: Judgement, attacked: Iterable[Judgement]) -> np.ndarray:
    """Images [N] bool that are right as they are and stand after every attack."""
    stands = np.asarray(clean.right).copy()
    for judgement in attacked:
        if not np.array_equal(judgement.index, clean.index):
            raise UsageError("judgements of different images cannot be combined")
        stands &= standing(judgement)
    return stands


class Proportion(NamedTuple):
    """`hits` of `total`, with Wilson's 95 % interval for the sampling of the images."""

    hits: int
    total: int

    @property
    def value(self) -> float:
        """The fraction; not a number when nothing was counted."""
        return self.hits / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """(low, high) of Wilson's score interval at 95 %."""
        n, z = self.total, 1.959964
        if not n:
            return math.nan, math.nan
        centre = (self.value + z * z / (2 * n)) / (1 + z * z / n)
        spread = math.sqrt(self.value * (1 - self.value) / n + z * z / (4 * n * n))
        half = z * spread / (1 + z * z / n)
        return max(0.0, centre - half), min(1.0, centre + half)


def proportion(flags: np.ndarray) -> Proportion:
    """How many of the flags [N] are set."""
    return Proportion(int(np.sum(flags)), int(np.size(flags)))
