"""PyTorch twins compute what our networks do, and other libraries' attacks keep to the threat."""

import importlib.util
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from rain_jax import models, norms
from rain_jax.checks import UsageError
from rain_jax.types import Threat

torch = pytest.importorskip("torch", reason="PyTorch is not installed: see the extra `peers`")

from experiments import peers, twins  # noqa: E402

CLASSES = 5
PIXELS = dict(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
NETWORKS: dict[str, dict[str, Any]] = {
    "cnn": dict(name="cnn", widths=(4, 6), hidden=10, mean=0.3, std=0.2),
    "cnn of three": dict(name="cnn", widths=(3, 4, 5), hidden=7, activation="gelu", **PIXELS),
    "cnn, batch norm": dict(name="cnn", widths=(4, 6), hidden=10, batch_norm=True, **PIXELS),
    "preact_resnet": dict(name="preact_resnet", depths=(1, 2), width=4, **PIXELS),
    "resnet18": dict(name="resnet18", activation="silu"),
}
SIZE = 15  # odd, where strided convolutions disagree about padding first
# A few steps of everything, and two batches of unlike size.
BUDGET: dict[str, Any] = dict(
    steps=8, targets=3, queries=15, draws=2, batch_size=3, threads=1, seed=3
)
RADIUS = {"linf": 0.2, "l2": 1.5, "l1": 20.0}
OFFERED = [
    (peer, attack, norm)
    for peer, attacks in peers.OFFERS.items()
    for attack, known in attacks.items()
    for norm in known
]


def sample(count: int = 4) -> jax.Array:
    return jax.random.uniform(jax.random.key(1), (count, SIZE, SIZE, 3))


@cache
def pair(which: str) -> tuple[Callable[[jax.Array], jax.Array], Any]:
    """One of our networks as a function of images, and its twin."""
    options = {key: value for key, value in NETWORKS[which].items() if key != "name"}
    network = getattr(models, NETWORKS[which]["name"])(CLASSES, **options)
    leaves, tree = jax.tree.flatten(network.init(jax.random.key(0), sample()))
    keys = jax.random.split(jax.random.key(2), len(leaves))
    # Fresh biases and averages are 0, fresh variances and scales 1: a twin might leave them out.
    factors = [1 + 0.5 * jax.random.uniform(k, v.shape) for k, v in zip(keys, leaves, strict=True)]
    moved = [v * f + 0.1 * (f - 1) for v, f in zip(leaves, factors, strict=True)]
    variables = jax.tree.unflatten(tree, moved)
    return (
        lambda images: network.apply(variables, images)[0],
        twins.twin(NETWORKS[which], variables),
    )


def logits_of(twin: Any, images: Any) -> np.ndarray:
    with torch.no_grad():
        return twin(torch.tensor(np.moveaxis(np.asarray(images), -1, 1))).numpy()


def attacked(peer: str, attack: str, **settings: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Four images that a twin knows, what became of them, and which of those it still knows."""
    if importlib.util.find_spec(peer) is None:
        pytest.skip(f"{peer} is not installed: see the extra `peers`")
    _, twin = pair("cnn")
    images = np.asarray(sample())
    labels = logits_of(twin, images).argmax(-1).astype(np.int32)
    model = twins.Shifted(twin) if attack == "eot_pgd" else twin
    found = peers.run(peer, attack, model, images, labels, **{**BUDGET, **settings})
    return images, found, logits_of(twin, found).argmax(-1) == labels


@pytest.mark.parametrize("which", NETWORKS)
def test_a_twin_is_the_same_function(which: str) -> None:
    ours, twin = pair(which)
    expected = np.asarray(ours(sample()))
    assert np.ptp(expected, axis=0).min() > 1e-2  # else a twin blind to its image would pass
    np.testing.assert_allclose(logits_of(twin, sample()), expected, atol=1e-4, rtol=1e-4)
    assert not twin.training
    assert not any(weight.requires_grad for weight in twin.parameters())


def test_what_has_no_twin_is_refused() -> None:
    with pytest.raises(UsageError, match=r"network\.name='madry_cnn': expected one of cnn"):
        twins.twin(dict(name="madry_cnn"), {})
    with pytest.raises(UsageError, match=r"network\.stem='imagenet': expected cifar"):
        twins.twin(dict(name="resnet18", stem="imagenet"), {})
    with pytest.raises(UsageError, match=r"network\.dtype='bfloat16': expected float32"):
        twins.twin(dict(name="cnn", dtype="bfloat16"), {})


@pytest.mark.parametrize(("peer", "attack", "norm"), OFFERED)
def test_attacks_break_images_within_the_threat(peer: str, attack: str, norm: str) -> None:
    radius = RADIUS[norm]
    # Some of them walk a pixel at a time.
    steps = 40 if attack in ("pgd", "eot_pgd") else BUDGET["steps"]
    images, found, known = attacked(peer, attack, norm=norm, radius=radius, steps=steps)
    assert found.shape == images.shape
    assert found.dtype == np.float32
    threat = Threat(getattr(norms, norm), radius)
    assert jax.vmap(lambda image, other: norms.allowed(threat, image, other))(images, found).all()
    assert not known.all()


@pytest.mark.parametrize(
    ("peer", "attack"),
    [("torchattacks", "apgd_ce"), ("art", "pgd"), ("foolbox", "pgd"), ("adv_lib", "apgd_ce")],
)
def test_the_seed_decides(peer: str, attack: str) -> None:
    once, again, other = (
        attacked(peer, attack, norm="l2", radius=1.5, steps=2, seed=seed)[1] for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(once, again)
    assert np.any(once != other)


@pytest.mark.parametrize(
    ("peer", "attack"), [("foolbox", "deepfool"), ("adv_lib", "fmn"), ("torchattacks", "fab_t")]
)
def test_minimum_norms_beyond_the_radius_are_failures(peer: str, attack: str) -> None:
    images, found, known = attacked(peer, attack, norm="linf", radius=math.inf)
    sizes = np.abs(found - images).max(axis=(1, 2, 3))
    assert not known.all()
    # Between the nearest that was found and the farthest: one stays and the other does not.
    radius = float(np.mean([sizes[~known].min(), sizes[~known].max()]))
    images, within, _ = attacked(peer, attack, norm="linf", radius=radius)
    far = sizes > radius
    assert far.any()
    np.testing.assert_array_equal(within[far], images[far])
    np.testing.assert_array_equal(within[~far], found[~far])


def test_wrong_names_are_met_with_the_right_ones() -> None:
    _, twin = pair("cnn")
    images, labels = np.asarray(sample()), np.zeros(4, np.int32)
    for peer, attack, norm, message in (
        ("fool_box", "pgd", "linf", "peer='fool_box': .*did you mean 'foolbox'?"),
        ("art", "fab", "linf", "attack='fab': expected one of apgd_ce, pgd, square"),
        ("foolbox", "ddn", "linf", "norm='linf': expected one of l2"),
    ):
        with pytest.raises(UsageError, match=message):
            peers.run(peer, attack, twin, images, labels, norm=norm, radius=0.1)


def test_shifted_rolls_each_image_anew() -> None:
    images = torch.tensor(np.moveaxis(np.asarray(sample(12)), -1, 1))
    torch.manual_seed(0)
    first, second = (twins.Shifted(torch.nn.Identity())(images) for _ in range(2))
    rolled = torch.stack([torch.roll(images, shift, dims=(2, 3)) for shift in twins.SHIFTS])
    moves = [
        (rolled == shifted).flatten(2).all(dim=2).float().argmax(dim=0)
        for shifted in (first, second)
    ]
    for shifted, move in zip((first, second), moves, strict=True):
        torch.testing.assert_close(shifted, rolled[move, torch.arange(12)], atol=0, rtol=0)
    assert set(moves[0].tolist()) == {0, 1, 2, 3}
    assert (moves[0] != moves[1]).any()
