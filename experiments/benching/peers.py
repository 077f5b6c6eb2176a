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
from experiments.benching.training import CLASSES, perturbations


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
    both: list[Any] = [torch.compile(m) if compiled else m for m in (model, fixed)]
    learning, attacked = both

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
        match method:
            case "trades" | "mart":
                return _kept(clean + recipe.NEARBY * torch.randn_like(clean), low, high)
            case "n_fgsm":
                return (clean + _uniform(clean, recipe.NOISE * recipe.RADIUS)).clamp(0, 1)
            case "grad_align":
                return clean + _uniform(clean, recipe.RADIUS)
            case "afd":
                return _kept(clean + _uniform(clean, 1).sign() * recipe.RADIUS, low, high)
            case "rat":
                target = (truth + torch.randint(1, CLASSES, truth.shape, device=device)) % CLASSES
                return (clean + held[target]).clamp(0, 1)
            case _:
                return _kept(clean + _uniform(clean, recipe.RADIUS), low, high)

    held = there(perturbations(images.shape[1])) if method == "rat" else clean
    seen = lambda x: logits(attacked, x)
    summed = lambda found: functional.cross_entropy(found, truth, reduction="sum")

    def climbed(x: Tensor, many: int, size: float, wrong: Callable[[Tensor], Tensor]) -> Tensor:
        for _ in range(many):
            slope = _slope(lambda x: wrong(seen(x)), x)
            x = _kept(x + size * slope.sign(), low, high)
        return x

    def adversarial() -> Tensor:
        match method:
            case "natural":
                return clean
            case "rat":
                return start()
            case "sense":
                return _sensible(seen, start(), truth, low, high, steps)
            case "fat":
                return _friendly(seen, start(), truth, low, high, steps)
            case "n_fgsm":
                x = start()
                return (x + recipe.RADIUS * _slope(lambda x: summed(seen(x)), x).sign()).clamp(0, 1)
            case "grad_align":
                return climbed(clean, 1, recipe.RADIUS, summed)
            case "fast":
                return climbed(start(), 1, recipe.FAST_STEP, summed)
            case "trades":
                with torch.no_grad():
                    before = functional.log_softmax(seen(clean), 1)
                return climbed(start(), steps, recipe.STEP_SIZE, lambda found: _kl(found, before))
            case _:
                return climbed(start(), steps, recipe.STEP_SIZE, summed)

    def loss_on(x: Tensor) -> Tensor:
        """The mean over the batch of what the method minimises, `x` being what was found."""
        shown, targets, mean = clean, truth, functional.cross_entropy
        if method == "afd":
            shown, x, targets = _mixed(clean, x, truth)
        found = logits(learning, x)
        match method:
            case "trades":
                natural = logits(learning, clean)
                change = _kl(found, functional.log_softmax(natural, 1)) / len(truth)
                return mean(natural, truth) + recipe.BETA * change
            case "mart":
                return _weighted(found, logits(learning, clean), truth)
            case "rat":
                return (mean(logits(learning, clean), truth) + mean(found, truth)) / 2
            case "afd":
                natural = mean(logits(learning, shown), targets)
                return (1 - recipe.CONDITION) * natural + recipe.CONDITION * mean(found, targets)
            case "grad_align":
                return mean(found, truth) + recipe.ALIGN * _misaligned(look, clean, start(), summed)
            case _:
                return mean(found, truth)

    def look(x: Tensor) -> Tensor:
        """In training mode, and no running average follows."""
        buffers = {name: buffer.clone() for name, buffer in learning.named_buffers()}
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            found = torch.func.functional_call(learning, buffers, (x,))
        return found.float()

    def descend(loss: Tensor, before: Callable[[], None] = lambda: None) -> Tensor:
        """A step of the optimiser, after `before` in case it is not made where the loss was."""
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        before()
        optimiser.step()
        return loss.detach()

    weights: list[Tensor] = [weight for weight in model.parameters() if weight.ndim > 1]

    def perturbed(x: Tensor) -> Tensor:
        """AWP: the loss and its gradient are taken uphill, and the step is made from here."""
        slopes = torch.autograd.grad(functional.cross_entropy(look(x), truth), weights)
        with torch.no_grad():
            shifts = [
                recipe.GAMMA * weight.norm() / (slope.norm() + 1e-20) * slope
                for weight, slope in zip(weights, slopes, strict=True)
            ]
            torch._foreach_add_(weights, shifts)

        @torch.no_grad()
        def back() -> None:
            torch._foreach_sub_(weights, shifts)

        return descend(loss_on(x), back)

    carried = torch.zeros_like(clean)

    def replayed() -> Tensor:
        """Free-AT: one backward pass for the weights and the perturbation, again and again."""
        total = torch.zeros((), device=device)
        for _ in range(recipe.REPLAYS):
            change = carried.clone().requires_grad_()
            loss = functional.cross_entropy(logits(learning, (clean + change).clamp(0, 1)), truth)
            total += descend(loss)
            slope: Any = change.grad
            climb = carried + recipe.RADIUS * slope.sign()
            carried.copy_(climb.clamp(-recipe.RADIUS, recipe.RADIUS))
        return total / recipe.REPLAYS

    def call() -> Tensor:
        if method == "free":
            return replayed()
        x = adversarial()
        return perturbed(x) if method == "awp" else descend(loss_on(x))

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


def _uniform(like: Tensor, size: float) -> Tensor:
    return torch.empty_like(like).uniform_(-size, size)


def _weighted(attacked: Tensor, clean: Tensor, truth: Tensor) -> Tensor:
    """MART's loss, as `methods.mart` has it."""
    own = functional.one_hot(truth, attacked.shape[1]).bool()
    runner_up = functional.softmax(attacked, 1).masked_fill(own, -1.0).amax(1)
    boosted = functional.cross_entropy(attacked, truth, reduction="none")
    boosted = boosted - torch.log(1.0001 - runner_up + 1e-12)
    before = functional.log_softmax(clean, 1)
    change = before.exp() * (before - functional.log_softmax(attacked, 1))
    unsure = 1.0000001 - before.exp()[own]
    return (boosted + recipe.MART_BETA * change.sum(1) * unsure).mean()


def _mixed(clean: Tensor, x: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mixup of the clean images and the attacked ones alike, and of their labels."""
    own = functional.one_hot(truth, CLASSES).float()
    if recipe.MIX == "none":
        return clean, x, own
    share = torch.rand((), device=truth.device)  # Beta(1, 1)
    order = torch.randperm(len(truth), device=truth.device)
    one, two, soft = (share * a + (1 - share) * a[order] for a in (clean, x, own))
    return one, two, soft


def _misaligned(
    look: Callable[[Tensor], Tensor], clean: Tensor, there: Tensor,
    summed: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """1 - the cosine of the gradients at two places, the second of which learns."""
    one = _slope(lambda x: summed(look(x)), clean)
    there = there.detach().requires_grad_()
    other = torch.autograd.grad(summed(look(there)), there, create_graph=True)[0]
    return (1 - functional.cosine_similarity(one.flatten(1), other.flatten(1))).mean()


def _friendly(
    seen: Callable[[Tensor], Tensor], x: Tensor, truth: Tensor, low: Tensor, high: Tensor,
    steps: int,
) -> Tensor:  # fmt: skip
    """The images of `methods.fat`: some steps beyond the boundary and no further."""
    left = torch.full_like(truth, recipe.PATIENCE)
    done = torch.zeros_like(truth, dtype=torch.bool)
    for _ in range(steps):
        x = x.detach().requires_grad_()
        found = seen(x)
        slope = torch.autograd.grad(functional.cross_entropy(found, truth, reduction="sum"), x)[0]
        wrong = found.argmax(1) != truth
        done = done | (wrong & (left <= 0))
        noise = recipe.FRIENDLY_NOISE * torch.randn_like(x)
        further = _kept(x.detach() + recipe.STEP_SIZE * slope.sign() + noise, low, high)
        x = torch.where(done[:, None, None, None], x.detach(), further)
        left = left - wrong.long()
    return x.detach()


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
