"""Certified radii by randomised smoothing (Cohen et al., arXiv:1902.02918): PREDICT and CERTIFY.

The smoothed classifier says what the model says most often about an image under normal noise of
standard deviation `sigma`. Where that class has a probability p > 1/2, no change shorter than
`sigma` x the normal quantile of p, in L2 and in pixel values of [0, 1], makes it say another. The
model is asked on the devices (`counting`); what its answers prove is computed from their counts, in
float64 on the host.

Reproduced from the paper and its code (locuslab/smoothing). The proof is about real numbers:
noise and model in float32 leave a gap that can be exploited on purpose (Voracek & Hein,
arXiv:2207.07209).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special  # type: ignore[import-untyped]

from rain_jax.checks import UsageError, whole, within
from rain_jax.data import as_float
from rain_jax.evaluation.verdicts import LogitsFnOf
from rain_jax.parallel import Devices, image_keys, rows_of_process
from rain_jax.types import Array, AxisName, Batch, Image, Key, Scalar, Variables

ABSTAIN = -1  # in the place of a class
# The number of a draw is int32, and the last round may overshoot.
MOST_DRAWS = 2**30


class Certificates(NamedTuple):
    """NumPy arrays [N]: what is proven about each image."""

    prediction: np.ndarray  # int32, ABSTAIN where nothing is
    radius: np.ndarray  # float64, in L2 and pixel values of [0, 1]; 0 where nothing is


Counting = Callable[[Variables, Key, Any, int, Batch], np.ndarray]


def counting(logits_fn_of: LogitsFnOf, devices: Devices, *, copies: int) -> Counting:
    """Makes `(variables, key, sigma, draws, batch) -> counts [n, K]` int32 of the valid images.

    Each image, whose batch divides over the devices, is asked about `draws` times under noise
    N(0, sigma^2) that is added to its pixels and not clipped, `copies` draws at a time; counts tell
    how often each class had the largest logit. Logits that are not finite count for none. One
    program serves every `sigma`, `draws` and `variables`.

    Draws belong to the image's place in the data set and their own number: neither batches, nor
    `copies`, nor devices matter, and other sigmas scale the same noise. A random model draws anew
    under each noise; the bounds hold for it, too, since they are about any function of the image
    to [0, 1] (Salman et al., arXiv:1906.04584).
    """
    within("copies", copies, 1)

    def body(
        variables: Variables, key: Key, sigma: Scalar, draws: Scalar, batch: Batch,
        axis_name: AxisName = None,
    ) -> Array:  # fmt: skip
        logits_fn = logits_fn_of(variables)
        images = as_float(batch.image)
        classes = jax.eval_shape(logits_fn, key, images[0]).shape[-1]

        def one(key: Key, image: Image) -> Array:
            def answer(number: Scalar) -> Array:
                noise_key, model_key = jax.random.split(jax.random.fold_in(key, number))
                noise = jax.random.normal(noise_key, image.shape, image.dtype)
                logits = logits_fn(model_key, image + sigma * noise)
                counts = (number < draws) & jnp.all(jnp.isfinite(logits))
                return jax.nn.one_hot(jnp.argmax(logits), classes, dtype=jnp.int32) * counts

            def some(round_: Scalar, counts: Array) -> Array:
                numbers = round_ * copies + jnp.arange(copies, dtype=jnp.int32)
                return counts + jnp.sum(jax.vmap(answer)(numbers), axis=0)

            rounds = (draws + copies - 1) // copies
            return jax.lax.fori_loop(0, rounds, some, jnp.zeros(classes, jnp.int32))

        return jax.vmap(one)(image_keys(key, batch.index), images)

    program = devices.map(body, inputs=(False, False, False, False, True), outputs=True)

    def count(variables: Variables, key: Key, sigma: Any, draws: int, batch: Batch) -> np.ndarray:
        within("sigma", sigma, above=0.0)
        whole("draws", draws, 1, MOST_DRAWS)
        numbers = devices.replicate((jnp.float32(sigma), jnp.int32(draws)))
        rows = devices.split(rows_of_process(batch))
        return devices.gather(program(variables, key, *numbers, rows))[np.asarray(batch.valid)]

    return count


def lower_bound(hits: Any, draws: int, alpha: float) -> np.ndarray:
    """What a probability exceeds, float64 like `hits`, as far as `hits` of `draws` can tell.

    The exact one-sided interval of Clopper and Pearson: too high a bound comes with a chance of
    at most `alpha`, in (0, 1).
    """
    within("alpha", alpha, above=0.0, below=1.0)
    whole("draws", draws, 1)
    hits = np.asarray(within("hits", hits, 0, draws), np.float64)
    some = np.maximum(hits, 1.0)
    return np.where(hits > 0, special.betaincinv(some, draws - some + 1, alpha), 0.0)


def predict(counts: np.ndarray, *, alpha: float = 0.001) -> np.ndarray:
    """The classes [N] int32 that the smoothed classifier favours, by `counts` [N, K]; PREDICT.

    Abstains unless an exact two-sided test tells the two most frequent classes apart at level
    `alpha`, in (0, 1): a wrong answer comes with a chance of at most that (Hung & Fithian,
    arXiv:1610.03944).
    """
    within("alpha", alpha, above=0.0, below=1.0)
    counts = _table("counts", counts)
    second, first = np.sort(counts, axis=1)[:, -2:].T.astype(np.float64)
    # P(X >= first) for a fair coin thrown first + second times; the other tail is as heavy.
    tail = special.betainc(np.maximum(first, 1.0), second + 1, 0.5)
    chance = np.where(first > 0, np.minimum(2 * tail, 1.0), 1.0)
    return np.where(chance > alpha, ABSTAIN, np.argmax(counts, axis=1)).astype(np.int32)


def certify(
    selection: np.ndarray, estimation: np.ndarray, *, draws: int, sigma: float, alpha: float = 0.001
) -> Certificates:
    """Classes, and radii within which the smoothed classifier names no other one; CERTIFY.

    The class is the most frequent one of `selection` [N, K], its probability bounded by
    `estimation` [N, K], the counts of `draws` other draws: on the same ones the bound would not
    hold. It abstains where the bound is below 1/2. With a chance of at most `alpha` for each image,
    what it says is wrong.
    """
    within("sigma", sigma, above=0.0)
    selection, estimation = _table("selection", selection), _table("estimation", estimation)
    if selection.shape != estimation.shape:
        raise UsageError(f"selection {selection.shape}, estimation {estimation.shape}: not alike")
    guess = np.argmax(selection, axis=1)
    bound = lower_bound(np.take_along_axis(estimation, guess[:, None], axis=1)[:, 0], draws, alpha)
    proven = bound >= 0.5
    radius = np.where(proven, sigma * special.ndtri(np.where(proven, bound, 0.5)), 0.0)
    return Certificates(np.where(proven, guess, ABSTAIN).astype(np.int32), radius)


def largest_radius(draws: int, *, sigma: float, alpha: float = 0.001) -> float:
    """What `certify` says where all of the `draws` agree; 0 where they are too few to tell."""
    return sigma * max(float(special.ndtri(lower_bound(draws, draws, alpha))), 0.0)


def certified(certificates: Certificates, label: Any, radius: float = 0.0) -> np.ndarray:
    """Images [N] bool with a proof of their own `label` [N] up to `radius`; none by abstaining."""
    return (certificates.prediction == np.asarray(label)) & (certificates.radius >= radius)


def certified_accuracy(certificates: Certificates, label: Any, radii: Any) -> np.ndarray:
    """The share [R] float64 of images that are `certified` at each of `radii` [R]."""
    return np.array([np.mean(certified(certificates, label, radius)) for radius in radii])


def average_certified_radius(certificates: Certificates, label: Any) -> float:
    """ACR (Zhai et al., arXiv:2001.02378): the mean radius, 0 for images that are not certified.

    A few easy images with large radii can make it large (Sun et al., arXiv:2410.06895): read it
    beside `certified_accuracy`.
    """
    return float(np.mean(np.where(certified(certificates, label), certificates.radius, 0.0)))


def _table(where: str, counts: Any) -> np.ndarray:
    counts = np.asarray(counts)
    if counts.ndim != 2 or counts.shape[1] < 2 or not np.issubdtype(counts.dtype, np.integer):
        raise UsageError(
            f"{where} {counts.dtype} {list(counts.shape)}: expected whole numbers [N, K], K >= 2"
        )
    return counts
