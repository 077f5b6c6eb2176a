"""The words that every part of rain_jax uses, and nothing that runs.

Images are float32 in [0, 1] and channels last; losses and norms are float32 whatever the network
computes in. Everything is written for one image and batched with `jax.vmap`; a leading `B` in a
shape marks the few places where the batch itself means something.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol

import jax

Array = jax.Array
Key = jax.Array  # a typed PRNG key, `jax.random.key(seed)`
Image = jax.Array  # [H, W, C] in [0, 1]
Logits = jax.Array  # [K]
Scalar = jax.Array  # []
Target = Any  # what a loss compares with: a label [], or probabilities or logits [K]
PyTree = Any
Variables = dict[str, Any]  # {"params": ..., "batch_stats": ...}, plain dictionaries
Params = PyTree
ModelState = PyTree  # what a network carries beside its parameters: batch statistics
Metrics = dict[str, jax.Array]  # sums over the valid images of a batch, never means
AxisName = str | tuple[str, ...] | None

LogitsFn = Callable[[Key, Image], Logits]
"""One image to its logits. A fixed model ignores the key; a random one draws from it."""

Loss = Callable[[Logits, Target], Scalar]
"""Larger = more wrong: attacks climb it, training descends it."""

Attack = Callable[[Key, LogitsFn, Image, Target], Image]
"""One image to an adversarial one. Whether it succeeded is for the judge to say."""

Access = Literal["gradient", "logits", "label", "nothing"]
"""The most that an attack uses of the model: gradients, logits, the predicted label, or nothing."""


class Estimator(NamedTuple):
    """Makes `(key, image) -> ((value, aux), gradient)` of `(key, image) -> (value, aux)`.

    As `jax.value_and_grad(..., has_aux=True)` does, but over randomness too: value and what comes
    with it are means over draws at the image itself, and the gradient is of a mean, where it is not
    estimated from values around. `draws` is over how many draws of the model that mean is, `uses`
    what it uses of the model.
    """

    of: Callable[
        [Callable[[Key, Image], tuple[Scalar, PyTree]]],
        Callable[[Key, Image], tuple[tuple[Scalar, PyTree], Image]],
    ]
    draws: int = 1
    uses: Access = "gradient"

    def __call__(self, function: Callable[[Key, Image], tuple[Scalar, PyTree]]) -> Any:
        return self.of(function)


class Norm(NamedTuple):
    """A way to measure a perturbation [H, W, C], and the geometry that goes with it."""

    order: float  # the p of the p-norm
    measure: Callable[[Array], Scalar]  # perturbation -> its size
    project: Callable[..., Array]  # perturbation, radius, low, high -> nearest within all three
    sample: Callable[[Key, tuple[int, ...], Scalar], Array]  # a random one within the radius
    steepest: Callable[[Array], Array]  # gradient -> the step of size 1 that climbs fastest
    # slope, level, low, high -> the smallest one in [low, high] with <slope, it> = level
    cross: Callable[..., Array]


class Threat(NamedTuple):
    """What an attacker may do: any image in [low, high] at most `radius` away in `norm`."""

    norm: Norm
    radius: Any  # float or a traced scalar, in units of pixel values in [0, 1]
    low: Any = 0.0
    high: Any = 1.0


class Iteration(NamedTuple):
    """An attack as a small state machine, so that others may drive, pack or resume its steps.

    Calling it runs it whole, in one compiled loop, so it is an `Attack` like any other. The state
    is a NamedTuple of all that an image needs beside the model, so that stacked states are batches;
    its field `image` is the one that the next step looks at.

    `best` gives the image to return and its score: positive where it breaks the model within the
    threat, and the larger the better. At a fixed radius that is the margin; attacks that look for
    the smallest perturbation score what they found by its nearness. Steps taken after an image is
    broken may better the score and never worsen it.

    `seen` is what is known of that between two steps without asking the model again, for attacks
    whose `best` asks it: of the images that steps have looked at, the last one not among them.

    With `once` a step asks the model once and about `state.image`, for its logits and their
    gradient, so that who has both at hand need not compute them again.

    The last four fields declare what an evaluation must know of an attack: what it `uses` of the
    model, over how many `draws` of a random one each step takes means, in which `norms` it is
    defined, and whether it seeks the nearest misclassified image (`minimum_norm`), so that a radius
    of infinity makes sense.
    """

    init: Callable[[Key, LogitsFn, Image, Target], PyTree]
    step: Callable[[LogitsFn, PyTree], PyTree]
    best: Callable[[LogitsFn, PyTree], tuple[Image, Scalar]]
    steps: int
    # Of a state: how often the model has been asked about this image until it broke. For attacks
    # that see no gradients, where this is the price.
    queries: Callable[[PyTree], Scalar] | None = None
    seen: Callable[[PyTree], tuple[Image, Scalar]] | None = None
    once: bool = False
    uses: Access = "gradient"
    draws: int = 1
    norms: tuple[Norm, ...] = ()
    minimum_norm: bool = False

    def __call__(self, key: Key, logits_fn: LogitsFn, image: Image, target: Target) -> Image:
        state = self.init(key, logits_fn, image, target)
        state, _ = jax.lax.scan(
            lambda state, _: (self.step(logits_fn, state), None), state, length=self.steps
        )
        return self.best(logits_fn, state)[0]


DefenceApply = Callable[[Variables, Key, Image], Image]


class Defence(NamedTuple):
    """A transformation of the image in front of a classifier, with variables of its own.

    `init(key, image) -> variables`: `{"params": ...}` is what training may change, every other
    collection is fixed, and `{}` is a defence without any. `apply(variables, key, image) -> image`
    is what runs in earnest. How it must be attacked is part of it: the gradient of `apply` is one
    that an attacker can use (where the function itself has none that helps, the defence brings its
    own backward rule, BPDA), `random` says that one draw tells nothing, and `surrogates` are other
    forms of the same function, by name, that an honest evaluation attacks through as well. Those in
    `fixed` draw nothing even where `apply` does, so that one look at them is enough.
    """

    init: Callable[[Key, Image], Variables]
    apply: DefenceApply
    random: bool = False
    surrogates: Mapping[str, DefenceApply] = MappingProxyType({})
    fixed: frozenset[str] = frozenset()


class Upscaler(NamedTuple):
    """A super-resolution network, [h, w, C] to [factor h, factor w, C], both about in [0, 1].

    `init(key, image) -> variables`, `apply(variables, image) -> image`: one image, unclipped.
    """

    init: Callable[[Key, Image], Variables]
    apply: Callable[[Variables, Image], Image]
    factor: int


class NetworkApply(Protocol):
    """See `Network.apply`."""

    def __call__(
        self,
        variables: Variables,
        images: Array,
        train: bool = False,
        axis_name: AxisName = None,
        keys: Array | None = None,
    ) -> tuple[Array, ModelState]: ...


class Network(NamedTuple):
    """A classifier of batches [B, H, W, C] in [0, 1], normalisation inside.

    `init(key, images) -> variables`; `apply(variables, images, train, axis_name, keys) -> (logits
    [B, K] in float32, state)`. With `train=True` batch statistics are those of `images`, taken
    over `axis_name` too where it is given, and `state` holds the running averages that follow.
    A `random` network draws from `keys` [B], one for each image; others do without.
    """

    init: Callable[[Key, Array], Variables]
    apply: NetworkApply
    classes: int
    random: bool = False


class Model(NamedTuple):
    """A classifier with its weights, as evaluations take it: `rain_jax.adapters` makes them.

    `logits(variables, key, image) -> [K]` is of one image [H, W, C] in [0, 1], normalisation
    inside; a fixed model ignores the key. Keep the function: programs are compiled for it.
    """

    logits: Callable[[PyTree, Key, Image], Logits]
    variables: PyTree
    random: bool = False  # whether the logits change with the key
    name: str = "model"


class Batch(NamedTuple):
    """Images with what belongs to each. Padding has `valid` False and counts for nothing, but in
    batch normalisation, which training feeds whole batches.
    """

    image: Array  # [B, H, W, C], float32 in [0, 1]; uint8 on its way from a source
    label: Array  # [B] int32
    # The image's place in its data set, [B] int32: its keys come from it. (A tuple's own `index`
    # gives way.)
    index: Array  # type: ignore[assignment]
    valid: Array  # [B] bool


class Objective(Protocol):
    """What a training method minimises, on the images of one device.

    Returns the sum of the loss over the batch's valid images (the caller divides by their number
    over all devices), the model state after the forward pass and sums of metrics. `step` is how
    many steps are done, for what changes in the course of a run.
    """

    def __call__(
        self,
        params: Params,
        model_state: ModelState,
        key: Key,
        batch: Batch,
        axis_name: AxisName = None,
        step: Scalar | int = 0,
    ) -> tuple[Scalar, tuple[ModelState, Metrics]]: ...


class MethodStep(Protocol):
    """See `Method.step`."""

    def __call__(
        self, key: Key, state: PyTree, batch: Batch, axis_name: AxisName = None
    ) -> tuple[PyTree, Metrics]: ...


class Method(NamedTuple):
    """A way to train: `init(variables) -> state`, `step(key, state, batch, axis_name)`."""

    init: Callable[[Variables], PyTree]
    step: MethodStep
