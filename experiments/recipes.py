"""Sections that several configs begin with: a data set, a network of its statistics, the threat."""

from typing import Any

# Of the training images, per channel.
CIFAR10 = dict(mean=(0.4914, 0.4822, 0.4465), std=(0.2471, 0.2435, 0.2616))
STL10 = dict(mean=(0.4467, 0.4398, 0.4066), std=(0.2603, 0.2566, 0.2713))
EIGHT = dict(norm="linf", radius=8 / 255)


def cifar10_small(**network: Any) -> dict[str, Any]:
    """CIFAR-10 and a ResNet-8 of width 16, for two CPU cores; `network` adds to its section."""
    return dict(
        data=dict(name="tfds:cifar10", holdout=1000),
        augment=dict(crop_padding=4, flip=True),
        network=dict(name="preact_resnet", depths=(1, 1, 1), width=16, **CIFAR10, **network),
        threat=EIGHT,
    )


def stl10_small(crop_padding: int) -> dict[str, Any]:
    """The cut of STL-10's labelled training images that `prepare` makes, and a ResNet-10."""
    return dict(
        data=dict(name="tfds:stl10_part", holdout=300),
        augment=dict(crop_padding=crop_padding, flip=True),
        network=dict(name="preact_resnet", depths=(1, 1, 1, 1), width=16, **STL10),
        threat=EIGHT,
    )
