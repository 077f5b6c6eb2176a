"""Whether an evaluation's attacks worked: mistakes that make robustness look larger than it is.

After Carlini et al. (arXiv:1902.06705), Athalye et al. (arXiv:1802.00420), Pintor et al.
(arXiv:2106.09947) and AutoAttack's own warnings. What is certainly a mistake is a `UsageError`;
what only looks like one is a check that did not pass, and the number is printed with a mark.

A check fails where chance alone, on so many images, would bring about what was seen in one case of
a hundred at most (fixed models, image by image), or beyond two standard errors (`above`).
"""

import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from rain_jax import norms
from rain_jax.evaluation import smoothing
from rain_jax.evaluation.columns import AttackColumn, EvaluationRun
from rain_jax.evaluation.counts import shares, standing, worst_case
from rain_jax.evaluation.engine import Evaluation
from rain_jax.evaluation.probe import STEPS, Probe, far_radius

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
            f"PGD-{STEPS} leaves {told}",
        ),
        Check(
            "next to nothing stands far away",
            not _surely_more(round(left[-1] * images), images, LEFT),
            f"PGD-{STEPS} leaves {100 * left[-1]:.1f} % at {probe.radii[-1]:.3g}",
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
    share, name = probe.share[0], f"PGD-{STEPS}"
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
