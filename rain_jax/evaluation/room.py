"""How many images a device has room for: fewer, once they have not fitted into its memory."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax

from rain_jax.parallel import round_up

T = TypeVar("T")


def exhausted(error: BaseException) -> bool:
    """Whether JAX says that a device has no memory left for a program."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


class Room:
    """How many images are shown to a model at once: fewer, once they have not fitted.

    For results that do not depend on it. `size` is over all `devices`, a multiple of them.
    """

    def __init__(self, size: int, devices: int):
        self.size, self._devices = round_up(size, devices), devices

    def halve(self, error: BaseException) -> None:
        """Takes half as many from now on, if `error` is that they did not fit.

        Anything else is raised again: another error, an image on each device which does not fit
        either, and one of several processes, for others would wait for it with the larger batch.
        """
        if not exhausted(error) or self.size <= self._devices or jax.process_count() > 1:
            raise error
        half = round_up(self.size // 2, self._devices)
        before, self.size = self.size, half
        print(f"out of the device's memory: {half} images at once instead of {before}", flush=True)

    def collect(
        self, made: Callable[[], Iterable[T]], seen: Callable[[T, int], Any] = lambda *_: None
    ) -> list[T]:
        """All that `made()` gives, begun again with fewer images where it does not fit.

        `seen(one, 1)` is called as each comes, and `seen(one, -1)` where it is to come again.
        """
        while True:
            done: list[T] = []
            try:
                for one in made():
                    done.append(one)
                    seen(one, 1)
                return done
            except jax.errors.JaxRuntimeError as error:
                self.halve(error)
                for one in done:
                    seen(one, -1)
