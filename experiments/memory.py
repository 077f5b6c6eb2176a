"""What to say when a device's memory is exhausted."""


def told(error: BaseException) -> str:
    """One line about it, with what helps."""
    first = str(error).strip().splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
    return (
        f"the device's memory is exhausted ({first:.200}): less is taken by a smaller batch_size, "
        "config.network.remat='convolutions' or 'blocks', config.network.dtype='bfloat16' and more "
        "devices; python -m experiments.scaling --config.batches=... counts it"
    )
