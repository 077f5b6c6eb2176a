"""Images to images, beside other libraries: JPEG, EDSR and RAIN.

A suite is a function that makes `Row`s, and its arguments are its section of the config. "With
gradient" is a forward pass, whose result is kept, and a backward pass to the image. Ours runs as an
evaluation does: each core of a CPU is a device and takes its share of the images.
"""

import importlib
import io
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from experiments.benching.clock import Program, Row, Side, cpus
from rain_jax.checks import one_of, within
from rain_jax.defences import rain as rain_defence
from rain_jax.image import jpeg as round_trip
from rain_jax.image import standard_tables
from rain_jax.models import upscalers
from rain_jax.parallel import AXIS, Devices, place
from rain_jax.types import Array, Key, Upscaler, Variables

Function = Callable[..., Array]


def jpeg(
    *, images: tuple[tuple[int, int], ...] = ((256, 32), (16, 224)), quality: int = 75
) -> list[Row]:
    """JPEG round trips of batches (how many, height and width), from floats to floats.

    Pillow encodes and decodes bytes, entropy coding included, on one core and without a gradient;
    its bytes are made of the floats beforehand. kornia's codec is 4:2:0 and rounds the quantiser
    alone, by the cubic function that ours takes here where there is a gradient. So its results, and
    its gradients more so, are near ours and not the same.
    """
    within("images", images, 1)
    within("quality", quality, 1, 100)
    tables, rows = standard_tables(quality), []
    for count, size in images:
        pixels = pictures(count, size)
        what = f"jpeg, {count} x {size}x{size}"

        def ours(subsampling: Any, rounding: Any, batch: Array, *tables: Array) -> Array:
            one = partial(round_trip, subsampling=subsampling, rounding=rounding)
            return jax.vmap(one, (0, None, None))(batch, *tables)

        arguments, split = (jnp.asarray(pixels), *tables), (True, False, False)
        for subsampling in "444", "420":
            peers = {"Pillow": partial(_pillow, pixels, quality, subsampling)}
            if subsampling == "420":
                peers["kornia"] = partial(_kornia, pixels, quality, None)
            hard = partial(ours, subsampling, "hard")
            rows.append(_row(f"{what}, {subsampling}", hard, arguments, split, peers, count))
        slope = direction(pixels.shape)
        rows.append(
            _row(
                f"{what}, 420, with gradient",
                partial(_with_gradient, partial(ours, "420", "cubic")),
                (jnp.asarray(slope), *arguments),
                (True, *split),
                {"kornia": partial(_kornia, pixels, quality, slope)},
                count,
            )
        )
    return rows


def edsr(
    *,
    networks: tuple[tuple[int, int], ...] = ((4, 32), (16, 64)),
    images: tuple[int, int] = (4, 48),
    compiled: bool = True,
) -> list[Row]:
    """EDSR of so many (blocks, channels), x2, on a batch of (how many, height and width).

    `compiled` has torch.compile as a peer too, where there is a gradient.
    """
    count, size = within("images", images, 1)
    pixels, rows = pictures(count, size), []
    for blocks, width in networks:
        network = upscalers.edsr(blocks=blocks, width=width)
        what = f"edsr {blocks} x {width}, {count} x {size}x{size}"
        variables = network.init(jax.random.key(0), jnp.asarray(pixels[0]))

        def ours(network: Upscaler, batch: Array, variables: Variables) -> Array:
            return jax.vmap(network.apply, (None, 0))(variables, batch)

        def twin(variables: Variables) -> Any:
            return _twins().edsr(jax.tree.map(np.asarray, variables))

        rows += _both_ways(
            what, partial(ours, network), pixels, (variables,), (False,), partial(twin, variables),
            scale=2, compiled=compiled,
        )  # fmt: skip
    return rows


def rain(
    *, blocks: int = 4, width: int = 32, images: tuple[int, int] = (8, 96), compiled: bool = False
) -> list[Row]:
    """RAIN around an EDSR of `blocks` and `width`, on a batch of (how many, height and width).

    Ours draws a shift for each image, the authors' code, as the peer has it, one for the batch.
    """
    count, size = within("images", images, 1)
    pixels = pictures(count, size)
    defence = rain_defence(upscalers.edsr(blocks=blocks, width=width))
    variables = defence.init(jax.random.key(0), jnp.asarray(pixels[0]))
    keys = jax.random.split(jax.random.key(1), count)

    def ours(batch: Array, variables: Variables, keys: Key) -> Array:
        return jax.vmap(defence.apply, (None, 0, 0))(variables, keys, batch)

    def twin() -> Any:
        return _twins().Rain(_twins().edsr(jax.tree.map(np.asarray, variables)))

    return _both_ways(
        f"rain, edsr {blocks} x {width}, {count} x {size}x{size}", ours, pixels, (variables, keys),
        (False, True), twin, scale=1, compiled=compiled, alike=False,
    )  # fmt: skip


def _both_ways(
    what: str,
    ours: Function,
    pixels: np.ndarray,
    arguments: tuple[Any, ...],
    split: tuple[bool, ...],
    twin: Callable[[], Any],
    *,
    scale: int,
    compiled: bool,
    alike: bool = True,
) -> list[Row]:
    """Without and with gradient, beside PyTorch; the result is `scale` times as high and wide."""
    batch, (count, height, width, channels) = jnp.asarray(pixels), pixels.shape
    slope = direction((count, scale * height, scale * width, channels))
    eager = {"PyTorch": partial(_torch, twin, pixels, None, False)}
    peers = {"PyTorch": partial(_torch, twin, pixels, slope, False)}
    if compiled:
        peers["torch.compile"] = partial(_torch, twin, pixels, slope, True)
    return [
        _row(what, ours, (batch, *arguments), (True, *split), eager, count, alike),
        _row(
            f"{what}, with gradient", partial(_with_gradient, ours),
            (jnp.asarray(slope), batch, *arguments), (True, True, *split), peers, count, alike,
        ),
    ]  # fmt: skip


def _row(
    what: str,
    function: Function,
    arguments: tuple[Any, ...],
    split: tuple[bool, ...],
    peers: Any,
    images: int,
    alike: bool = True,
) -> Row:
    """A function of arguments that have a row for each image where `split` says so."""

    def ours() -> Program:
        devices = cores(images)
        mapped: Any = devices.map(
            lambda *given, axis_name: function(*given), inputs=split, outputs=True
        )
        # What `map` compiled remembers how it was traced; work is counted in another trace.
        return Program(mapped.__wrapped__, laid(arguments, split, devices))

    return Row(what, ours, peers, alike, images)


def laid(arguments: tuple[Any, ...], split: tuple[bool, ...], devices: Devices) -> tuple[Any, ...]:
    """The arguments as `Devices.map` takes them: rows shared out where `split`, else everywhere."""
    return tuple(
        jax.device_put(
            leaf, NamedSharding(devices.mesh, PartitionSpec(AXIS) if rows else PartitionSpec())
        )
        for leaf, rows in zip(arguments, split, strict=True)
    )


def cores(images: int) -> Devices:
    """As many cores of a CPU as share the images evenly; of others one device, as peers have."""
    found = jax.devices()
    count = len(found) if found[0].platform == "cpu" else 1
    return place("shard_map", found[: math.gcd(count, images)])


def pictures(count: int, size: int) -> np.ndarray:
    """[count, size, size, 3] in [0, 1], whole multiples of 1/255: smooth, with some noise."""
    draw = np.random.default_rng(0)
    place = np.linspace(0, 2 * np.pi, size, dtype=np.float32)
    row, column = place.reshape(1, size, 1, 1), place.reshape(1, 1, size, 1)
    tempo = draw.uniform(1, 4, (2, count, 1, 1, 3)).astype(np.float32)
    waves = np.sin(tempo[0] * row) * np.cos(tempo[1] * column)
    noise = draw.standard_normal((count, size, size, 3), np.float32)
    found = np.clip(0.5 + 0.3 * waves + 0.03 * noise, 0, 1)
    return np.round(255 * found).astype(np.float32) / 255


def direction(shape: tuple[int, ...]) -> np.ndarray:
    """What comes back from further up: the gradient of a loss with respect to the result."""
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def _with_gradient(function: Function, slope: Array, batch: Array, *rest: Any) -> Any:
    result, back = jax.vjp(lambda images: function(images, *rest), batch)
    return result, back(slope)[0]


# --- The peers, imported when they are made ---------------------------------------------------


def _twins() -> Any:
    return importlib.import_module("experiments.twins")


def _pillow(pixels: np.ndarray, quality: int, subsampling: str) -> Side:
    image = importlib.import_module("PIL.Image")
    known = one_of("subsampling", subsampling, ("444", "420"))
    options = dict(format="JPEG", quality=quality, subsampling={"444": 0, "420": 2}[known])
    levels = np.round(255 * pixels).astype(np.uint8)

    def one(picture: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        image.fromarray(picture).save(file, **options)
        return np.asarray(image.open(file))

    return Side(
        lambda: [one(picture) for picture in levels],
        lambda found: [np.stack(found).astype(np.float32) / 255],
    )


def _kornia(pixels: np.ndarray, quality: int, slope: np.ndarray | None) -> Side:
    torch = importlib.import_module("torch")
    codec = importlib.import_module("kornia.enhance").jpeg_codec_differentiable
    asked = torch.tensor([float(quality)], device=device_of(torch))
    return torch_side(lambda images: codec(images, asked), pixels, slope, channels_last=False)


def _torch(
    twin: Callable[[], Any], pixels: np.ndarray, slope: np.ndarray | None, compiled: bool
) -> Side:
    torch = importlib.import_module("torch")
    # The faster of the two layouts on CPU, and ours.
    module = twin().to(device_of(torch), memory_format=torch.channels_last)
    return torch_side(torch.compile(module) if compiled else module, pixels, slope)


def torch_side(
    function: Callable[[Any], Any],
    pixels: np.ndarray,
    slope: np.ndarray | None,
    channels_last: bool = True,
) -> Side:
    """A function of images [B, C, H, W], with the gradient of <slope, result> if there is one."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(cpus())
    device = device_of(torch)
    wait, memory = waiting(torch)

    def there(array: np.ndarray) -> Any:
        moved = torch.tensor(array, device=device).permute(0, 3, 1, 2)
        return moved if channels_last else moved.contiguous()

    images = there(pixels)
    if slope is not None:
        images.requires_grad_()
        back = there(slope)

    def call() -> Any:
        with torch.set_grad_enabled(slope is not None):
            result = function(images)
        return [result] if slope is None else [result, *torch.autograd.grad(result, images, back)]

    def read(found: Any) -> list[np.ndarray]:
        return [np.moveaxis(tensor.detach().cpu().numpy(), 1, -1) for tensor in found]

    return Side(call, read, wait, memory)


def waiting(torch: Any) -> tuple[Callable[[Any], Any], Callable[[], int | None]]:
    """`Side.wait` and `Side.memory` of PyTorch, which counts bytes on a GPU alone, from now on."""
    if device_of(torch) == "cpu":
        return (lambda found: found), (lambda: None)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()

    def wait(found: Any) -> Any:
        torch.cuda.synchronize()
        return found

    return wait, lambda: torch.cuda.max_memory_allocated() - before


def device_of(torch: Any) -> str:
    """Where ours runs, if PyTorch can be there too."""
    return "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
