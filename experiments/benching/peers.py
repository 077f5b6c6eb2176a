"""The training steps of `benching.training`, written a second time for PyTorch.

The same losses, passes and draws: what an attack step costs there is what it takes there. As fast
as PyTorch is known to be: channels last, the optimiser fused, attacks that compute no gradient of a
weight, nothing fetched between two steps.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.benching import recipe
from experiments.benching.clock import Side, cpus
from experiments.benching.images import device_of, waiting


def training_step(
    method: str,
    twin: nn.Module,
    images: np.ndarray,
    labels: np.ndarray,
    starts: Sequence[np.ndarray] = (),
    *,
    steps: int,
    bfloat16: bool,
    compiled: bool,
) -> Side:
    """One step of a `method` on a batch [B, H, W, C], again and again; it returns its loss.

    Attacks of the first steps begin at `starts`, one [B, H, W, C] for each, later ones where
    PyTorch draws them.
    """
    torch.set_num_threads(cpus())
    torch.manual_seed(0)
    device = device_of(torch)
    wait, memory = waiting(torch)

    def there(array: np.ndarray) -> Tensor:
        return torch.tensor(array, device=device).permute(0, 3, 1, 2)

    model = _placed(twin, device).train().requires_grad_(True)
    # The same weights a second time, frozen and in evaluation mode, for attacks: switching one
    # module back and forth would be compiled anew, or compute gradients that nobody asked for.
    fixed = copy.deepcopy(model).eval().requires_grad_(False)
    mine = itertools.chain(fixed.parameters(), fixed.buffers())
    for own, shared in zip(mine, itertools.chain(model.parameters(), model.buffers()), strict=True):
        own.data = shared.data
    optimiser = torch.optim.SGD(
        model.parameters(),
        recipe.LEARNING_RATE,
        momentum=recipe.MOMENTUM,
        weight_decay=recipe.DECAY,
        fused=True,
    )
    learning, attacked = (torch.compile(m) if compiled else m for m in (model, fixed))

    def logits(module: Any, x: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            found = module(x)
        return found.float()

    clean, truth = there(images), torch.tensor(labels, dtype=torch.int64, device=device)
    low, high = (clean - recipe.RADIUS).clamp(0, 1), (clean + recipe.RADIUS).clamp(0, 1)
    given = [there(start) for start in starts]

    def start() -> Tensor:
        if given:
            return given.pop(0)
        if method == "trades":
            return _kept(clean + recipe.NEARBY * torch.randn_like(clean), low, high)
        return _kept(
            clean + torch.empty_like(clean).uniform_(-recipe.RADIUS, recipe.RADIUS), low, high
        )

    def adversarial() -> Tensor:
        seen = lambda x: logits(attacked, x)
        wrong = lambda found: functional.cross_entropy(found, truth, reduction="sum")
        if method == "trades":
            with torch.no_grad():
                before = functional.log_softmax(seen(clean), 1)
            wrong = lambda found: _kl(found, before)
        if method == "sense":
            return _sensible(seen, start(), truth, low, high, steps)
        many, size = (1, recipe.FAST_STEP) if method == "fast" else (steps, recipe.STEP_SIZE)
        x = start()
        for _ in range(many):
            slope = _slope(lambda x: wrong(seen(x)), x)
            x = _kept(x + size * slope.sign(), low, high)
        return x

    def call() -> Tensor:
        x = clean if method == "natural" else adversarial()
        found = logits(learning, x)
        if method == "trades":
            natural = logits(learning, clean)
            change = _kl(found, functional.log_softmax(natural, 1)) / len(truth)
            loss = functional.cross_entropy(natural, truth) + recipe.BETA * change
        else:
            loss = functional.cross_entropy(found, truth)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        return loss.detach()

    return Side(call, lambda loss: [loss.cpu().numpy()], wait, memory)


def torchattacks(
    attack: str, twin: nn.Module, images: np.ndarray, labels: np.ndarray, **settings: Any
) -> Side:
    """An attack of torchattacks on images [N, H, W, C], with `settings` of `experiments.peers`."""
    from experiments import peers

    wait, memory = waiting(torch)
    model = _placed(twin, device_of(torch))

    def call() -> np.ndarray:
        return peers.run(
            "torchattacks", attack, model, images, labels, norm="linf", threads=cpus(), **settings
        )

    return Side(call, lambda found: [found], wait, memory)


def _placed(module: Any, device: str) -> nn.Module:
    """On the device, channels last, which PyTorch's own signatures do not know of a module."""
    return module.to(device, memory_format=torch.channels_last)


def _kept(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(x, low), high)


def _kl(logits: Tensor, reference: Tensor) -> Tensor:
    """The sum of KL(reference || logits), of which the first is given by its log-softmax."""
    found = functional.log_softmax(logits, 1)
    return functional.kl_div(found, reference, reduction="sum", log_target=True)


def _slope(loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(loss(x), x)[0]


def _sensible(
    seen: Callable[[Tensor], Tensor], x: Tensor, truth: Tensor, low: Tensor, high: Tensor,
    steps: int,
) -> Tensor:  # fmt: skip
    """The images of `methods.sense`: a step that crosses the threshold is taken back."""
    cut = -np.log(recipe.THRESHOLD)

    def look(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x.detach().requires_grad_()
        found = seen(x)
        losses = functional.cross_entropy(found, truth, reduction="none")
        slope = torch.autograd.grad(losses.sum(), x)[0]
        return slope, losses.detach(), found.detach()

    slope, losses, found = look(x)
    done = (found.argmax(1) != truth) | (losses > cut)
    for _ in range(steps):
        further = _kept(x + recipe.STEP_SIZE * slope.sign(), low, high)
        slope_there, losses, _ = look(further)
        done = done | (losses > cut)
        stays = done[:, None, None, None]
        x, slope = torch.where(stays, x, further), torch.where(stays, slope, slope_there)
    return x
