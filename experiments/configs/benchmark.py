"""All that is measured, and beside whom: PyTorch, torchattacks, Pillow, kornia.

python -m experiments.benchmark --config=experiments/configs/benchmark.py --workdir=DIR
python -m experiments.benchmark --config=experiments/configs/benchmark.py:gpu --workdir=DIR
python -m experiments.benchmark --config=experiments/configs/benchmark.py:methods --workdir=DIR
python -m experiments.benchmark --config=experiments/configs/benchmark.py --config.suite=steps
"""

from typing import Any

FEW = ("natural", "pgd")
ALL = ("natural", "pgd", "trades", "sense", "fast")
EVERY = (*ALL, "mart", "fat", "n_fgsm", "grad_align", "free", "awp", "rat", "afd")


def get_config(size: str = "cpu") -> dict[str, Any]:
    """Sizes for two CPU cores, where all suites together take minutes, or for a "gpu".

    "methods" is one training step of every method here, on TRADES's CNN at two cores' size.
    The published EDSR is (16, 64), that of our CPU runs (4, 32). WRN-28-10 compiles for minutes on
    CPU: --config.compile.networks="('wrn_28_10',)" --config.compile.batch_sizes="(4,)".
    """
    if size == "gpu":
        return _gpu()
    if size == "methods":
        step = dict(networks=("small_cnn",), batch_sizes=(64,), methods=(EVERY,))
        return dict(suite="steps", rounds=7, seconds=0.2, profile=False, steps=step)
    return dict(
        suite="all",
        rounds=7,
        seconds=0.2,
        profile=False,
        checkpoint=dict(model="resnet18"),
        compile=dict(networks=("small_cnn", "resnet18"), batch_sizes=(64, 8)),
        data=dict(images=((64, 32), (8, 224)), workers=0),
        dispatch=dict(model="small_cnn", batch_size=16, methods=FEW, count=8),
        edsr=dict(networks=((4, 32), (16, 64)), images=(4, 48)),
        evaluation=dict(
            model="small_cnn",
            images=32,
            pgd_steps=40,
            apgd_steps=100,
            standard_steps=10,
            standard_queries=200,
        ),
        jpeg=dict(images=((256, 32), (16, 224)), quality=75),
        peak=dict(size=1024, megabytes=64),
        rain=dict(blocks=4, width=32, images=(8, 96)),
        steps=dict(networks=("small_cnn", "resnet18"), batch_sizes=(64, 8), methods=(ALL, FEW)),
        sweep=dict(model="small_cnn", images=16, draws=2, steps=20),
    )


def _gpu() -> dict[str, Any]:
    networks, batch_sizes = ("small_cnn", "resnet18", "wrn_28_10"), (1024, 512, 256)
    return dict(
        suite="all",
        rounds=7,
        seconds=1.0,
        profile=False,
        checkpoint=dict(model="wrn_28_10"),
        compile=dict(networks=networks, batch_sizes=batch_sizes, dtype="bfloat16"),
        data=dict(images=((512, 32), (256, 224)), workers=8, dtype="bfloat16"),
        dispatch=dict(model="small_cnn", batch_size=128, methods=FEW, count=32, dtype="bfloat16"),
        edsr=dict(networks=((4, 32), (16, 64)), images=(32, 48)),
        evaluation=dict(
            model="resnet18",
            images=1000,
            pgd_steps=40,
            apgd_steps=100,
            standard_steps=100,
            standard_queries=5000,
        ),
        jpeg=dict(images=((4096, 32), (256, 224)), quality=75),
        peak=dict(size=8192, megabytes=2048),
        rain=dict(blocks=16, width=64, images=(64, 96)),
        steps=dict(
            networks=networks, batch_sizes=batch_sizes, methods=(ALL, ALL, FEW), dtype="bfloat16"
        ),
        sweep=dict(model="resnet18", images=256, draws=4, steps=20),
    )
