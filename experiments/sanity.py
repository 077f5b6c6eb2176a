"""Mistakes that make robustness look larger than it is: refused before, or flagged behind a number.

After Carlini et al. (arXiv:1902.06705), Athalye et al. (arXiv:1802.00420), Pintor et al.
(arXiv:2106.09947) and AutoAttack's own warnings. What is certainly a mistake is a `UsageError`;
what only looks like one is a check that did not pass, and the number is printed with a mark.

A check fails where chance alone, on so many images, would bring about what was seen in one case of
a hundred at most (fixed models, image by image), or beyond two standard errors (`proof.above`).
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import build, measure
from experiments.defended import RUN, UNDEFENDED, logits_fn_of
from experiments.proof import LEFT, SILENT, Check, Slopes, above, slopes
from rain_jax import attacks, data, evaluation, norms
from rain_jax.checks import UsageError
from rain_jax.evaluation import EvaluationRun
from rain_jax.gradients import eot, exact
from rain_jax.losses import margin
from rain_jax.parallel import choose_devices
from rain_jax.types import Array, Network, PyTree, Threat

# Images that are looked at, and the attack on them: steps of a tenth of the radius. Of a random
# model they are fewer, since each step takes several draws.
_LOOKED_AT, _LOOKED_AT_RANDOM, _STEPS, _DRAWS = 128, 64, 40, 5
# Changes of the logits with the key, relative to the largest: more than the order of sums makes.
_DRAWN = 1e-3
# Changes of most images' logits with their batch, relative to how logits spread. Rounding in
# bfloat16, or one that tips over in a quantised model, moves less, or fewer of them.
_BATCHED = 0.05
# How far from 1 probabilities may add up to in low precision.
_SUM = 0.01
# The share of images that black boxes may break and no gradient did (AutoAttack's figure); that a
# short attack may break and the whole evaluation did not; that may come back as they were.
_BLIND, _SHORT, _UNCHANGED = 0.002, 0.02, 0.05
# The chance of a false alarm by which the images at hand may be too few.
_ALARM = 0.01
# Forms of a model whose gradients are not those of the deployed one.
_OTHERS = UNDEFENDED, "gray"


class Probe(NamedTuple):
    """A short attack on the first few images, at several radii, and their gradients."""

    slopes: Slopes
    radii: tuple[float, ...]  # the threat's, twice that, and one at which nothing should stand
    share: list[np.ndarray]  # at each, the share of the draws [n] that are right about each image


def refuse(network: Network, variables: PyTree, images: Any) -> None:
    """Raises a `UsageError` where the model, or how it is asked, is certainly not what was meant.

    `images` are a few, float32 [N, H, W, C] in [0, 1]; of a single one it cannot be told whether
    others in its batch matter to it.
    """
    # Whether it uses keys is the question, so it gets some.
    of = logits_fn_of(network._replace(random=True))
    # One key for all: a model that draws once for a whole batch (as RAIN's authors do) has the same
    # law for each image whatever its neighbours, and only its draw is another.
    draws = jax.random.split(jax.random.key(0))
    keys, others = (jnp.broadcast_to(key, len(images)) for key in draws)
    one = jax.jit(lambda v, keys, x: jax.vmap(of(v))(keys, x))
    all_ = jax.jit(lambda v, keys, x: network.apply(v, x, train=False, keys=keys)[0])
    alone, again = (np.asarray(one(variables, some, images)) for some in (keys, others))
    together = np.asarray(all_(variables, keys, images))
    if not np.all(np.isfinite(alone)):
        raise UsageError("the model's logits of clean test images are not finite numbers")
    if not network.random and _apart(alone, again).max() > _DRAWN * np.max(np.abs(alone)):
        raise UsageError(
            "the model draws at random and does not say so: its logits change with the key; "
            "expected random=True in its Network or Defence"
        )
    apart = float(np.median(_apart(alone, together)))
    if apart > _BATCHED * np.std(alone):
        raise UsageError(
            f"an image's logits change by {apart:.3g} with the other images of its batch: "
            "expected a model in evaluation mode"
        )
    if np.all(alone >= 0) and np.all(np.abs(np.sum(alone, axis=1) - 1) < _SUM):
        raise UsageError(
            "the model's outputs are probabilities, in [0, 1] and of sum 1: expected logits; "
            "attacks on probabilities stall where a model is confident"
        )


def _apart(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """How far the logits [N, K] of each image [N] are from each other."""
    return np.max(np.abs(one - other), axis=1)


def refuse_mistakes(experiment: build.Experiment, variables: PyTree) -> None:
    """Asks the deployed model about a few test images, and refuses what `refuse` does."""
    source, room = _looked_at(experiment)
    refuse(experiment.network, _placed(variables), _few(source, room))


def _placed(variables: PyTree) -> PyTree:
    """On the one device that looks."""
    return jax.device_put(jax.tree.map(np.asarray, variables))


def _few(source: data.Source, room: int) -> np.ndarray:
    """The first images, as many as are looked at at once, or two."""
    few = data.first(source, max(2, room))
    (batch,) = data.evaluation_batches(few, few.size)
    return np.asarray(data.as_float(batch.image))


def _looked_at(experiment: build.Experiment) -> tuple[data.Source, int]:
    """The images that are looked at, and how many of them at once.

    One device does it, and is shown as many as its share of a batch has.
    """
    settings = experiment.evaluation
    most = _LOOKED_AT_RANDOM if experiment.network.random else _LOOKED_AT
    source = data.first(experiment.splits.test, min(most, settings.images or most))
    return source, max(1, settings.batch_size // len(choose_devices(experiment.parallel.devices)))


def look(experiment: build.Experiment, variables: PyTree) -> Probe:
    """Attacks a few test images, briefly. Refuses what `refuse` does."""
    settings, network, threat = experiment.evaluation, experiment.network, experiment.threat
    source, room = _looked_at(experiment)
    variables = _placed(variables)
    refuse(network, variables, _few(source, room))
    draws = _DRAWS if network.random else 1
    batches = list(data.evaluation_batches(source, min(source.size, max(1, room // draws))))

    estimator = eot(draws) if network.random else exact()
    radii = _radii(threat, source.shape)
    of = logits_fn_of(network)
    # An attack and its judge must not share their draws.
    attack_key, judge_key = jax.random.split(measure.key_of(experiment.seed, "sanity"))

    @jax.jit
    def sloping(variables: PyTree, batch: Any) -> Slopes:
        return slopes(estimator, of(variables), attack_key, batch)

    @jax.jit
    def standing(variables: PyTree, radius: Any, batch: Any) -> Array:
        # The radius is data here: one program serves them all.
        on = threat._replace(radius=radius)
        attack = attacks.pgd(
            on, steps=_STEPS, step_size=radius / 10, loss=margin, estimator=estimator
        )
        rules = evaluation.Rules(on, settings.draws or 1, settings.eight_bit)

        def one(index: Array, image: Array, label: Array) -> Array:
            mine, judges = (jax.random.fold_in(key, index) for key in (attack_key, judge_key))
            found = attack(mine, of(variables), image, label)
            seen, _ = evaluation.judge(of(variables), rules, judges, image, found, label)
            judgement = evaluation.Judgement(index, label, *seen)
            return jnp.where(judgement.allowed, judgement.share, 1.0)

        return jax.vmap(one)(batch.index, data.as_float(batch.image), batch.label)

    def over(program: Any, *arguments: Any) -> Any:
        """The program's results on the images of all batches."""
        parts = [
            jax.tree.map(lambda leaf, b=batch: np.asarray(leaf)[b.valid],
                         program(variables, *arguments, batch))
            for batch in batches
        ]  # fmt: skip
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)

    share = [over(standing, jnp.float32(radius)) for radius in radii]
    return Probe(over(sloping), radii, share)


def _radii(threat: Threat, shape: tuple[int, ...]) -> tuple[float, ...]:
    """The threat's own, twice that, and the one within which every image can be made grey."""
    radius, far = float(threat.radius), far_radius(threat, shape)
    nearer = tuple(dict.fromkeys(r for r in (radius, 2 * radius) if r < far))
    return (*nearer, far) if nearer else (radius,)


def far_radius(threat: Threat, shape: tuple[int, ...]) -> float:
    """The distance within which every image of that shape can be made grey."""
    return (threat.high - threat.low) / 2 * math.prod(shape) ** (1 / threat.norm.order)


def flags(experiment: build.Experiment, measured: EvaluationRun, probe: Probe) -> list[Check]:
    """What must be so before a number is believed, and whether it is."""
    found = _of_the_model(probe) + _of_the_rules(experiment)
    # Where nothing may be changed, no attack can be too weak.
    return found + (_of_the_attacks(experiment, measured, probe) if probe.radii[0] > 0 else [])


def _of_the_model(probe: Probe) -> list[Check]:
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


def _of_the_rules(experiment: build.Experiment) -> list[Check]:
    """Whether the threat and the draws are what they should be."""
    threat, pixels = experiment.threat, math.prod(experiment.splits.test.shape)
    # By how much saving an image moves it: at most in L-inf, on average in L2.
    rounding = {"linf": 1 / 510, "l2": math.sqrt(pixels / 12) / 255}
    found = []
    if (norm := norms.name_of(threat.norm)) in rounding:
        found.append(Check(
            "the radius is more than rounding to 8 bits",
            float(threat.radius) == 0 or float(threat.radius) > rounding[norm],
            f"{float(threat.radius):.3g} in {norm}, rounding moves images by {rounding[norm]:.3g}",
        ))  # fmt: skip
    far = far_radius(threat, experiment.splits.test.shape)
    found.append(Check(
        "no image is as good as any other",
        float(threat.radius) < far,
        f"within {far:.4g} every image can be made grey, the radius is {float(threat.radius):.4g}: "
        "of pixels in [0, 255]?",
    ))  # fmt: skip
    if experiment.network.random:
        draws = experiment.evaluation.draws or 1
        found.append(Check("a random model is judged by several draws", draws > 1, f"by {draws}"))
        white = [title for title in experiment.looks if _kind(experiment, title) == "white"]
        if white:
            most = max(_draws(experiment, title) for title in white)
            found.append(
                Check("a random model is attacked over several draws", most > 1, f"over {most:.0f}")
            )
    return found


def _of_the_attacks(
    experiment: build.Experiment, measured: EvaluationRun, probe: Probe
) -> list[Check]:
    """Whether the attacks of the evaluation did what attacks like them can do."""
    clean, random = measured.columns["clean"].judgement, experiment.network.random
    images = len(clean.index)
    counted = [t for t in measured.columns if t != "clean" and t not in measured.checks]
    judged = {title: measured.columns[title].judgement for title in counted}
    alone = evaluation.shares if random else evaluation.worst_case
    stands = {title: alone(clean, [judgement]) for title, judgement in judged.items()}
    left = {title: float(np.mean(share)) for title, share in stands.items()}
    white = [title for title in counted if _kind(experiment, title) == "white"]
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
    if forms := {*experiment.assembly.forms} - {*_OTHERS}:
        words = [(experiment.looks[title].through or "").split("+") for title in white]
        climbed = forms.intersection(itertools.chain(*words))
        found.append(Check(
            "some attack goes through a surrogate of the defence",
            bool(climbed),
            f"through {', '.join(sorted(climbed))}" if climbed else
            f"none through {', '.join(sorted(forms))}: configs/ladder.py climbs them all",
        ))  # fmt: skip
    found += _of_lengths(experiment, measured, {title: left[title] for title in white})
    if counted:
        whole = [share for title, share in measured.robust.items() if title not in measured.checks]
        found += _of_others(measured, probe, whole[-1], random, float(experiment.threat.radius))
    return found


def _of_lengths(
    experiment: build.Experiment, measured: EvaluationRun, left: Mapping[str, float]
) -> list[Check]:
    """Attacks beside those of fewer steps, where each is given all images.

    Those of the same settings are compared, and one step with any that takes more.
    """
    images, specs = len(measured.columns["clean"].judgement.index), experiment.evaluation.attacks

    def steps(title: str) -> int:
        return getattr(experiment.looks[title].attack, "steps", 0)

    def kin(title: str) -> dict[str, Any]:
        spec = specs.get(title, {"name": title})
        return {key: spec[key] for key in spec if key not in ("steps", "step_size")}

    found = []
    for few in [] if measured.cascade else left:
        longer = [
            many for many in left
            if steps(many) > steps(few) > 0 and (steps(few) == 1 or kin(few) == kin(many))
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
        near = ~evaluation.standing(judgement) & (judgement.distance <= radius)
        fallen = int(np.sum(robust[judgement.index[near]] > 0))
        found.append(Check(
            f"{title} finds little that this evaluation did not",
            not _surely_more(fallen, len(robust), _SHORT),
            f"it alone breaks {fallen:,} of {len(robust):,} images",
        ))  # fmt: skip
    return found


def _surely_more(hits: int, images: int, share: float) -> bool:
    """Whether so many `hits` would be rare, were the chance of each `share` at most."""
    return bool(evaluation.smoothing.lower_bound(hits, images, _ALARM) > share)


def _kind(experiment: build.Experiment, title: str) -> str:
    """Whether an attack sees the deployed model's gradients ("white"), or less."""
    look = experiment.looks[title]
    # One that declares nothing is taken to see everything.
    if getattr(look.attack, "uses", "gradient") != "gradient":
        return "black"
    through = look.through or ""
    other = through.startswith(RUN) or any(word in _OTHERS for word in through.split("+"))
    return "transfer" if other else "white"


def _draws(experiment: build.Experiment, title: str) -> float:
    """Over how many draws an attack takes its gradients; enough where its form has none."""
    look = experiment.looks[title]
    if look.through in experiment.assembly.fixed:
        return math.inf
    return getattr(look.attack, "draws", 1)
