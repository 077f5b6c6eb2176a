"""Keys for images, and the one place that knows about devices.

A step is written once, for one device: `body(*arguments, axis_name=...)`, with explicit `psum` of
sums and counts. `Devices.map` runs it on every device of a one-axis mesh, over arguments that are
either the same everywhere or split along their first axis.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rain_jax.checks import UsageError, one_of
from rain_jax.types import Array, AxisName, Key, ModelState, Network, PyTree, Variables

AXIS = "device"
Mapping = Literal["shard_map", "pmap"]
Sums = Literal["float32", "bfloat16"]
Statistics = Literal["all", "device"]


def image_keys(key: Key, index: Array) -> Key:
    """A key for each image by its place in the data set, [B]: any batch and devices, same draws."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


def rows_of_process(tree: PyTree) -> PyTree:
    """This process's share of global rows [B, ...] of NumPy arrays."""
    count, place = jax.process_count(), jax.process_index()

    def share(leaf: np.ndarray) -> np.ndarray:
        rows = len(leaf) // count
        return leaf[place * rows : (place + 1) * rows]

    return jax.tree.map(share, tree)


# What programs call the sums of `psum`, so that they can be told from those inside a network.
TOTALS = "totals_over_devices"


def psum(tree: PyTree, axis_name: AxisName) -> PyTree:
    """The sum over `axis_name`, or the tree itself where there is none."""
    with jax.named_scope(TOTALS):
        return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def psum_as(dtype: Sums, tree: PyTree, axis_name: AxisName) -> PyTree:
    """`psum` of float32 arrays that cross the devices as `dtype`: of bfloat16 half the bytes.

    What is sent is rounded to the 8 bits of precision of bfloat16, a relative error of 1/256 at
    most; how sums of it are rounded is up to the platform (on CPU, where XLA sums in float32, not
    at all). Nothing is rounded where there is one device.
    """
    one_of("sums", dtype, get_args(Sums))
    if dtype == "float32" or axis_name is None or jax.lax.axis_size(axis_name) == 1:
        return psum(tree, axis_name)
    # Asked for by its name, since XLA takes a conversion there and back for none at all.
    rounded = jax.tree.map(lambda leaf: jax.lax.reduce_precision(leaf, 8, 7), tree)
    sums = psum(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), rounded), axis_name)
    return jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), sums, tree)


def with_statistics(of: Statistics, network: Network) -> Network:
    """The network, normalising in training by the images of "all" devices or of each "device".

    With "all" it is the network itself: what it computes does not depend on how many devices share
    the batch, for which each layer's statistics cross them, forwards and backwards, in every pass.
    With "device" nothing crosses them but the running averages, once in a pass, so that they are
    the same everywhere: the mean of what each device would have made of them.
    """
    one_of("statistics", of, get_args(Statistics))
    if of == "all":
        return network

    def apply(
        variables: Variables,
        images: Array,
        train: bool = False,
        axis_name: AxisName = None,
        keys: Array | None = None,
    ) -> tuple[Array, ModelState]:
        names = (axis_name,) if isinstance(axis_name, str) else axis_name or ()
        within_device = tuple(name for name in names if name != AXIS) or None
        logits, state = network.apply(variables, images, train, within_device, keys)
        if AXIS in names:
            state = _mean_of_moved(variables, state)
        return logits, state

    return network._replace(apply=apply)


def _mean_of_moved(before: Variables, after: ModelState) -> ModelState:
    """The mean over devices of what is another array than before: frozen weights stay at home."""
    were = {id(leaf) for leaf in jax.tree.leaves(before)}
    leaves, structure = jax.tree.flatten(after)
    moved = [place for place, leaf in enumerate(leaves) if id(leaf) not in were]
    for place, mean in zip(moved, jax.lax.pmean([leaves[m] for m in moved], AXIS), strict=True):
        leaves[place] = mean.astype(leaves[place].dtype)  # a counter stays one
    return jax.tree.unflatten(structure, leaves)


class Devices(NamedTuple):
    """Where programs run.

    `map(body, inputs=(...), outputs=..., donate=())` makes a program of `body(*arguments,
    axis_name)`: True marks what is split over the devices, False what is the same on all.
    `split` takes the rows of *this process*, [global rows / processes, ...].
    """

    size: int
    mesh: Mesh
    map: Callable[..., Callable[..., Any]]
    replicate: Callable[[PyTree], PyTree]
    split: Callable[[PyTree], PyTree]
    again: Callable[[PyTree], PyTree]  # split results as split inputs of the next program
    gather: Callable[[PyTree], PyTree]  # per-image results of all processes, as NumPy [B, ...]
    to_global: Callable[[PyTree], PyTree]  # replicated results as arrays that orbax can save
    to_local: Callable[[PyTree], PyTree]  # and back to what `map` takes


# More CPU devices than this are not made without being asked for: nobody has measured them.
_MOST_CORES = 16


def _devices_asked_for() -> bool:
    """Whether the environment says how many CPU devices there are."""
    return "device_count" in os.environ.get("XLA_FLAGS", "") or "JAX_NUM_CPU_DEVICES" in os.environ


def share_cores() -> None:
    """Makes a CPU device of each core, unless the environment says how many there are.

    One CPU device runs the small operations of an attack on one core, and leaves the others idle.
    Where there is an accelerator nothing changes: CPU devices are not its. To be called before
    anything else touches a device; afterwards it does nothing.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if _devices_asked_for() or not cores:
        return
    with contextlib.suppress(RuntimeError):  # the devices are there already
        jax.config.update("jax_num_cpu_devices", min(cores, _MOST_CORES))


def choose_devices(count: int | None = None, *, training: bool = False) -> list[jax.Device]:
    """The first `count` devices, all of them without it; fewer is a matter of one process.

    For `training` on CPU, all of them are one, unless the environment says how many there are: sums
    over devices round otherwise than sums on one, and a run should not turn on the machine's cores.
    """
    devices = jax.devices()
    alone = training and devices[0].platform == "cpu" and jax.process_count() == 1
    if count is None and alone and not _devices_asked_for():
        return devices[:1]
    if count is None or count == len(devices):
        return devices
    if not 1 <= count <= len(devices):
        more = (
            " (JAX_NUM_CPU_DEVICES=N makes a CPU N of them)" if devices[0].platform == "cpu" else ""
        )
        raise UsageError(f"devices={count}: expected 1 to {len(devices)}, which are here{more}")
    if jax.process_count() > 1:
        raise UsageError(f"devices={count}: with several processes all {len(devices)} are used")
    return devices[:count]


def check_batch_size(where: str, size: int, count: int) -> int:
    """A batch must divide over the devices; says so before anything is compiled."""
    if size < 1 or size % count:
        near = max(count, round(size / count) * count)
        raise UsageError(
            f"{where}={size}: expected a positive multiple of the {count} devices, {near} say"
        )
    return size


def round_up(size: int, count: int) -> int:
    """The smallest multiple of the `count` devices that is at least `size`: the rest is padding."""
    return -(-size // count) * count


# XLA combines the sums of all gradients into one, which begins when the last of them is there. With
# these it makes several of so many bytes, each of which can cross while earlier layers go backwards
# (docs/scaling.md says what TPUs' compiler makes of it). An eighth of a ResNet-18 takes longer to
# cross than to begin.
_BUCKET = 6 * 2**20
_OVERLAPPING: dict[str, dict[str, bool | int]] = {
    "gpu": {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_all_reduce_combine_threshold_bytes": _BUCKET,
    },
    "tpu": {
        "xla_enable_async_all_reduce": True,
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
        "xla_jf_crs_combiner_threshold_in_bytes": _BUCKET,
    },
}


def place(
    mapping: Mapping = "shard_map",
    devices: Sequence[jax.Device] | None = None,
    *,
    overlap: bool = False,
) -> Devices:
    """Programs over all `devices` (default: all there are), by `shard_map` or by `pmap`.

    Both give the same numbers. `shard_map` leaves global arrays behind, so its state is saved and
    restored on any number of hosts; `pmap` is the older interface, kept for those who need it.

    With `overlap` XLA is asked to send gradients in several sums, beside the backward pass that
    they come from: on several GPUs or TPUs, and by `shard_map` alone. `UsageError` by `pmap`.
    """
    one_of("mapping", mapping, ("shard_map", "pmap"))
    if overlap and mapping == "pmap":
        raise UsageError("overlap=True: expected mapping='shard_map', for pmap takes no options")
    # A process feeds neighbouring rows: its devices must be neighbours, too.
    given = jax.devices() if devices is None else devices
    chosen = tuple(sorted(given, key=lambda d: d.process_index))
    options = _OVERLAPPING.get(chosen[0].platform, {}) if overlap and len(chosen) > 1 else {}
    return _placed(mapping, chosen, tuple(options.items()))


@functools.lru_cache(64)
def _placed(
    mapping: Mapping, chosen: tuple[jax.Device, ...], options: tuple[tuple[str, bool | int], ...]
) -> Devices:
    """The same for the same devices, so that programs are kept for them."""
    mesh = Mesh(np.array(chosen), (AXIS,), axis_types=(AxisType.Auto,))
    return _pmap(mesh) if mapping == "pmap" else _shard_map(mesh, dict(options))


def _shard_map(mesh: Mesh, options: dict[str, bool | int]) -> Devices:
    same = NamedSharding(mesh, PartitionSpec())
    along = NamedSharding(mesh, PartitionSpec(AXIS))

    def specs(split: Any) -> Any:
        return jax.tree.map(lambda s: PartitionSpec(AXIS) if s else PartitionSpec(), split)

    def over(
        body: Callable[..., Any], inputs: tuple[bool, ...], outputs: Any, donate: Any = ()
    ) -> Callable[..., Any]:
        mapped = jax.shard_map(
            partial(body, axis_name=AXIS),
            mesh=mesh,
            in_specs=specs(inputs),
            out_specs=specs(outputs),
            # With the check on, gradients of a body that sums them itself come out times the
            # number of devices, silently.
            check_vma=False,
        )
        return jax.jit(mapped, donate_argnums=donate, compiler_options=options)

    def replicate(tree: PyTree) -> PyTree:
        if jax.process_count() == 1:
            return jax.device_put(tree, same)
        # Typed keys cannot be put on devices of other processes; a program can make them there.
        return jax.jit(lambda x: x, out_shardings=same)(tree)

    def split(tree: PyTree) -> PyTree:
        return jax.tree.map(
            lambda leaf: jax.make_array_from_process_local_data(along, np.asarray(leaf)), tree
        )

    return Devices(
        mesh.size, mesh, over, replicate, split, _unchanged, _gather, _unchanged, _unchanged
    )


def _pmap(mesh: Mesh) -> Devices:
    devices = list(mesh.devices.flat)
    local = sum(device.process_index == jax.process_index() for device in devices)

    def over(
        body: Callable[..., Any], inputs: tuple[bool, ...], outputs: Any, donate: Any = ()
    ) -> Callable[..., Any]:
        mapped = jax.pmap(
            lambda *arguments: body(*arguments, axis_name=AXIS),
            axis_name=AXIS,
            in_axes=tuple(0 if s else None for s in inputs),
            out_axes=jax.tree.map(lambda s: 0 if s else None, outputs),
            devices=devices,
            donate_argnums=donate,
        )

        def run(*arguments: Any) -> Any:
            # [devices, rows, ...] of this process to its rows, where results are split.
            return jax.tree.map(
                lambda split, part: jax.tree.map(_join, part) if split else part,
                outputs,
                mapped(*arguments),
            )

        # The program itself, for those who want to read it.
        run.lower = mapped.lower  # type: ignore[attr-defined]
        return run

    def split(tree: PyTree) -> PyTree:
        along = NamedSharding(mesh.local_mesh, PartitionSpec(AXIS))

        def rows(leaf: Any) -> jax.Array:
            leaf = np.asarray(leaf)
            return jax.device_put(leaf.reshape(local, -1, *leaf.shape[1:]), along)

        return jax.tree.map(rows, tree)

    def to_global(tree: PyTree) -> PyTree:
        if jax.process_count() == 1:
            return tree
        return multihost_utils.host_local_array_to_global_array(tree, mesh, PartitionSpec())

    def to_local(tree: PyTree) -> PyTree:
        if jax.process_count() == 1:
            return tree
        return multihost_utils.global_array_to_host_local_array(tree, mesh, PartitionSpec())

    def replicate(tree: PyTree) -> PyTree:
        # On the devices of this process. What `pmap` finds in place it does not copy again at every
        # call; and donated scalars that are elsewhere it deletes before it has used them, where
        # there are several processes (seen in JAX 0.10).
        return jax.device_put(tree, NamedSharding(mesh.local_mesh, PartitionSpec()))

    return Devices(mesh.size, mesh, over, replicate, split, split, _gather, to_global, to_local)


def _unchanged(tree: PyTree) -> PyTree:
    return tree


def _join(leaf: Any) -> np.ndarray:
    """[devices, rows, ...] of one process to its rows."""
    leaf = np.asarray(leaf)
    return leaf.reshape(-1, *leaf.shape[2:])


def _gather(tree: PyTree) -> PyTree:
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return jax.tree.map(partial(multihost_utils.process_allgather, tiled=True), tree)


def initialise() -> None:
    """Joins the other processes where the environment says that there are any; else `share_cores`.

    Clusters that JAX knows (TPU pods, SLURM, Open MPI) are found by `jax.distributed` itself when
    `RAIN_JAX_DISTRIBUTED=1`; elsewhere `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID` name them. To be called before anything else touches a device.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if jax.distributed.is_initialized():
        return
    if address:
        try:
            number = int(os.environ["JAX_NUM_PROCESSES"])
            place = int(os.environ["JAX_PROCESS_ID"])
        except (KeyError, ValueError):
            raise UsageError(
                "JAX_COORDINATOR_ADDRESS is set: expected whole numbers in JAX_NUM_PROCESSES and "
                "JAX_PROCESS_ID too"
            ) from None
        jax.distributed.initialize(address, number, place)
    elif os.environ.get("RAIN_JAX_DISTRIBUTED") == "1":
        jax.distributed.initialize()
    else:
        share_cores()
    try:
        jax.devices()
    except RuntimeError as error:  # JAX_PLATFORMS names what is not here
        raise UsageError(" ".join(str(error).split())) from None
