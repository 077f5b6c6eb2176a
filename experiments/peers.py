"""Other libraries' attacks on the weights that ours are measured on, behind one call.

`run` attacks the PyTorch twin of one of our networks (see `twins`) with torchattacks, the
Adversarial Robustness Toolbox ("art"), foolbox or adversarial-library ("adv_lib"), and `OFFERS`
lists who has what. What a library does in its own way is said where it is called, and left as it
is. The extra `peers` installs what the four need; they themselves go in with `pip install
--no-deps`, since two of them ask for torchvision and one for an old `requests`.
"""

import importlib
import importlib.util
import math
import random
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from rain_jax.checks import one_of

Found = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # images, labels -> adversarial

_ALL = ("linf", "l2", "l1")
_TWO = ("linf", "l2")
OFFERS: dict[str, dict[str, tuple[str, ...]]] = {
    "torchattacks": dict(
        apgd_ce=_TWO, apgd_t=_TWO, eot_pgd=("linf",), fab_t=_TWO, pgd=_TWO, square=_TWO,
        autoattack=_TWO, standard=_TWO,
    ),
    "art": dict(apgd_ce=_ALL, pgd=_TWO, square=_TWO),
    "foolbox": dict(carlini_wagner=("l2",), ddn=("l2",), deepfool=_TWO, fmn=_ALL, pgd=_ALL),
    "adv_lib": dict(
        apgd_ce=_ALL, apgd_t=_ALL, ddn=("l2",), deepfool=_TWO, fab=_ALL, fab_t=_ALL, fmn=_ALL,
        pgd=("linf",),
    ),
}  # fmt: skip
"""Which attacks each library has, and for which norms."""

MINIMUM_NORM = ("carlini_wagner", "ddn", "deepfool", "fab", "fab_t", "fmn")
"""Attacks that look for the nearest adversarial image, however far it is."""


class _Task(NamedTuple):
    """What an attack is set: arguments of `run`, and what some libraries want told."""

    model: nn.Module
    norm: str
    radius: float
    seed: int
    batch_size: int
    shape: tuple[int, ...]  # of an image, [C, H, W]
    classes: int
    steps: int
    step_size: float
    targets: int
    queries: int
    draws: int

    @property
    def order(self) -> float:
        return {"linf": math.inf, "l2": 2, "l1": 1}[self.norm]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def run(
    peer: str,
    attack: str,
    model: nn.Module,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    norm: str,
    radius: float,
    seed: int = 0,
    batch_size: int = 100,
    threads: int | None = None,
    steps: int = 100,
    step_size: float | None = None,
    targets: int = 9,
    queries: int = 5000,
    draws: int = 20,
) -> np.ndarray:
    """Adversarial images [N, H, W, C] float32 by one library's attack, see `OFFERS`.

    `images` are [N, H, W, C] in [0, 1], `labels` [N] whole numbers. `step_size` is that of the two
    PGDs, by default a tenth of the radius; `targets` are the classes that apgd_t and fab_t try, no
    more than are wrong; `queries` are Square's and `draws` those of each step of eot_pgd. An attack
    takes what it knows of these.

    Where a minimum-norm attack went further than `radius` the clean image comes back, and with
    `radius=math.inf` all that it found. Otherwise images come as they are: whether they are in the
    threat, and whether they succeed, is for a judge to say. Seeds the global generators of PyTorch,
    NumPy and Python, from which the libraries draw.
    """
    one_of("peer", peer, OFFERS)
    one_of("attack", attack, OFFERS[peer])
    one_of("norm", norm, OFFERS[peer][attack])
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the global state is what ART draws from
    random.seed(seed)

    device = next(model.parameters()).device
    # Contiguous: torchattacks takes views that other layouts do not have.
    clean = torch.tensor(np.ascontiguousarray(np.moveaxis(images, -1, 1)), dtype=torch.float32)
    clean = clean.to(device)
    truth = torch.tensor(labels, dtype=torch.int64, device=device)
    with torch.no_grad():
        classes = model(clean[:1]).shape[1]
    task = _Task(
        model,
        norm,
        float(radius),
        seed,
        batch_size,
        tuple(clean.shape[1:]),
        classes,
        steps,
        radius / 10 if step_size is None else step_size,
        min(targets, classes - 1),
        queries,
        draws,
    )
    attacked = _LIBRARIES[peer](attack, task)
    parts = []
    for batch, right in zip(clean.split(batch_size), truth.split(batch_size), strict=True):
        found = attacked(batch.clone(), right.clone()).detach().to(device, torch.float32)
        if attack in MINIMUM_NORM:
            size = (found - batch).flatten(1).norm(task.order, dim=1)
            found = torch.where((size <= radius + 1e-6)[:, None, None, None], found, batch)
        parts.append(found)
    return np.moveaxis(torch.cat(parts).cpu().numpy(), 1, -1)


def _torchattacks(attack: str, task: _Task) -> Found:
    """Its `AutoAttack` takes 10 steps where the published one takes 100, and has no option for it.

    So `standard` puts the same four together again, and `autoattack` is theirs as it is, with 5,000
    queries. All but the PGDs leave images alone that are wrong already, and draw the same numbers
    for every batch. fab_t is done with an image at the first target that breaks it within the
    radius, near or not; apgd_t with L2 gives a whole batch the step size of its first image.
    """
    library = importlib.import_module("torchattacks")
    seeded = dict(eps=task.radius, norm=task.norm.capitalize(), seed=task.seed)  # Linf, L2
    steps = dict(steps=task.steps, **seeded)
    walk = dict(eps=task.radius, steps=task.steps, alpha=task.step_size)
    match attack:
        case "pgd":
            return {"linf": library.PGD, "l2": library.PGDL2}[task.norm](task.model, **walk)
        case "eot_pgd":
            return library.EOTPGD(task.model, eot_iter=task.draws, **walk)
        case "apgd_ce":
            return library.APGD(task.model, **steps)
        case "apgd_t":
            return library.APGDT(task.model, n_classes=task.targets + 1, **steps)
        case "fab_t":
            targets = task.targets + 1
            return library.FAB(task.model, multi_targeted=True, n_classes=targets, **steps)
        case "autoattack":
            return library.AutoAttack(task.model, n_classes=task.targets + 1, **seeded)
        case "square":
            return library.Square(task.model, n_queries=task.queries, **seeded)
        case _:
            four = ("apgd_ce", "apgd_t", "fab_t", "square")
            return library.MultiAttack([_torchattacks(part, task) for part in four])


def _art(attack: str, task: _Task) -> Found:
    """Its APGD returns where it ends, not the best it saw, and counts gains over the best loss.

    Square's `queries` are proposals, each of which costs it three forward passes. PGD is not
    offered with L1, where it pushes one pixel against its bound for ever.
    """
    evasion = importlib.import_module("art.attacks.evasion")
    classifier = importlib.import_module("art.estimators.classification").PyTorchClassifier(
        task.model,
        loss=nn.CrossEntropyLoss(),
        input_shape=task.shape,
        nb_classes=task.classes,
        clip_values=(0.0, 1.0),
        device_type="gpu" if task.device.type == "cuda" else "cpu",
    )
    settings: dict[str, Any] = dict(eps=task.radius, norm=task.order, batch_size=task.batch_size)
    match attack:
        case "pgd":
            maker = evasion.ProjectedGradientDescentPyTorch
            settings |= dict(max_iter=task.steps, eps_step=task.step_size, num_random_init=1)
        case "apgd_ce":
            maker = evasion.AutoProjectedGradientDescent
            # The published first step; its default does not follow the radius.
            settings |= dict(max_iter=task.steps, eps_step=2 * task.radius, nb_random_init=1)
            settings |= dict(loss_type="cross_entropy")
        case _:
            maker = evasion.SquareAttack
            settings |= dict(max_iter=task.queries)
    made = maker(classifier, verbose=False, **settings)
    return lambda images, labels: torch.from_numpy(
        made.generate(images.cpu().numpy(), labels.cpu().numpy())
    )


def _foolbox(attack: str, task: _Task) -> Found:
    """Its fmn does not project with L2, so what it finds there is far off."""
    library = importlib.import_module("foolbox")
    norm = task.norm.capitalize()
    name = {
        "pgd": f"{norm}ProjectedGradientDescentAttack",
        "deepfool": f"{norm}DeepFoolAttack",
        "ddn": "DDNAttack",
        "fmn": f"{norm.replace('Linf', 'LInf')}FMNAttack",
        "carlini_wagner": "L2CarliniWagnerAttack",
    }[attack]
    more = dict(abs_stepsize=task.step_size) if attack == "pgd" else {}
    made = getattr(library.attacks, name)(steps=task.steps, **more)
    model = library.PyTorchModel(task.model, bounds=(0, 1), device=task.device)
    radius = None if attack in MINIMUM_NORM else task.radius  # `run` looks at the distances
    return lambda images, labels: made(model, images, labels, epsilons=radius)[0]


def _adv_lib(attack: str, task: _Task) -> Found:
    """Its pgd never looks at where its last step leads, and apgd_t climbs another loss.

    That is the target's lead over the best other class, where the published one has the true class.
    """
    # It imports these two for a perceptual distance and for plots, which are not called here.
    absent = [name for name in ("torchvision", "visdom") if not importlib.util.find_spec(name)]
    for module in absent:
        sys.modules[module] = types.ModuleType(module)
        sys.modules[module].__dict__["models"] = None
    try:
        library = importlib.import_module("adv_lib.attacks")
    finally:
        for module in absent:
            del sys.modules[module]

    def made(name: str, **settings: Any) -> Found:
        maker = getattr(library, name)
        return lambda images, labels: maker(task.model, images, labels, **settings)

    norm, steps, step_size = task.order, task.steps, task.step_size
    apgd = dict(eps=task.radius, norm=norm, n_iter=steps)
    match attack:
        case "pgd":
            return made("pgd_linf", ε=task.radius, steps=steps, absolute_step_size=step_size)
        case "apgd_ce":
            return made("apgd", loss_function="ce", **apgd)
        case "apgd_t":
            return made("apgd_targeted", num_targets=task.targets, **apgd)
        case "fab":
            return made("fab", norm=norm, n_iter=steps)
        case "fab_t":
            targets = task.targets
            return made("fab", norm=norm, n_iter=steps, restarts=targets, targeted_restarts=True)
        case "ddn":
            return made("ddn", steps=steps, levels=None)  # by default it rounds to 8 bits
        case _:
            return made({"fmn": "fmn", "deepfool": "df"}[attack], norm=norm, steps=steps)


_LIBRARIES: dict[str, Callable[[str, _Task], Found]] = {
    "torchattacks": _torchattacks,
    "art": _art,
    "foolbox": _foolbox,
    "adv_lib": _adv_lib,
}
