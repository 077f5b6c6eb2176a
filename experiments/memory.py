"""When a device's memory is exhausted: what to do about it, and what to say."""

import jax

from rain_jax.parallel import round_up


def exhausted(error: BaseException) -> bool:
    """Whether JAX says that a device has no memory left for a program."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def told(error: BaseException) -> str:
    """One line about it, with what helps."""
    first = str(error).strip().splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
    return (
        f"the device's memory is exhausted ({first:.200}): less is taken by a smaller batch_size, "
        "config.network.remat='convolutions' or 'blocks', config.network.dtype='bfloat16' and more "
        "devices; python -m experiments.scaling --config.batches=... counts it"
    )


def halved(size: int, devices: int, error: BaseException) -> int:
    """Half of a batch of `size` images on so many devices, if `error` is that it did not fit.

    Of results that do not depend on it. Anything else is raised again: another error, an image on
    each device which does not fit either, and one of several processes, since others would wait for
    it with the larger batch.
    """
    if not exhausted(error) or size <= devices or jax.process_count() > 1:
        raise error
    half = round_up(size // 2, devices)
    print(f"out of the device's memory: {half} images at once instead of {size}", flush=True)
    return half
