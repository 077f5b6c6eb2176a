"""Training steps: beside PyTorch's, and several in one dispatch."""

import importlib
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benching import recipe
from experiments.benching.clock import Program, Row, Side
from experiments.benching.images import cores, laid, pictures
from rain_jax import attacks, methods, models, norms, optimisers, training
from rain_jax.checks import UsageError, one_of, within
from rain_jax.config.schema import call, registered
from rain_jax.losses import kl
from rain_jax.methods.awp import awp
from rain_jax.methods.fast import SECOND_LOOK
from rain_jax.methods.free import free
from rain_jax.methods.rat import perturbed, with_perturbations
from rain_jax.parallel import image_keys
from rain_jax.types import (
    Array,
    AxisName,
    Batch,
    Key,
    Method,
    Metrics,
    Network,
    Objective,
    Threat,
    Variables,
)

Which = Literal[
    "natural", "pgd", "trades", "mart", "sense", "fat", "fast", "n_fgsm", "grad_align", "free",
    "awp", "rat", "afd",
]  # fmt: skip
Dtype = Literal["float32", "bfloat16"]
CLASSES = 10
THREAT = Threat(norms.linf, recipe.RADIUS)


def steps(
    *,
    networks: tuple[str, ...] = ("small_cnn", "resnet18"),
    batch_sizes: tuple[int, ...] = (64, 8),
    methods: tuple[tuple[Which, ...], ...] = (
        ("natural", "pgd", "trades", "sense", "fast"),
        ("natural", "pgd"),
    ),
    size: int = 32,
    attack_steps: int = 10,
    dtype: Dtype = "float32",
    compiled: bool = True,
) -> list[Row]:
    """One training step of each of the `methods` of each network: passes, attack, optimiser.

    On one batch of images of `size` pixels a side, over and over; SGD with momentum and decay.
    "pgd" and "fast" are `adversarial` with PGD and with FGSM from a uniform start, "awp" is "pgd"
    with its weights perturbed, "free" one batch and its replays, "rat" is its step and not the
    making of perturbations, and "afd" has no modulation, of which there is no twin; in all attacks
    batch normalisation uses its running averages. Both sides' first attacks begin at the same
    images, and the losses there are compared, but for AFD's, which are of mixtures. In bfloat16
    PyTorch has its autocast. `compiled` has torch.compile as a peer too.
    """
    rows = []
    for workload, names in matched("methods", networks, batch_sizes, methods, size, dtype):
        for name in names:
            peer = partial(_torch, workload, name, attack_steps)
            peers = {"PyTorch": partial(peer, False)}
            if compiled:
                peers["torch.compile"] = partial(peer, True)
            rows.append(
                Row(
                    f"step, {said(name, attack_steps)}, {workload}",
                    partial(workload.program, name, attack_steps),
                    peers,
                    alike=name != "afd",
                    images=workload.batch_size,
                    dtype=dtype,
                )
            )
    return rows


def dispatch(
    *,
    model: str = "small_cnn",
    batch_size: int = 16,
    methods: tuple[Which, ...] = ("natural", "pgd"),
    count: int = 8,
    size: int = 32,
    attack_steps: int = 10,
    dtype: Dtype = "float32",
) -> list[Row]:
    """`count` training steps in one program, beside as many dispatches of one."""
    within("count", count, 2)
    workload = Workload(known(model, "model"), batch_size, size, dtype)
    rows = []
    for name in methods:
        several = partial(workload.program, name, attack_steps, count)
        rows.append(
            Row(
                f"{count} steps, {said(name, attack_steps)}, {workload}",
                several,
                {"one by one": partial(_one_by_one, workload, name, attack_steps, count)},
                images=count * batch_size,
                dtype=dtype,
            )
        )
    return rows


class Workload(NamedTuple):
    """A network, by its name, and the batch that it learns from."""

    network: str
    batch_size: int
    size: int
    dtype: str
    stem: str | None = None

    def __str__(self) -> str:
        return f"{self.network}, {self.batch_size} x {self.size}x{self.size}"

    @property
    def made(self) -> Network:
        maker = registered("network", models, self.network)
        spec = {"dtype": self.dtype} | ({"stem": self.stem} if self.stem else {})
        return call("network", maker, spec, classes=CLASSES)

    @property
    def variables(self) -> Variables:
        return self.made.init(jax.random.key(0), jnp.zeros((1, self.size, self.size, 3)))

    @property
    def batch(self) -> Batch:
        labels = np.random.default_rng(0).integers(0, CLASSES, self.batch_size, np.int32)
        return Batch(
            jnp.asarray(pictures(self.batch_size, self.size)), jnp.asarray(labels),
            jnp.arange(self.batch_size, dtype=jnp.int32), jnp.ones(self.batch_size, bool),
        )  # fmt: skip

    def method(self, name: str, attack_steps: int) -> Method:
        optimiser = optimisers.sgd(
            optax.constant_schedule(recipe.LEARNING_RATE),
            momentum=recipe.MOMENTUM,
            weight_decay=recipe.DECAY,
        )
        loss = objective(name, self.made, attack_steps)
        if name == "free":
            shape = (self.batch_size, self.size, self.size, 3)
            return free(loss, THREAT, optimiser, batch_shape=shape, replays=recipe.REPLAYS)
        return training.minimise(loss, optimiser)

    def program(self, name: str, attack_steps: int, count: int = 1) -> Program:
        """So many steps; its results are the sums of metrics of each.

        On a CPU each core is a device, as with `--config.parallel.devices`, and takes its share.
        """
        method = self.method(name, attack_steps)

        def several(
            state: training.TrainState, key: Key, batch: Batch, axis_name: AxisName = None
        ) -> tuple[Any, Metrics]:
            if count == 1:
                return method.step(key, state, batch, axis_name)
            return jax.lax.scan(
                lambda state, _: method.step(key, state, batch, axis_name), state, length=count
            )

        variables = self.variables
        if name == "rat":
            variables = with_perturbations(variables, jnp.asarray(perturbations(self.size)))
        state = jax.jit(method.init)(variables)
        return shared(several, (state, jax.random.key(1), self.batch), (False, False, True))


def shared(function: Any, arguments: tuple[Any, ...], split: tuple[bool, ...]) -> Program:
    """A step of a state and a batch, which is `split`, over the cores of a CPU."""
    (batch,) = (argument for argument, rows in zip(arguments, split, strict=True) if rows)
    devices = cores(len(batch.index))
    if devices.size == 1:
        return Program(function, arguments, True, mean_loss)
    mapped: Any = devices.map(function, inputs=split, outputs=(False, False))
    return Program(mapped.__wrapped__, laid(arguments, split, devices), True, mean_loss)


def objective(name: str, network: Network, attack_steps: int) -> Objective:
    """What a method of this suite minimises."""
    climb: Any = partial(
        attacks.pgd, THREAT, steps=attack_steps, step_size=recipe.STEP_SIZE, keep="last"
    )
    match one_of("methods", name, get_args(Which)):
        case "natural" | "free":
            return methods.natural(network)
        case "pgd":
            return methods.adversarial(network, climb())
        case "awp":
            return awp(methods.adversarial(network, climb()), gamma=recipe.GAMMA)
        case "trades":
            return methods.trades(network, climb(loss=kl, start="normal"), beta=recipe.BETA)
        case "mart":
            return methods.mart(network, climb(start="normal"), beta=recipe.MART_BETA)
        case "sense":
            return methods.sense(
                network, THREAT, threshold=recipe.THRESHOLD, steps=attack_steps,
                step_size=recipe.STEP_SIZE, warmup=0.0,
            )  # fmt: skip
        case "fat":
            return methods.fat(
                network, THREAT, steps=attack_steps, step_size=recipe.STEP_SIZE,
                noise=recipe.FRIENDLY_NOISE, patience=(recipe.PATIENCE,), milestones=(),
            )  # fmt: skip
        case "n_fgsm":
            return methods.n_fgsm(network, THREAT, noise=recipe.NOISE, batch_norm="eval")
        case "grad_align":
            once: Any = attacks.fgsm(THREAT)
            return methods.grad_align(network, once, THREAT, weight=recipe.ALIGN, batch_norm="eval")
        case "rat":
            return methods.rat(network)
        case "afd":
            mix: Any = recipe.MIX
            return methods.afd(
                network, climb(start="sign"), mix_stage=mix, conditions=(recipe.CONDITION,)
            )
        case _:
            attack: Any = attacks.fgsm(THREAT, start="uniform", step_size=recipe.FAST_STEP)
            return methods.adversarial(network, attack)


def perturbations(size: int) -> np.ndarray:
    """In the place of RAT's: signs at random, [K, size, size, 3] at the radius."""
    signs = np.random.default_rng(2).choice([-1, 1], (CLASSES, size, size, 3))
    return (recipe.RADIUS * signs).astype(np.float32)


def starts(name: str, batch: Batch, count: int = 1) -> list[np.ndarray]:
    """What the first `count` steps of a `Workload.program` draw of images, [B, H, W, C] each.

    Where the attack begins; of RAT the perturbed images; of GradAlign, whose attack begins at the
    image, where the second gradient is taken.
    """
    found: list[np.ndarray] = []
    for number in range(0 if name in ("natural", "free") else count):
        step = jax.random.fold_in(jax.random.key(1), number)
        if name == "grad_align":
            step = jax.random.fold_in(step, SECOND_LOOK)
        keys = image_keys(step, batch.index)
        if name == "rat":
            held = jnp.asarray(perturbations(batch.image.shape[1]))
            changed = jax.vmap(perturbed, (0, 0, 0, None))(keys, batch.image, batch.label, held)
            found.append(np.asarray(changed[0]))
            continue
        # As the attacks split theirs: the first draws the start.
        parts = {"grad_align": 1, "n_fgsm": 2}.get(name, 3)
        if parts > 1:
            keys = jax.vmap(lambda key: jax.random.split(key, parts)[0])(keys)
        found.append(np.asarray(jax.vmap(partial(_start, name))(keys, batch.image)))
    return found


def _start(name: str, key: Key, image: Array) -> Array:
    match name:
        case "trades" | "mart":
            change = recipe.NEARBY * jax.random.normal(key, image.shape)
            return norms.project(THREAT, image, image + change)
        case "n_fgsm":
            draw = THREAT.norm.sample(key, image.shape, recipe.NOISE * THREAT.radius)
            return jnp.clip(image + draw, THREAT.low, THREAT.high)
        case "grad_align":
            return image + THREAT.norm.sample(key, image.shape, THREAT.radius)
        case "afd":
            change = THREAT.radius * jax.random.rademacher(key, image.shape, image.dtype)
            return norms.project(THREAT, image, image + change)
        case _:
            return norms.random_start(THREAT, key, image)


def mean_loss(metrics: Metrics) -> list[np.ndarray]:
    """The loss of a step, or of each of several."""
    return [np.asarray(metrics["loss"] / metrics["images"])]


def known(network: str, where: str) -> str:
    """The name of a network, or a refusal."""
    name: str = one_of(where, network, models.__all__)
    return name


def matched(
    where: str, networks: Any, batch_sizes: Any, names: Any, size: int, dtype: str
) -> Iterator[tuple[Workload, Any]]:
    """Networks with what each is measured on; `where` is the option that `names` come from."""
    for option, given in ("batch_sizes", batch_sizes), (where, names):
        if len(given) != len(networks):
            raise UsageError(
                f"{option}={given!r}: expected one for each of the {len(networks)} networks"
            )
    within("batch_sizes", batch_sizes, 1)
    for network, batch_size, some in zip(networks, batch_sizes, names, strict=True):
        yield Workload(known(network, "networks"), batch_size, size, dtype), some


def said(name: str, attack_steps: int) -> str:
    """A method as lines call it."""
    once = ("natural", "fast", "n_fgsm", "grad_align", "free", "rat")
    return name if name in once else f"{name}-{attack_steps}"


# --- Beside it --------------------------------------------------------------------------------


def twin(workload: Workload) -> Any:
    """The PyTorch twin with the weights that ours begins with."""
    twins = importlib.import_module("experiments.twins")
    variables = jax.tree.map(np.asarray, workload.variables)
    return twins.twin({"name": workload.network}, variables)


def _torch(workload: Workload, name: str, attack_steps: int, compiled: bool) -> Side:
    peers = importlib.import_module("experiments.benching.peers")
    batch = workload.batch
    return peers.training_step(
        name, twin(workload), np.asarray(batch.image), np.asarray(batch.label),
        starts(name, batch), steps=attack_steps, bfloat16=workload.dtype == "bfloat16",
        compiled=compiled,
    )  # fmt: skip


def _one_by_one(workload: Workload, name: str, attack_steps: int, count: int) -> Side:
    function, (state, *rest), _, _ = workload.program(name, attack_steps)
    step = jax.jit(function, donate_argnums=(0,))

    def call() -> Any:
        nonlocal state
        found = []
        for _ in range(count):
            state, metrics = step(state, *rest)
            found.append(metrics)
        return found

    def read(found: Any) -> list[np.ndarray]:
        return [np.stack([mean_loss(metrics)[0] for metrics in found])]

    return Side(call, read, jax.block_until_ready)
