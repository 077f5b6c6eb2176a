"""Other libraries' attacks on the weights that ours are measured on, behind one call.

`twin` makes the PyTorch module that is the same function as one of our networks, `run` attacks it
with torchattacks, the Adversarial Robustness Toolbox ("art"), foolbox or adversarial-library
("adv_lib"), and `OFFERS` lists who has what. What a library does in its own way is said where it is
called, and left as it is. The extra `peers` installs what the four need; they themselves go in with
`pip install --no-deps`, since two of them ask for torchvision and one for an old `requests`.
"""

import importlib
import importlib.util
import math
import random
import re
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from rain_jax.checks import UsageError, one_of
from rain_jax.types import Variables

Activation = Callable[[], nn.Module]
Found = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # images, labels -> adversarial

_ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU, "softplus": nn.Softplus}


def twin(network: Mapping[str, Any], variables: Variables) -> nn.Module:
    """The PyTorch twin of a network of ours: images [B, C, H, W] in [0, 1] to logits [B, K].

    `network` is the config's section, "cnn" or one of `_BLOCKS`; `variables` are the parameters and
    running averages. The twin normalises inside, is in evaluation mode, and its weights are frozen,
    so that no attack spends time on their gradients.
    """
    name = one_of("network.name", network["name"], ("cnn", *_BLOCKS))
    for option, known in ("dtype", "float32"), ("stem", "cifar"):
        if network.get(option, known) != known:
            raise UsageError(f"network.{option}={network[option]!r}: expected {known} for a twin")
    weights = _Weights(variables["params"], variables.get("batch_stats", {}))
    activation = _ACTIVATIONS[network.get("activation", "relu")]
    layers = _cnn(weights, activation) if name == "cnn" else _resnet(weights, activation, name)
    whole = _Whole(network.get("mean", 0.0), network.get("std", 1.0), layers)
    return whole.eval().requires_grad_(False)


class _Whole(nn.Module):
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: Any, std: Any, layers: list[nn.Module]):
        super().__init__()
        for name, value in ("mean", mean), ("std", std):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32).reshape(-1, 1, 1))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers((images - self.mean) / self.std)


class _Weights(NamedTuple):
    """Part of our variables, from which layers are made by name."""

    params: Mapping[str, Any]
    stats: Mapping[str, Any]

    def inside(self, name: str) -> "_Weights":
        return _Weights(self.params[name], self.stats.get(name, {}))

    def layer(self, name: str, stride: int = 1) -> nn.Module:
        """The batch normalisation, dense layer or convolution that these arrays belong to."""
        params, stats = self.inside(name)
        tensors = {k: torch.tensor(np.asarray(v)) for k, v in {**params, **stats}.items()}
        made: nn.Module
        if "scale" in tensors:
            made = nn.BatchNorm2d(len(tensors["scale"]), eps=1e-5)
            named = {"weight": "scale", "running_mean": "mean", "running_var": "var"}
            tensors |= {theirs: tensors.pop(ours) for theirs, ours in named.items()}
        else:
            kernel = tensors.pop("kernel")
            if kernel.ndim == 2:
                made = nn.Linear(*kernel.shape)
                tensors["weight"] = kernel.T
            else:
                # Ours name the pixels around: as many on all sides, one for 3x3 and for 4x4.
                size, _, ins, outs = kernel.shape
                around = (size - 1) // 2
                made = nn.Conv2d(ins, outs, size, stride, around, bias="bias" in tensors)
                tensors["weight"] = kernel.permute(3, 2, 0, 1)
        made.load_state_dict({**made.state_dict(), **tensors})
        return made


class _Flatten(nn.Module):
    """[B, C, H, W] to [B, H W C], channels last, as our dense layers expect them."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return maps.permute(0, 2, 3, 1).flatten(1)


def _cnn(weights: _Weights, activation: Activation) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for place in range(1, 1 + sum(name.startswith("conv") for name in weights.params)):
        layers.append(weights.layer(f"conv{place}", stride=2))
        if f"norm{place}" in weights.params:
            layers.append(weights.layer(f"norm{place}"))
        layers.append(activation())
    return [
        *layers,
        _Flatten(),
        weights.layer("dense1"),
        activation(),
        weights.layer("classifier"),
    ]


class _Block(nn.Module):
    """Two 3x3 convolutions, around which `_Basic` and `_Preact` differ, and the shortcut."""

    def __init__(self, weights: _Weights, stride: int, activation: Activation):
        super().__init__()
        self.activation = activation()
        self.conv1, self.norm1 = weights.layer("conv1", stride), weights.layer("norm1")
        self.conv2, self.norm2 = weights.layer("conv2"), weights.layer("norm2")
        layers = [weights.layer("shortcut", stride)] if "shortcut" in weights.params else []
        layers += [weights.layer("shortcut_norm")] if "shortcut_norm" in weights.params else []
        self.shortcut = nn.Sequential(*layers)


class _Basic(_Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.conv2(self.activation(self.norm1(self.conv1(x)))))
        return self.activation(self.shortcut(x) + y)


class _Preact(_Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ready = self.activation(self.norm1(x))
        y = self.conv2(self.activation(self.norm2(self.conv1(ready))))
        return (self.shortcut(ready) if len(self.shortcut) else x) + y


_BLOCKS = {"preact_resnet": _Preact, "preact_resnet18": _Preact, "resnet18": _Basic}


def _resnet(weights: _Weights, activation: Activation, name: str) -> list[nn.Module]:
    def normalised(which: str) -> list[nn.Module]:
        return [weights.layer(which), activation()] if which in weights.params else []

    layers = [weights.layer("stem"), *normalised("stem_norm")]
    places = [re.fullmatch(r"group(\d+)_block(\d+)", key) for key in weights.params]
    for group, place in sorted((int(p[1]), int(p[2])) for p in places if p):
        stride = 2 if group > 1 and place == 1 else 1
        block = weights.inside(f"group{group}_block{place}")
        layers.append(_BLOCKS[name](block, stride, activation))
    average = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return [*layers, *normalised("last_norm"), *average, weights.layer("classifier")]


SHIFTS = ((-1, 0), (1, 0), (0, -1), (0, 1))
"""The moves (rows, columns) of `Shifted`, each as likely as the others."""


class Shifted(nn.Module):
    """A random model: each image is rolled by one of `SHIFTS`, drawn anew for every forward pass.

    Images [B, C, H, W]. The draws come from PyTorch's global generator, which `run` seeds.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        drawn = torch.randint(len(SHIFTS), (len(images), 1, 1, 1), device=images.device)
        # All moves under a mask: gathering would cost more in the backward pass.
        rolled = [torch.roll(images, shift, dims=(2, 3)) for shift in SHIFTS]
        return self.model(sum(moved * (drawn == place) for place, moved in enumerate(rolled)))


_ALL = ("linf", "l2", "l1")
_TWO = ("linf", "l2")
OFFERS: dict[str, dict[str, tuple[str, ...]]] = {
    "torchattacks": dict(
        apgd_ce=_TWO, apgd_t=_TWO, eot_pgd=("linf",), fab_t=_TWO, pgd=_TWO, square=_TWO,
        standard=_TWO,
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

    So `standard` puts the same four together again. All but the PGDs leave images alone that are
    wrong already, and draw the same numbers for every batch. fab_t is done with an image at the
    first target that breaks it within the radius, near or not; apgd_t with L2 gives a whole batch
    the step size of its first image.
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
