"""Whether an evaluation's attacks worked: mistakes that make robustness look larger than it is.

After Carlini et al. (arXiv:1902.06705), Athalye et al. (arXiv:1802.00420), Pintor et al.
(arXiv:2106.09947) and AutoAttack's own warnings. What is certainly a mistake is a `UsageError`;
what only looks like one is a check that did not pass, and the number is printed with a mark.

A check fails where chance alone, on so many images, would bring about what was seen in one case of
a hundred at most (fixed models, image by image), or beyond two standard errors (`above`).
"""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rain_jax import data, norms
from rain_jax.attacks import pgd
from rain_jax.checks import UsageError
from rain_jax.evaluation import smoothing
from rain_jax.evaluation.columns import AttackColumn, EvaluationRun
from rain_jax.evaluation.counts import shares, standing, worst_case
from rain_jax.evaluation.engine import Evaluation, logits_fn_of
from rain_jax.evaluation.verdicts import Judgement, LogitsFnOf, Rules, judge
from rain_jax.gradients import eot, exact
from rain_jax.losses import margin
from rain_jax.parallel import image_keys
from rain_jax.remembered import remembered
from rain_jax.types import Array, Batch, Estimator, Key, LogitsFn, Model, PyTree, Threat

# Images that are looked at, and the attack on them: steps of a tenth of the radius. Of a random
# model they are fewer, since each step takes several draws.
_LOOKED_AT, _LOOKED_AT_RANDOM, _STEPS, _DRAWS = 128, 64, 40, 5
# Changes of the logits with the key, relative to the largest: more than the order of sums makes.
_DRAWN = 1e-3
# How far from 1 probabilities may add up to in low precision.
_SUM = 0.01
# Accuracy that may be left at the far radius, and images that may have no gradient.
LEFT, SILENT = 0.02, 0.01
# The share of images that black boxes may break and no gradient did (AutoAttack's figure); that a
# short attack may break and the whole evaluation did not; that may come back as they were.
_BLIND, _SHORT, _UNCHANGED = 0.002, 0.02, 0.05
# The chance of a false alarm by which the images at hand may be too few.
_ALARM = 0.01
# Standard errors by which a comparison may be off.
SLACK = 2.0


class Check(NamedTuple):
    """A thing that is so where the attacks work, and whether it is."""

    name: str
    passed: bool
    told: str

    def flag(self) -> str:
        """The line about one that did not pass."""
        return f"FLAG, does not hold: {self.name} ({self.told})"


class Slopes(NamedTuple):
    """Of each image [N]: the gradient's length, and the cosine of two of independent draws."""

    length: Any
    cosine: Any


class Probe(NamedTuple):
    """A short attack on the first few images, at several radii, and their gradients."""

    slopes: Slopes
    radii: tuple[float, ...]  # the threat's, twice that, and one at which nothing should stand
    share: list[np.ndarray]  # at each, the share of the draws [n] that are right about each image


def refuse(model: Model, keys: Key, images: Any) -> np.ndarray:
    """Raises a `UsageError` where the model, or how it is asked, is certainly not what was meant.

    `images` are a few, float32 [N, H, W, C] in [0, 1], asked about with `keys` [2, N]. Returns the
    logits [N, K] by the first ones.
    """
    one = _answers(model.logits)
    alone, again = (np.asarray(one(model.variables, some, images)) for some in keys)
    if not np.all(np.isfinite(alone)):
        raise UsageError("the model's logits of clean test images are not finite numbers")
    apart = np.max(np.abs(alone - again), axis=1)
    if not model.random and apart.max() > _DRAWN * np.max(np.abs(alone)):
        raise UsageError(
            "the model draws at random and does not say so: its logits change with the key; "
            "expected random=True in its Network or Defence"
        )
    if np.all(alone >= 0) and np.all(np.abs(np.sum(alone, axis=1) - 1) < _SUM):
        raise UsageError(
            "the model's outputs are probabilities, in [0, 1] and of sum 1: expected logits; "
            "attacks on probabilities stall where a model is confident"
        )
    return alone


@remembered
def _answers(logits: Callable[..., Any]) -> Callable[..., Any]:
    """A program of the logits [N, K] of images, each by itself."""
    return jax.jit(jax.vmap(logits, (None, 0, 0)))


def looked_at(evaluation: Evaluation) -> tuple[data.Source, int]:
    """The images that are looked at, and how many of them at once.

    One device does it, and is shown as many as its share of a batch has.
    """
    most = _LOOKED_AT_RANDOM if evaluation.model.random else _LOOKED_AT
    source = data.first(evaluation.source, most)
    return source, max(1, evaluation.batch_size // evaluation.devices.size)


def few_of(evaluation: Evaluation) -> np.ndarray:
    """The first images, as many as are looked at at once, or two."""
    source, room = looked_at(evaluation)
    few = data.first(source, max(2, room))
    (batch,) = data.evaluation_batches(few, few.size)
    return np.asarray(data.as_float(batch.image))


def look(evaluation: Evaluation) -> Probe:
    """Attacks the first few images of an evaluation, briefly."""
    model = evaluation.model
    source, room = looked_at(evaluation)
    variables = jax.device_put(jax.tree.map(np.asarray, model.variables))
    draws = _DRAWS if model.random else 1
    batches = list(data.evaluation_batches(source, min(source.size, max(1, room // draws))))
    radii = _radii(evaluation.threat, source.shape)
    # An attack and its judge must not share their draws.
    keys = jax.random.split(evaluation.key_of("sanity"))
    sloping, surviving = _programs(
        logits_fn_of(model), eot(draws) if model.random else exact(), _STEPS,
        Rules(evaluation.threat, evaluation.draws, evaluation.eight_bit),
    )  # fmt: skip

    def over(program: Any, *arguments: Any) -> Any:
        """The program's results on the images of all batches."""
        parts = [
            jax.tree.map(lambda leaf, b=batch: np.asarray(leaf)[b.valid],
                         program(variables, keys, *arguments, batch))
            for batch in batches
        ]  # fmt: skip
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)

    share = [over(surviving, jnp.float32(radius)) for radius in radii]
    return Probe(over(sloping), radii, share)


@remembered
def _programs(
    of: LogitsFnOf, estimator: Estimator, steps: int, rules: Rules
) -> tuple[Callable[..., Slopes], Callable[..., Array]]:
    """Programs of a batch: its gradients, and which images stay correct within any radius."""

    @jax.jit
    def sloping(variables: PyTree, keys: Key, batch: Batch) -> Slopes:
        return slopes(estimator, of(variables), keys[0], batch)

    @jax.jit
    def surviving(variables: PyTree, keys: Key, radius: Any, batch: Batch) -> Array:
        # The radius is data here: one program serves them all.
        on = rules.threat._replace(radius=radius)
        attack = pgd(on, steps=steps, step_size=radius / 10, loss=margin, estimator=estimator)

        def one(index: Array, image: Array, label: Array) -> Array:
            mine, judges = (jax.random.fold_in(key, index) for key in keys)
            found = attack(mine, of(variables), image, label)
            within = rules._replace(threat=on)
            seen, _ = judge(of(variables), within, judges, image, found, label)
            judgement = Judgement(index, label, *seen)
            return jnp.where(judgement.allowed, judgement.share, 1.0)

        return jax.vmap(one)(batch.index, data.as_float(batch.image), batch.label)

    return sloping, surviving


def slopes(estimator: Estimator, logits_fn: LogitsFn, key: Key, batch: Batch) -> Slopes:
    """The margin's gradient as attacks see it, twice; for one batch, inside a program."""

    def one(key: Key, image: Array, label: Array) -> tuple[Array, Array]:
        estimate = estimator(lambda k, x: (margin(logits_fn(k, x), label), None))
        first, second = (estimate(k, image)[1].ravel() for k in jax.random.split(key))
        product = jnp.linalg.norm(first) * jnp.linalg.norm(second)
        cosine = jnp.dot(first, second) / jnp.where(product > 0, product, 1.0)
        return jnp.linalg.norm(first), cosine

    image = data.as_float(batch.image)
    return Slopes(*jax.vmap(one)(image_keys(key, batch.index), image, batch.label))


def _radii(threat: Threat, shape: tuple[int, ...]) -> tuple[float, ...]:
    """The threat's own, twice that, and the one within which every image can be made grey."""
    radius, far = float(threat.radius), far_radius(threat, shape)
    nearer = tuple(dict.fromkeys(r for r in (radius, 2 * radius) if r < far))
    return (*nearer, far) if nearer else (radius,)


def far_radius(threat: Threat, shape: tuple[int, ...]) -> float:
    """The distance within which every image of that shape can be made grey."""
    return (threat.high - threat.low) / 2 * math.prod(shape) ** (1 / threat.norm.order)


def checks(evaluation: Evaluation, measured: EvaluationRun, probe: Probe) -> list[Check]:
    """What must be so before a number is believed, and whether it is."""
    found = of_the_model(probe) + of_the_rules(evaluation)
    # Where nothing may be changed, no attack can be too weak.
    return found + (_of_the_attacks(evaluation, measured, probe) if probe.radii[0] > 0 else [])


def of_the_model(probe: Probe) -> list[Check]:
    """Whether a plain attack on the deployed model works as attacks do."""
    length = probe.slopes.length
    images = len(length)
    broken, silent = int(np.sum(~np.isfinite(length))), int(np.sum(length == 0))
    # Some draws of a random model are right by luck, wherever the image is: the majority counts.
    left = [float(np.mean(share > 0.5)) for share in probe.share]
    told = ", ".join(f"{100 * a:.1f} % at {r:.3g}" for a, r in zip(left, probe.radii, strict=True))
    return [
        Check("gradients are finite", not broken, f"{broken} of {images} images without"),
        Check(
            "images have gradients",
            not _surely_more(silent, images, SILENT),
            f"{silent} of {images} images without",
        ),
        Check(
            "a larger radius does not weaken the attack",
            not any(above(wide, near, images) for near, wide in itertools.pairwise(left)),
            f"PGD-{_STEPS} leaves {told}",
        ),
        Check(
            "next to nothing stands far away",
            not _surely_more(round(left[-1] * images), images, LEFT),
            f"PGD-{_STEPS} leaves {100 * left[-1]:.1f} % at {probe.radii[-1]:.3g}",
        ),
    ]


def of_the_rules(evaluation: Evaluation) -> list[Check]:
    """Whether the threat and the draws are what they should be."""
    threat, shape = evaluation.threat, evaluation.source.shape
    # By how much saving an image moves it: at most in L-inf, on average in L2.
    rounding = {"linf": 1 / 510, "l2": math.sqrt(math.prod(shape) / 12) / 255}
    found = []
    if (norm := norms.name_of(threat.norm)) in rounding:
        found.append(Check(
            "the radius is more than rounding to 8 bits",
            float(threat.radius) == 0 or float(threat.radius) > rounding[norm],
            f"{float(threat.radius):.3g} in {norm}, rounding moves images by {rounding[norm]:.3g}",
        ))  # fmt: skip
    far = far_radius(threat, shape)
    found.append(Check(
        "no image is as good as any other",
        float(threat.radius) < far,
        f"within {far:.4g} every image can be made grey, the radius is {float(threat.radius):.4g}: "
        "of pixels in [0, 255]?",
    ))  # fmt: skip
    if evaluation.model.random:
        draws = evaluation.draws
        found.append(Check("a random model is judged by several draws", draws > 1, f"by {draws}"))
        white = [column for column in evaluation.columns.values() if kind_of(column) == "white"]
        if white:
            most = max(map(_draws_of, white))
            found.append(
                Check("a random model is attacked over several draws", most > 1, f"over {most:.0f}")
            )
    return found


def _of_the_attacks(evaluation: Evaluation, measured: EvaluationRun, probe: Probe) -> list[Check]:
    """Whether the attacks of the evaluation did what attacks like them can do."""
    clean, random = measured.columns["clean"].judgement, evaluation.model.random
    images = len(clean.index)
    counted = [t for t in measured.columns if t != "clean" and t not in measured.checks]
    judged = {title: measured.columns[title].judgement for title in counted}
    alone = shares if random else worst_case
    stands = {title: alone(clean, [judgement]) for title, judgement in judged.items()}
    left = {title: float(np.mean(share)) for title, share in stands.items()}
    white = [title for title in counted if kind_of(evaluation.columns[title]) == "white"]
    found: list[Check] = []

    if white:
        strongest = min(white, key=left.__getitem__)
        seeing = np.min([stands[title] for title in white], axis=0)
        for title in [title for title in counted if title not in white]:
            extra = int(np.sum(seeing.astype(bool) & (stands[title] == 0)))
            # Draws break images for one attack and spare them for another, by chance.
            found.append(Check(
                f"{title} finds little that gradients did not",
                not above(left[strongest], left[title], images) if random
                else not _surely_more(extra, images, _BLIND),
                f"{100 * left[title]:.1f} % stand, {100 * left[strongest]:.1f} % after {strongest}"
                if random else f"it alone breaks {extra:,} of {images:,}",
            ))  # fmt: skip
        if not measured.cascade:
            rise = float(np.mean(judged[strongest].margin - clean.margin))
            found.append(Check("the margin rises", rise > 0, f"by {rise:.3g}, by {strongest}"))
    for title in counted:
        if outside := int(np.sum(~judged[title].allowed)):
            found.append(Check(f"{title} keeps to the threat", False, f"{outside:,} images do not"))
    for title in white:
        still = int(np.sum((judged[title].distance == 0) & judged[title].right))
        given = len(judged[title].index)
        if given:
            found.append(Check(
                f"{title} changes images",
                not _surely_more(still, given, _UNCHANGED),
                f"{still:,} of {given:,} come back as they were",
            ))  # fmt: skip
    if forms := {*evaluation.surrogates}:
        through = (evaluation.columns[title].through for title in white)
        climbed = forms.intersection(itertools.chain(*through))
        found.append(Check(
            "some attack goes through a surrogate of the defence",
            bool(climbed),
            f"through {', '.join(sorted(climbed))}" if climbed else
            f"none through {', '.join(sorted(forms))}: configs/ladder.py climbs them all",
        ))  # fmt: skip
    found += _of_lengths(evaluation, measured, {title: left[title] for title in white})
    if counted:
        whole = [share for title, share in measured.robust.items() if title not in measured.checks]
        found += _of_others(measured, probe, whole[-1], random, float(evaluation.threat.radius))
    return found


def _of_lengths(
    evaluation: Evaluation, measured: EvaluationRun, left: Mapping[str, float]
) -> list[Check]:
    """Attacks beside those of fewer steps, where each is given all images.

    Those of the same settings are compared, and one step with any that takes more.
    """
    images = len(measured.columns["clean"].judgement.index)

    def steps(title: str) -> int:
        return getattr(evaluation.columns[title].attack, "steps", 0)

    def alike(one: str, other: str) -> bool:
        kind = evaluation.columns[one].kind
        return kind is not None and kind == evaluation.columns[other].kind

    found = []
    for few in [] if measured.cascade else left:
        longer = [
            many for many in left
            if steps(many) > steps(few) > 0 and (steps(few) == 1 or alike(few, many))
        ]  # fmt: skip
        if longer:
            best = min(longer, key=left.__getitem__)
            found.append(Check(
                f"more steps than {few} takes do not weaken the attack",
                not above(left[best], left[few], images),
                f"{few} leaves {100 * left[few]:.1f} %, {best} {100 * left[best]:.1f} %",
            ))  # fmt: skip
    return found


def _of_others(
    measured: EvaluationRun,
    probe: Probe,
    robust: np.ndarray,
    random: bool,
    radius: float,
) -> list[Check]:
    """Whether a short attack, or one without a radius, misclassifies what is `robust` [N]."""
    share, name = probe.share[0], f"PGD-{_STEPS}"
    images = len(share)
    fallen = int(np.sum((robust[:images] > 0) & (share == 0)))
    first, other = float(np.mean(robust[:images])), float(np.mean(share))
    found = [Check(
        f"{name} finds little that this evaluation did not",
        not above(first, other, images) if random else not _surely_more(fallen, images, _SHORT),
        f"of the first {images} images {100 * first:.1f} % stand, {100 * other:.1f} % after "
        f"{name} on the margin",
    )]  # fmt: skip
    for title, column in measured.distances.items() if not random else ():
        judgement = column.judgement
        near = ~standing(judgement) & (judgement.distance <= radius)
        fallen = int(np.sum(robust[judgement.index[near]] > 0))
        found.append(Check(
            f"{title} finds little that this evaluation did not",
            not _surely_more(fallen, len(robust), _SHORT),
            f"it alone breaks {fallen:,} of {len(robust):,} images",
        ))  # fmt: skip
    return found


def _surely_more(hits: int, images: int, share: float) -> bool:
    """Whether so many `hits` would be rare, were the chance of each `share` at most."""
    return bool(smoothing.lower_bound(hits, images, _ALARM) > share)


def above(one: float, other: float, images: int) -> bool:
    """Whether one accuracy lies above another by more than so many images leave to chance."""
    variance = (one * (1 - one) + other * (1 - other)) / images
    return one - other > SLACK * float(np.sqrt(variance)) + 1 / images


def kind_of(column: AttackColumn) -> str:
    """Whether an attack sees the deployed model's gradients ("white"), or less."""
    # One that declares nothing is taken to see everything.
    if getattr(column.attack, "uses", "gradient") != "gradient":
        return "black"
    return "transfer" if column.transfer else "white"


def _draws_of(column: AttackColumn) -> float:
    """Over how many draws an attack takes its gradients; enough where its form has none."""
    return math.inf if column.fixed else getattr(column.attack, "draws", 1)
