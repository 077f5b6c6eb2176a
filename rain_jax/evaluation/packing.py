"""Attacks over many images in few compiled shapes: who is done makes room for the next.

A batch of states is advanced some steps at a time. Images that broke, or have had all steps, leave
it and others take their places; when none are waiting, those left move into a smaller batch. So
what an attack costs is what its hard images cost, and nothing recompiles.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rain_jax.data import as_float
from rain_jax.evaluation.verdicts import Found, LogitsFnOf, split_for_judge
from rain_jax.parallel import Devices, image_keys, rows_of_process
from rain_jax.types import (
    Array,
    Attack,
    AxisName,
    Batch,
    Image,
    Iteration,
    Key,
    LogitsFn,
    PyTree,
    Scalar,
    Target,
    Variables,
)

# Looks at the scores during an attack. More of them find broken images sooner; each costs a
# forward pass where the attack does not carry its score along, and a wait for the device.
_LOOKS = 20
# Each batch shape is this much smaller than the one before, down to a last one.
_SMALLER, _SHAPES = 4, 3


Drive = Callable[[Variables, Key, Iterable[Batch]], Iterator[Found]]


def packed(
    attack: Attack | Iteration,
    logits_fn_of: LogitsFnOf,
    devices: Devices,
    *,
    batch_size: int,
    early: bool = True,
) -> Drive:
    """A program that attacks the valid images of any batches: `(variables, key, batches) -> found`.

    `batch_size`, over all devices, is the largest shape; there are three at most. With `early` an
    image leaves as soon as its score is positive: right at a fixed radius, wrong where the nearest
    image or the worst mean over draws is wanted. Images get the keys that `evaluator` gives them.
    """
    run = attack if isinstance(attack, Iteration) else _whole(attack)
    sizes = _sizes(max(1, batch_size // devices.size))
    chunk = max(1, run.steps // _LOOKS)
    programs: _Programs | None = None  # known with the first image's shape, kept for the others

    def drive(variables: Variables, key: Key, batches: Iterable[Batch]) -> Iterator[Found]:
        nonlocal programs
        waiting = _Queue(batches)
        if waiting.empty:
            return
        if programs is None:
            programs = _compile(run, logits_fn_of, devices, variables, key, waiting.example)
        size = _fitting(sizes, waiting.at_most(sizes[0] * devices.size), devices.size)
        room = min(size, sizes[min(1, len(sizes) - 1)])  # of a filling, on each device
        held = waiting.blank(size * devices.size)
        age = np.zeros(size * devices.size, np.int32)
        rows = devices.split(rows_of_process(np.zeros(size * devices.size, np.int32)))
        states = programs.empty(variables, devices.split(rows_of_process(held)), rows)

        while True:
            # --- let others in
            while not waiting.empty and np.sum(~np.asarray(held.valid)) >= room * devices.size:
                places, slots = _free(np.asarray(held.valid), size, room, devices.size)
                fresh, taken = waiting.pull(places)
                slots = np.where(fresh.valid, slots, size).astype(np.int32)  # out of range: dropped
                fresh_rows, slot_rows = devices.split(rows_of_process((fresh, slots)))
                states = programs.fill(variables, key, devices.again(states), fresh_rows, slot_rows)
                _put(held, places[fresh.valid], taken)
                age[places[fresh.valid]] = 0
            if not held.valid.any():
                return
            # --- move closer together
            smaller = _fitting(sizes, _busiest(np.asarray(held.valid), size), 1)
            if waiting.empty and smaller < size:
                order, kept = _closer(np.asarray(held.valid), size, smaller, devices.size)
                states = programs.shrink(
                    devices.again(states), devices.split(rows_of_process(order))
                )
                held, age, size = jax.tree.map(lambda leaf: leaf[kept], held), age[kept], smaller
                room = min(room, size)
            # --- go on, no further than the first who has had all steps
            length = min(chunk, run.steps - int(np.max(age[held.valid])))
            states, score, queries, image = programs.advance(
                variables, devices.again(states), np.int32(length)
            )
            age += length
            score, queries = devices.gather((score, queries))
            done = held.valid & ((age >= run.steps) | ((score > 0) if early else False))
            if done.any():
                image = devices.gather(image)
                batch = jax.tree.map(lambda leaf: leaf[done], held)
                yield Found(batch, image[done], score[done], age[done], queries[done])
                held.valid[done] = False

    return drive


class _Programs(NamedTuple):
    """The steps of the work, each on all devices."""

    empty: Callable[..., PyTree]
    fill: Callable[..., PyTree]
    advance: Callable[..., Any]
    shrink: Callable[..., PyTree]


def _compile(
    run: Iteration,
    logits_fn_of: LogitsFnOf,
    devices: Devices,
    variables: Variables,
    key: Key,
    example: Batch,
) -> _Programs:
    """Nothing is compiled before it is called, so shapes that never occur cost nothing."""

    def begin(variables: Variables, key: Key, image: Array, label: Target) -> PyTree:
        attack_key, _ = split_for_judge(key)
        return run.init(attack_key, logits_fn_of(variables), as_float(image), label)

    like = jax.eval_shape(begin, variables, key, example.image[0], jnp.int32(0))

    # Between programs keys are plain numbers, which any mapping can split and move.
    def raw(state: PyTree) -> PyTree:
        return jax.tree.map(
            lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, state
        )

    def typed(state: PyTree) -> PyTree:
        return jax.tree.map(
            lambda leaf, as_: jax.random.wrap_key_data(leaf) if _is_key(as_) else leaf, state, like
        )

    def empty(
        variables: Variables, batch: Batch, rows: Array, axis_name: AxisName = None
    ) -> PyTree:
        flat = jax.eval_shape(raw, like)
        return jax.tree.map(lambda leaf: jnp.zeros((*rows.shape, *leaf.shape), leaf.dtype), flat)

    def fill(
        variables: Variables, key: Key, states: PyTree, batch: Batch, slots: Array,
        axis_name: AxisName = None,
    ) -> PyTree:  # fmt: skip
        def fresh(key: Key, image: Image, label: Target) -> PyTree:
            return raw(begin(variables, key, image, label))

        new = jax.vmap(fresh)(image_keys(key, batch.index), batch.image, batch.label)
        return jax.tree.map(lambda old, leaf: old.at[slots].set(leaf, mode="drop"), states, new)

    def advance(
        variables: Variables, states: PyTree, length: Array, axis_name: AxisName = None
    ) -> tuple[PyTree, Array, Array, Array]:
        logits_fn = logits_fn_of(variables)

        def one(state: PyTree) -> PyTree:
            return raw(run.step(logits_fn, typed(state)))

        def seen(state: PyTree) -> tuple[Scalar, Scalar, Image]:
            state = typed(state)
            image, score = run.best(logits_fn, state)
            asked = jnp.int32(-1) if run.queries is None else run.queries(state)
            return score, jnp.asarray(asked, jnp.int32), image

        # The length is data: one program serves every chunk.
        states = jax.lax.fori_loop(0, length, lambda _, states: jax.vmap(one)(states), states)
        return states, *jax.vmap(seen)(states)

    def shrink(states: PyTree, order: Array, axis_name: AxisName = None) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[order], states)

    over = devices.map
    return _Programs(
        over(empty, inputs=(False, True, True), outputs=True),
        over(fill, inputs=(False, False, True, True, True), outputs=True, donate=(2,)),
        over(advance, inputs=(False, True, False), outputs=(True,) * 4, donate=(1,)),
        over(shrink, inputs=(True, True), outputs=True),
    )


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


class _Ran(NamedTuple):
    """A plain attack that has run: there is nothing to step."""

    image: Image
    score: Scalar


def _whole(attack: Attack) -> Iteration:
    """An attack that is no `Iteration`, run at once; its images are for the judge to score."""

    def init(key: Key, logits_fn: LogitsFn, image: Image, target: Target) -> _Ran:
        return _Ran(attack(key, logits_fn, image, target), jnp.float32(0.0))

    return Iteration(init, lambda _, state: state, lambda _, state: (state.image, state.score), 0)


# --- Bookkeeping, on the host: which image sits where. Slots are counted device by device. ------


def _sizes(largest: int) -> list[int]:
    """Batch shapes of one device, descending."""
    sizes = [largest]
    while len(sizes) < _SHAPES and sizes[-1] >= 2 * _SMALLER:
        sizes.append(-(-sizes[-1] // _SMALLER))
    return sizes


def _fitting(sizes: list[int], count: int, devices: int) -> int:
    """The smallest shape of one device in which `count` images find room on all."""
    return min((s for s in sizes if s * devices >= count), default=sizes[0])


def _busiest(live: np.ndarray, size: int) -> int:
    """Images on the device that has most."""
    return int(np.max(np.sum(live.reshape(-1, size), axis=1)))


def _free(live: np.ndarray, size: int, room: int, devices: int) -> tuple[np.ndarray, np.ndarray]:
    """Where new ones go: (places among all slots, slots of their device), each [devices x room].

    A device with fewer free slots is given places that are taken, as -1 and `size`.
    """
    places = np.full((devices, room), -1)
    slots = np.full((devices, room), size)
    for device, own in enumerate(live.reshape(devices, size)):
        free = np.flatnonzero(~own)[:room]
        places[device, : len(free)] = device * size + free
        slots[device, : len(free)] = free
    return places.ravel(), slots.ravel()


def _closer(
    live: np.ndarray, size: int, smaller: int, devices: int
) -> tuple[np.ndarray, np.ndarray]:
    """Who stays, [devices x smaller]: as slots of their device, and as places among all slots."""
    order = np.argsort(~live.reshape(devices, size), axis=1, kind="stable")[:, :smaller]
    places = order + size * np.arange(devices)[:, None]
    return order.ravel().astype(np.int32), places.ravel()


def _put(held: Batch, places: np.ndarray, taken: Batch) -> None:
    for mine, new in zip(held, taken, strict=True):
        mine[places] = new


class _Queue:
    """The valid images of some batches, read when they are wanted."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = iter(batches)
        self._ready: Batch | None = None
        self._read(1)

    def _read(self, count: int) -> None:
        """At least `count` images, or all that are left."""
        while self._ready is None or len(self._ready.index) < count:
            batch = next(self._batches, None)
            if batch is None:
                return
            valid = np.asarray(batch.valid)
            some: Batch = jax.tree.map(lambda leaf, v=valid: np.asarray(leaf)[v], batch)
            if self._ready is not None:
                some = jax.tree.map(lambda a, b: np.concatenate([a, b]), self._ready, some)
            self._ready = some

    @property
    def empty(self) -> bool:
        return self._ready is None or len(self._ready.index) == 0

    @property
    def example(self) -> Batch:
        assert self._ready is not None
        return self._ready

    def at_most(self, count: int) -> int:
        """How many images wait, counted up to `count`."""
        self._read(count)
        return min(count, len(self.example.index))

    def blank(self, count: int) -> Batch:
        """`count` places with nobody in them."""
        return jax.tree.map(
            lambda leaf: np.zeros((count, *leaf.shape[1:]), leaf.dtype), self.example
        )

    def pull(self, places: np.ndarray) -> tuple[Batch, Batch]:
        """The next images for `places`, -1 marking none: padded to all places, and as they are."""
        wanted = places >= 0
        self._read(int(np.sum(wanted)))
        count = self.at_most(int(np.sum(wanted)))
        taken: Batch = jax.tree.map(lambda leaf: leaf[:count], self.example)
        self._ready = jax.tree.map(lambda leaf: leaf[count:], self.example)
        self._read(1)
        fresh = self.blank(len(places))
        _put(fresh, np.flatnonzero(wanted)[:count], taken)
        return fresh, taken
