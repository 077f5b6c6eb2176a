"""PyTorch state dictionaries in the published layouts: same logits, and refusals by name."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from rain_jax import models
from rain_jax.checks import UsageError
from rain_jax.models import imports

torch = pytest.importorskip("torch", reason="PyTorch is not installed: see the extra `torch`")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


def conv(ins, outs, size=3, stride=1, pad=None):
    return nn.Conv2d(ins, outs, size, stride, size // 2 if pad is None else pad, bias=False)


class Residual(nn.Module):
    """ResNet's block: kuangliu's and RobustBench's `shortcut`, torchvision's `downsample`."""

    def __init__(self, ins, width, stride, wide, shortcut):
        super().__init__()
        outs = 4 * width if wide else width
        shapes = [(ins, width, 3, stride), (width, outs, 3, 1)]
        if wide:
            shapes = [(ins, width, 1, 1), (width, width, 3, stride), (width, outs, 1, 1)]
        self.layers = len(shapes)
        for number, shape in enumerate(shapes, 1):
            setattr(self, f"conv{number}", conv(*shape))
            setattr(self, f"bn{number}", nn.BatchNorm2d(shape[1]))
        self.named = shortcut
        if stride != 1 or ins != outs:
            setattr(self, shortcut, nn.Sequential(conv(ins, outs, 1, stride), nn.BatchNorm2d(outs)))

    def forward(self, x):
        y = x
        for number in range(1, self.layers + 1):
            y = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(y))
            y = functional.relu(y) if number < self.layers else y
        return functional.relu(y + getattr(self, self.named, nn.Identity())(x))


class ResNet(nn.Module):
    def __init__(self, depths, wide, shortcut="shortcut", classifier="linear", imagenet=False):
        super().__init__()
        self.imagenet = imagenet
        self.conv1 = conv(3, 64, 7, 2) if imagenet else conv(3, 64)
        self.bn1 = nn.BatchNorm2d(64)
        ins = 64
        for group, depth in enumerate(depths):
            blocks = []
            for place in range(depth):
                stride = 2 if group and not place else 1
                blocks.append(Residual(ins, 64 << group, stride, wide, shortcut))
                ins = (64 << group) * (4 if wide else 1)
            setattr(self, f"layer{group + 1}", nn.Sequential(*blocks))
        self.named = classifier
        setattr(self, classifier, nn.Linear(ins, 7))

    def forward(self, x):
        x = functional.relu(self.bn1(self.conv1(x)))
        x = functional.max_pool2d(x, 3, 2, 1) if self.imagenet else x
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return getattr(self, self.named)(x.mean((2, 3)))


class PreActBlock(nn.Module):
    def __init__(self, ins, outs, stride, raw):
        super().__init__()
        self.raw = raw
        self.bn1, self.conv1 = nn.BatchNorm2d(ins), conv(ins, outs, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outs), conv(outs, outs)
        if stride != 1 or ins != outs:
            self.shortcut = nn.Sequential(conv(ins, outs, 1, stride))

    def forward(self, x):
        ready = functional.relu(self.bn1(x))
        y = self.conv2(functional.relu(self.bn2(self.conv1(ready))))
        return y + (self.shortcut(x if self.raw else ready) if hasattr(self, "shortcut") else x)


class PreActResNet(nn.Module):
    """kuangliu's; RobustBench's with `raw` shortcuts or with `bn`, and `mu` and `sigma`."""

    def __init__(self, width, raw=False, last=False, pixels=False):
        super().__init__()
        self.conv1 = conv(3, width)
        ins = width
        for group in range(4):
            outs = width << group
            self.add_module(
                f"layer{group + 1}",
                nn.Sequential(
                    PreActBlock(ins, outs, 2 if group else 1, raw),
                    PreActBlock(outs, outs, 1, raw),
                ),
            )
            ins = outs
        if last:
            self.bn = nn.BatchNorm2d(ins)
        self.linear = nn.Linear(ins, 7)
        self.register_buffer("mu", torch.tensor(MEAN).view(1, 3, 1, 1) if pixels else None)
        self.register_buffer("sigma", torch.tensor(STD).view(1, 3, 1, 1) if pixels else None)

    def forward(self, x):
        x = x if self.mu is None else (x - self.mu) / self.sigma
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        x = functional.relu(self.bn(x)) if hasattr(self, "bn") else x
        return self.linear(x.mean((2, 3)))


class WideBlock(nn.Module):
    def __init__(self, ins, outs, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(ins), conv(ins, outs, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outs), conv(outs, outs)
        self.convShortcut = conv(ins, outs, 1, stride) if ins != outs else None

    def forward(self, x):
        ready = functional.relu(self.bn1(x))
        y = self.conv2(functional.relu(self.bn2(self.conv1(ready))))
        return y + (self.convShortcut(ready) if self.convShortcut is not None else x)


class WideGroup(nn.Module):
    def __init__(self, blocks, name="layer"):
        super().__init__()
        self.add_module(name, nn.Sequential(*blocks))
        self.named = name

    def forward(self, x):
        return getattr(self, self.named)(x)


class WideResNet(nn.Module):
    """RobustBench's, after TRADES, with the group that is there and never used."""

    def __init__(self, width, sub_block=True, bias=True):
        super().__init__()
        widths = [16, 16 * width, 32 * width, 64 * width]
        group = lambda g: WideGroup(
            [
                WideBlock(widths[g - 1], widths[g], 2 if g > 1 else 1),
                WideBlock(widths[g], widths[g], 1),
            ]
        )
        self.conv1 = conv(3, 16)
        self.block1, self.block2, self.block3 = group(1), group(2), group(3)
        if sub_block:
            self.sub_block1 = group(1)
        self.bn1, self.fc = nn.BatchNorm2d(widths[3]), nn.Linear(widths[3], 7, bias=bias)

    def forward(self, x):
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(functional.relu(self.bn1(x)).mean((2, 3)))


class DeepMindBlock(nn.Module):
    def __init__(self, ins, outs, stride):
        super().__init__()
        self.pads = (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1)
        self.batchnorm_0, self.conv_0 = nn.BatchNorm2d(ins), conv(ins, outs, 3, stride, 0)
        self.batchnorm_1, self.conv_1 = nn.BatchNorm2d(outs), conv(outs, outs)
        self.shortcut = conv(ins, outs, 1, stride) if ins != outs else None

    def forward(self, x):
        ready = functional.silu(self.batchnorm_0(x))
        y = self.conv_0(functional.pad(ready, self.pads))
        y = self.conv_1(functional.silu(self.batchnorm_1(y)))
        return y + (self.shortcut(ready) if self.shortcut is not None else x)


class DMWideResNet(nn.Module):
    def __init__(self, width):
        super().__init__()
        widths = [16, 16 * width, 32 * width, 64 * width]
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1))
        self.init_conv = conv(3, 16)
        self.layer = nn.Sequential(
            *(
                WideGroup([DeepMindBlock(widths[g], widths[g + 1], 2 if g else 1)], "block")
                for g in range(3)
            )
        )
        self.batchnorm, self.logits = nn.BatchNorm2d(widths[3]), nn.Linear(widths[3], 7)

    def forward(self, x):
        x = self.layer(self.init_conv((x - self.mean) / self.std))
        return self.logits(functional.silu(self.batchnorm(x)).mean((2, 3)))


class Normalize(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))

    def forward(self, x):
        return (x - self.mean) / self.std


def wrapped(model):
    return nn.Sequential(Normalize(), model)


def shaken(model):
    """Random weights and averages, so that nothing may be left out; evaluation mode."""
    torch.manual_seed(0)
    for name, value in model.state_dict().items():
        if name.endswith(("running_var", "weight")) and value.ndim == 1:
            value.uniform_(0.5, 1.5)
        elif name.endswith(("running_mean", "bias")):
            value.normal_(0, 0.1)
    return model.eval()


PIXELS = dict(mean=MEAN, std=STD)
PUBLISHED = {
    "kuangliu resnet18": (lambda: ResNet((2, 2, 2, 2), False), dict(name="resnet18"), {}),
    "kuangliu resnet50, wrapped": (
        lambda: wrapped(ResNet((3, 4, 6, 3), True)), dict(name="resnet50", **PIXELS), {}
    ),
    "torchvision resnet18": (
        lambda: ResNet((2, 2, 2, 2), False, "downsample", "fc", True),
        dict(name="resnet18"),
        dict(stem="imagenet"),
    ),
    "kuangliu preact": (
        lambda: PreActResNet(8),
        dict(name="preact_resnet", depths=(2, 2, 2, 2), width=8),
        dict(variant="kuangliu"),
    ),
    "fast": (
        lambda: PreActResNet(8, raw=True, pixels=True),
        dict(name="preact_resnet", depths=(2, 2, 2, 2), width=8, **PIXELS),
        dict(variant="fast"),
    ),
    "bn before fc": (
        lambda: PreActResNet(64, last=True, pixels=True),
        dict(name="preact_resnet", depths=(2, 2, 2, 2), width=64, variant="paper", **PIXELS),
        {},
    ),
    "trades": (
        lambda: WideResNet(2),
        dict(name="wide_resnet", depth=16, width=2, variant="paper"),
        {},
    ),
    "no bias, one wide": (
        lambda: WideResNet(1, False, False),
        dict(name="wide_resnet", depth=16, width=1, variant="paper"),
        {},
    ),
    "deepmind": (
        lambda: DMWideResNet(2),
        dict(name="wide_resnet", depth=10, width=2, variant="deepmind", **PIXELS),
        dict(activation="silu"),
    ),
}  # fmt: skip


def tree(leaves):
    return jax.tree.map(np.shape, leaves)


@pytest.mark.parametrize("which", PUBLISHED)
def test_imported_networks_have_the_logits_of_the_published_ones(which):
    make, section, told_elsewhere = PUBLISHED[which]
    theirs = shaken(make())
    # The prefix of training on several devices.
    state = {f"module.{name}": value for name, value in theirs.state_dict().items()}
    found = imports.resnet_from_torch(state)
    assert {k: v for k, v in found.network.items() if k not in PIXELS} == {
        k: v for k, v in section.items() if k not in PIXELS
    }
    for name in PIXELS.keys() & section.keys():
        np.testing.assert_allclose(found.network[name], section[name], atol=1e-6)
    assert found.classes == 7

    options = {k: v for k, v in found.network.items() if k != "name"} | told_elsewhere
    ours = getattr(models, section["name"])(7, **options)
    images = np.asarray(jax.random.uniform(jax.random.key(0), (2, 16, 16, 3)))
    expected = jax.eval_shape(ours.init, jax.random.key(0), images)
    assert tree(found.variables) == tree(expected)
    with torch.no_grad():
        logits = theirs(torch.tensor(np.moveaxis(images, -1, 1))).numpy()
    mine = jax.jit(lambda v, x: ours.apply(v, x)[0])(found.variables, images)
    assert np.std(logits) > 0.01
    np.testing.assert_allclose(mine, logits, atol=1e-4 * max(1.0, np.abs(logits).max()))


def robustbench(file):
    """A file of the real package, by itself: as a whole it wants torchvision."""
    spec = importlib.util.find_spec("robustbench")
    if spec is None:
        pytest.skip("robustbench is not installed")
    path = Path(spec.submodule_search_locations[0]) / "model_zoo" / "architectures" / f"{file}.py"
    found = importlib.util.spec_from_file_location(f"robustbench_{file}", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("file", "make", "told_elsewhere"),
    [
        ("resnet", lambda m: m.ResNet18(), {}),
        ("resnet", lambda m: m.PreActResNet18(), dict(variant="fast")),
        ("wide_resnet", lambda m: m.WideResNet(depth=16, widen_factor=2), {}),
        ("dm_wide_resnet",
         lambda m: m.DMWideResNet(depth=10, width=2, activation_fn=m.Swish, mean=MEAN, std=STD),
         dict(activation="silu", **PIXELS)),
        ("dm_wide_resnet", lambda m: m.DMWideResNet(depth=10, width=1, mean=MEAN, std=STD), PIXELS),
    ],
    ids=["resnet18", "preact_resnet18", "wide_resnet", "deepmind, swish", "deepmind"],
)  # fmt: skip
def test_networks_of_robustbench_itself_have_their_logits(file, make, told_elsewhere):
    # The activation, what a pixel is divided by and a variant are in its code, not in its files.
    theirs = shaken(make(robustbench(file)))
    found = imports.resnet_from_torch(theirs.state_dict())
    options = {k: v for k, v in found.network.items() if k != "name"} | told_elsewhere
    ours = getattr(models, found.network["name"])(found.classes, **options)
    images = np.asarray(jax.random.uniform(jax.random.key(0), (2, 32, 32, 3)))
    with torch.no_grad():
        logits = theirs(torch.tensor(np.moveaxis(images, -1, 1))).numpy()
    assert np.std(logits) > 0.01
    mine = jax.jit(lambda v, x: ours.apply(v, x)[0])(found.variables, images)
    np.testing.assert_allclose(mine, logits, atol=1e-4 * max(1.0, np.abs(logits).max()))


@pytest.mark.parametrize("pair", [("paper", "deepmind"), ("kuangliu", "fast")])
def test_variants_of_the_same_arrays_are_other_functions(pair):
    """So the arrays alone do not tell them apart, and who imports must say which it is."""
    images = jax.random.uniform(jax.random.key(0), (2, 16, 16, 3))
    first, second = (models.preact_resnet(5, width=4, variant=variant) for variant in pair)
    variables = first.init(jax.random.key(1), images)
    assert tree(variables) == tree(jax.eval_shape(second.init, jax.random.key(1), images))
    assert ("last_norm" in variables["params"]) is ("paper" in pair)
    change = first.apply(variables, images)[0] - second.apply(variables, images)[0]
    assert np.abs(change).max() > 1e-3


def test_other_variants_are_refused():
    with pytest.raises(UsageError, match="did you mean 'deepmind'"):
        models.preact_resnet(5, variant="deepmin")


def trades_state():
    return dict(WideResNet(1).state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("conv1.weight"), "no array 'conv1.weight' in it"),
        (lambda s: s.pop("block2.layer.1.bn2.running_var"), "'block2.layer.1.bn2.running_var'"),
        (lambda s: s.pop("block2.layer.0.convShortcut.weight"), "no array 'block2.layer.0.convSh"),
        (lambda s: s.pop("fc.weight"), "no array 'fc.weight'"),
        (lambda s: s.update({"head.weight": np.zeros(3)}), "'head.weight' has no place"),
        (lambda s: s.update({"bn1.bias": np.zeros(3)}), r"bn1.bias is \[3\]: expected \[64\]"),
        (lambda s: s.update({"fc.weight": np.zeros(7)}), r"fc.weight is \[7\]: expected \[7, 64\]"),
        (lambda s: s.update({"conv1.weight": np.zeros(3)}), "expected a kernel"),
        (lambda s: s.update({"0.fc.bias": np.zeros(7)}), "'0.fc.bias' and another"),
        (lambda s: s.clear(), "no array 'conv1.weight'"),
        (lambda s: s.pop("block1.layer.0.conv1.weight"), "no array 'block1.layer.0.conv1.weight'"),
    ],
)
def test_state_that_does_not_fit_is_refused_by_name(change, message):
    state = trades_state()
    change(state)
    with pytest.raises(UsageError, match=message):
        imports.resnet_from_torch(state)


def uneven():
    network = WideResNet(1, sub_block=False)
    network.block3 = WideGroup([WideBlock(32, 64, 2)])
    return network


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ResNet((1, 1, 1, 1), False),
            r"\(1, 1, 1, 1\) basic blocks: expected those of ResN",
        ),
        (uneven, r"\(2, 2, 1\) basic blocks of \[16, 32, 64\] channels: expected a pre-activation"),
    ],
)
def test_networks_that_ours_cannot_be_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        imports.resnet_from_torch(make().state_dict())
