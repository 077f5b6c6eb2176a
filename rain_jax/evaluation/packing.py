"""Attacks over many images in few compiled shapes: who is done makes room for the next.

A batch of states is advanced some steps at a time. Images that broke, or have had all steps, leave
it and others take their places; when none are waiting, those left move into a smaller batch. So
what an attack costs is what its hard images cost, and nothing recompiles.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rain_jax.data import as_float
from rain_jax.evaluation import seats
from rain_jax.evaluation.cost import Cost, Passes, cost
from rain_jax.evaluation.counts import standing
from rain_jax.evaluation.verdicts import (
    Found,
    Judging,
    Lanes,
    LogitsFnOf,
    ModelOf,
    split_for_judge,
    values_of,
)
from rain_jax.keys import is_key, key_like
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

# Looks at the scores during an attack. More of them find broken images sooner; each costs a wait
# for the device, and a forward pass where neither `best` nor `seen` does without.
_LOOKS = 20


Drive = Callable[[Variables, Key, Iterable[Batch | Lanes]], Iterator[Found]]


def packed(
    attack: Attack | Iteration,
    logits_fn_of: LogitsFnOf,
    devices: Devices,
    *,
    batch_size: int,
    early: bool | Judging = True,
) -> Drive:
    """A program that attacks the valid images of any batches: `(variables, key, batches) -> found`.

    `batch_size` is how many images the model is shown at once, over all devices: with five restarts
    a fifth as many are attacked at a time. Fewer images get a batch of about their number. With
    `early` an image leaves as soon as its score is positive: right at a fixed radius, wrong where
    the nearest image or the worst mean over draws is wanted. Where images are rounded before they
    are judged, which may undo what has just been enough, `early` is their judging: whoever is about
    to leave stays if he stands. An image's key is the
    root's with its place in the data set folded in.
    """
    run = as_iteration(attack)

    def model_of(variables: Variables, values: PyTree) -> LogitsFn:
        return logits_fn_of(variables)

    return packed_lanes(
        lambda values: run, model_of, devices, batch_size=batch_size, early=early, steps=run.steps
    )


def packed_lanes(
    attack_of: Callable[[PyTree], Attack | Iteration],
    model_of: ModelOf,
    devices: Devices,
    *,
    batch_size: int,
    early: bool | Judging = True,
    steps: int = 0,
) -> Drive:
    """`packed` for `Lanes`: each image is attacked by `attack_of(its values)`, in one program.

    The model is `model_of(variables, its values)`. Values are traced: whatever asks for their
    numbers fails here as it does under `jax.jit`. How many steps an image gets its lane says; or
    `steps` does, of `Batch`es. One that appears in several lanes has the same keys in all of them.
    """
    platform = devices.mesh.devices.flat[0].platform
    largest = 0  # places on a device
    programs: _Programs | None = None  # known with the first image's shape, kept for the others

    def drive(variables: Variables, key: Key, batches: Iterable[Batch | Lanes]) -> Iterator[Found]:
        nonlocal programs, largest
        waiting = seats.Queue(batches)
        if waiting.empty:
            return
        if programs is None:
            given = attack_of, model_of
            programs = _compile(*given, devices, variables, key, waiting.example)
            width = _width(*given, variables, key, waiting.example)
            largest = max(1, batch_size // (devices.size * width))
        size = seats.beginning(waiting, largest, devices.size)
        held = waiting.blank(size * devices.size)
        age = np.zeros(size * devices.size, np.int32)
        limit = np.zeros(size * devices.size, np.int32)
        rows = devices.split(rows_of_process(np.zeros(size * devices.size, np.int32)))
        states = programs.empty(variables, devices.split(rows_of_process(held)), rows)

        while True:
            # --- let others in: some at a time, but as many as there is room for
            room, free = seats.refilling(size), int(np.sum(~np.asarray(held.valid)))
            enough = free >= min(room * devices.size, waiting.at_most(size * devices.size))
            while enough and not waiting.empty and not np.all(held.valid):
                places, slots = seats.free(np.asarray(held.valid), size, room, devices.size)
                fresh, taken = waiting.pull(places)
                slots = np.where(fresh.valid, slots, size).astype(np.int32)  # out of range: dropped
                fresh_rows, slot_rows = devices.split(rows_of_process((fresh, slots)))
                states = programs.fill(variables, key, devices.again(states), fresh_rows, slot_rows)
                seats.put(held, places[fresh.valid], taken)
                age[places[fresh.valid]] = 0
                limit[places[fresh.valid]] = taken.steps if isinstance(taken, Lanes) else steps
            if not held.valid.any():
                return
            # --- move closer together
            smaller = seats.fitting(seats.busiest(np.asarray(held.valid), size), size, 1)
            left = int(np.max((limit - age)[held.valid]))
            if waiting.empty and seats.worth_moving(size, smaller, left, platform):
                order, kept = seats.closer(np.asarray(held.valid), size, smaller, devices.size)
                states = programs.shrink(
                    devices.again(states), devices.split(rows_of_process(order))
                )
                held, size = jax.tree.map(lambda leaf: leaf[kept], held), smaller
                age, limit = age[kept], limit[kept]
            # --- go on, no further than the first who is looked at next or has had all steps
            chunk = _chunk(limit)
            length = int(np.min(np.minimum(chunk - age % chunk, limit - age)[held.valid]))
            age += length
            ended = held.valid & (age >= limit)
            # Whoever is between two looks of his own stays: his neighbours' are not his.
            looked = ended | (age % chunk == 0)
            states, score, queries, image = programs.advance(
                variables, devices.again(states), np.int32(length), np.bool_(np.any(ended)),
                devices.split(rows_of_process(ended)),
            )  # fmt: skip
            score, queries = devices.gather((score, queries))
            leaves = looked & (score > 0) if early else False
            done = np.asarray(held.valid & (ended | leaves))
            if not done.any():
                continue
            image = devices.gather(image)

            def leaving(done: np.ndarray, image: Any = image) -> Found:
                batch = jax.tree.map(lambda leaf: leaf[done], held)
                return Found(batch, image[done], score[done], age[done], queries[done])

            if callable(early) and np.any(done & ~ended):
                before = np.flatnonzero(done & ~ended)
                seen = early(variables, key, [leaving(before)])
                stands = [standing(verdicts.judgement) for verdicts in seen]
                done[before[np.concatenate(stands)]] = False
            if done.any():
                yield leaving(done)
                held.valid[done] = False

    return drive


def passes(attack: Iteration, costs: Cost, steps: np.ndarray) -> Passes:
    """What an attack took that left its images after so many `steps` [N], all of them together.

    As `packed` asks: for the best image at every look, or where the attack has `seen`, at the end.
    Places that are empty, or wait for others, are not counted.
    """
    chunk = _chunk(np.asarray(attack.steps))
    looks = -(-steps // chunk) if attack.seen is None else steps >= attack.steps
    whole = costs.init * len(steps) + costs.step * int(np.sum(steps))
    return whole + costs.best * int(np.sum(looks))


def _chunk(steps: np.ndarray) -> np.ndarray:
    """Steps between two looks at an image that is given so many."""
    return np.maximum(1, steps // _LOOKS)


class _Programs(NamedTuple):
    """The steps of the work, each on all devices."""

    empty: Callable[..., PyTree]
    fill: Callable[..., PyTree]
    advance: Callable[..., Any]
    shrink: Callable[..., PyTree]


def _compile(
    attack_of: Callable[[PyTree], Attack | Iteration],
    model_of: ModelOf,
    devices: Devices,
    variables: Variables,
    key: Key,
    example: Batch | Lanes,
) -> _Programs:
    """Nothing is compiled before it is called, so shapes that never occur cost nothing."""

    def given(variables: Variables, values: PyTree) -> tuple[Iteration, LogitsFn]:
        return as_iteration(attack_of(values)), model_of(variables, values)

    def begin(
        variables: Variables, key: Key, image: Array, label: Target, values: PyTree
    ) -> PyTree:
        attack_key, _ = split_for_judge(key)
        run, logits_fn = given(variables, values)
        return run.init(attack_key, logits_fn, as_float(image), label), values

    first = jax.tree.map(lambda leaf: leaf[0], values_of(example))
    like, _ = jax.eval_shape(begin, variables, key, example.image[0], jnp.int32(0), first)

    # Between programs keys are plain numbers, which any mapping can split and move.
    def raw(state: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, state)

    def typed(state: PyTree) -> PyTree:
        return jax.tree.map(
            lambda leaf, as_: key_like(as_, leaf) if is_key(as_) else leaf, state, like
        )

    def empty(
        variables: Variables, batch: Batch | Lanes, rows: Array, axis_name: AxisName = None
    ) -> PyTree:
        flat = jax.eval_shape(raw, like)
        zeros = jax.tree.map(lambda leaf: jnp.zeros((*rows.shape, *leaf.shape), leaf.dtype), flat)
        return zeros, values_of(batch)

    def fill(
        variables: Variables, key: Key, states: PyTree, batch: Batch | Lanes, slots: Array,
        axis_name: AxisName = None,
    ) -> PyTree:  # fmt: skip
        def fresh(key: Key, image: Image, label: Target, values: PyTree) -> PyTree:
            return raw(begin(variables, key, image, label, values))

        new = jax.vmap(fresh)(
            image_keys(key, batch.index), batch.image, batch.label, values_of(batch)
        )
        return jax.tree.map(lambda old, leaf: old.at[slots].set(leaf, mode="drop"), states, new)

    def advance(
        variables: Variables, states: PyTree, length: Array, anybody: Array, ended: Array,
        axis_name: AxisName = None,
    ) -> tuple[PyTree, Array, Array, Array]:  # fmt: skip
        def one(state: PyTree, values: PyTree, ended: Array) -> Any:
            run, logits_fn = given(variables, values)
            # The length is data: one program serves every chunk.
            state = jax.lax.fori_loop(
                0, length, lambda _, state: run.step(logits_fn, state), typed(state)
            )
            best, seen = partial(run.best, logits_fn), run.seen
            if seen is None:
                known = best(state)
            else:
                # Whoever has had all steps gets the whole verdict; on the way what is known will
                # do, also beside others who are at their end.
                def whole(state: PyTree) -> Any:
                    pairs = best(state), seen(state)
                    return jax.tree.map(lambda all_, some: jnp.where(ended, all_, some), *pairs)

                known = jax.lax.cond(anybody, whole, seen, state)
            asked = -1 if run.queries is None else run.queries(state)
            return raw(state), known, jnp.asarray(asked, jnp.int32)

        states, values = states
        states, (image, score), queries = jax.vmap(one)(states, values, ended)
        return (states, values), score, queries, image

    def shrink(states: PyTree, order: Array, axis_name: AxisName = None) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[order], states)

    over = devices.map
    return _Programs(
        over(empty, inputs=(False, True, True), outputs=True),
        over(fill, inputs=(False, False, True, True, True), outputs=True, donate=(2,)),
        over(advance, inputs=(False, True, False, False, True), outputs=(True,) * 4, donate=(1,)),
        over(shrink, inputs=(True, True), outputs=True),
    )


def _width(
    attack_of: Callable[[PyTree], Attack | Iteration],
    model_of: ModelOf,
    variables: Variables,
    key: Key,
    example: Batch | Lanes,
) -> int:
    """How many images the model is shown at once for each one: restarts, targets, draws."""
    first = jax.tree.map(lambda leaf: leaf[0], values_of(example))

    def logits(variables: Variables, key: Key, image: Array, values: PyTree) -> Array:
        return model_of(variables, values)(key, as_float(image))

    classes = jax.eval_shape(logits, variables, key, example.image[0], first).shape[-1]
    widths: list[int] = []

    def counted(values: PyTree) -> None:
        attack = as_iteration(attack_of(values))
        widths.append(cost(attack, example.image.shape[1:], classes).width)

    # Values stay traced here too, so that no attack is made that the programs could not make.
    jax.eval_shape(counted, first)
    return widths[0]


class _Ran(NamedTuple):
    """A plain attack that has run: there is nothing to step."""

    image: Image
    score: Scalar


def as_iteration(attack: Attack | Iteration) -> Iteration:
    """The attack; one that is no `Iteration` runs at once, and its images are for the judge."""
    if isinstance(attack, Iteration):
        return attack

    def init(key: Key, logits_fn: LogitsFn, image: Image, target: Target) -> _Ran:
        return _Ran(attack(key, logits_fn, image, target), jnp.float32(0.0))

    return Iteration(init, lambda _, state: state, lambda _, state: (state.image, state.score), 0)
