"""Which image sits where while an attack runs over many: the bookkeeping of `packing`, on the host.

Slots are counted device by device.
"""

from collections.abc import Iterable

import jax
import numpy as np

from rain_jax.evaluation.verdicts import Lanes
from rain_jax.types import Batch

# Counts are rounded up to so many shapes between a power of two and the next, so that nearly equal
# ones share a program: at most an eighth of the places is empty for it.
_SHAPES = 8
# So many batches are looked ahead, so that the last one is not nearly empty.
_AHEAD = 4
# Moving into a smaller batch compiles a program, for about as long as so many steps of a batch
# take: it pays where more than those would be spent on empty places. What is down to a quarter
# moves in any case, for other blocks and later runs, unless it is small anyway. The number for CPUs
# is from a ResNet-8 on two cores; that for accelerators is a guess.
_COMPILING = {"cpu": 40}
_COMPILING_ELSEWHERE = 400
_QUARTER = 4


def fitting(count: int, largest: int, devices: int) -> int:
    """The batch shape of one device for `count` images on all, up to `largest`."""
    each = max(1, -(-count // devices))
    grain = max(1, 2 ** (each.bit_length() - 1) // _SHAPES)
    return min(largest, -(-each // grain) * grain)


def beginning(waiting: "Queue", largest: int, devices: int) -> int:
    """The batch shape to begin with: the images that wait, in as few batches, all alike."""
    whole = largest * devices
    count = waiting.at_most(_AHEAD * whole)
    return fitting(-(-count // -(-count // whole)), largest, devices)


def refilling(size: int) -> int:
    """How many images take their places at once on a device."""
    return -(-size // _QUARTER)


def worth_moving(size: int, smaller: int, steps: int, platform: str) -> bool:
    """Whether a batch of `smaller` pays when there are so many `steps` to go."""
    price = _COMPILING.get(platform, _COMPILING_ELSEWHERE)
    saved = (size - smaller) * steps / size
    few = size >= 2 * _QUARTER and smaller * _QUARTER <= size
    return smaller < size and (few or saved >= price)


def busiest(live: np.ndarray, size: int) -> int:
    """Images on the device that has most."""
    return int(np.max(np.sum(live.reshape(-1, size), axis=1)))


def free(live: np.ndarray, size: int, room: int, devices: int) -> tuple[np.ndarray, np.ndarray]:
    """Where new ones go: (places among all slots, slots of their device), each [devices x room].

    A device with fewer free slots is given places that are taken, as -1 and `size`.
    """
    places = np.full((devices, room), -1)
    slots = np.full((devices, room), size)
    for device, own in enumerate(live.reshape(devices, size)):
        unused = np.flatnonzero(~own)[:room]
        places[device, : len(unused)] = device * size + unused
        slots[device, : len(unused)] = unused
    return places.ravel(), slots.ravel()


def closer(
    live: np.ndarray, size: int, smaller: int, devices: int
) -> tuple[np.ndarray, np.ndarray]:
    """Who stays, [devices x smaller]: as slots of their device, and as places among all slots."""
    order = np.argsort(~live.reshape(devices, size), axis=1, kind="stable")[:, :smaller]
    places = order + size * np.arange(devices)[:, None]
    return order.ravel().astype(np.int32), places.ravel()


def put(held: Batch | Lanes, places: np.ndarray, taken: Batch | Lanes) -> None:
    """Writes the rows of `taken` into these places of `held`."""

    def write(mine: np.ndarray, new: np.ndarray) -> None:
        mine[places] = new

    jax.tree.map(write, held, taken)


class Queue:
    """The valid images of some batches, read when they are wanted."""

    def __init__(self, batches: Iterable[Batch | Lanes]) -> None:
        self._batches = iter(batches)
        self._ready: Batch | Lanes | None = None
        self._read(1)

    def _read(self, count: int) -> None:
        """At least `count` images, or all that are left."""
        while self._ready is None or len(self._ready.index) < count:
            batch = next(self._batches, None)
            if batch is None:
                return
            valid = np.asarray(batch.valid)
            some: Batch | Lanes = jax.tree.map(lambda leaf, v=valid: np.asarray(leaf)[v], batch)
            if self._ready is not None:
                some = jax.tree.map(lambda a, b: np.concatenate([a, b]), self._ready, some)
            self._ready = some

    @property
    def empty(self) -> bool:
        return self._ready is None or len(self._ready.index) == 0

    @property
    def example(self) -> Batch | Lanes:
        assert self._ready is not None
        return self._ready

    def at_most(self, count: int) -> int:
        """How many images wait, counted up to `count`."""
        self._read(count)
        return min(count, len(self.example.index))

    def blank(self, count: int) -> Batch | Lanes:
        """`count` places with nobody in them, but with values that make sense."""
        example = self.example
        empty = jax.tree.map(lambda leaf: np.zeros((count, *leaf.shape[1:]), leaf.dtype), example)
        if isinstance(example, Batch):
            return empty
        return empty._replace(
            values=jax.tree.map(lambda leaf: np.repeat(leaf[:1], count, axis=0), example.values)
        )

    def pull(self, places: np.ndarray) -> tuple[Batch | Lanes, Batch | Lanes]:
        """The next images for `places`, -1 marking none: padded to all places, and as they are."""
        wanted = places >= 0
        self._read(int(np.sum(wanted)))
        count = self.at_most(int(np.sum(wanted)))
        fresh = self.blank(len(places))
        taken = jax.tree.map(lambda leaf: leaf[:count], self.example)
        self._ready = jax.tree.map(lambda leaf: leaf[count:], self.example)
        self._read(1)
        put(fresh, np.flatnonzero(wanted)[:count], taken)
        return fresh, taken
