"""Checkpoints that outlive a kill, a full disk, a flipped byte and a change of devices."""

from rain_jax.checkpoints.store import Checkpoints

__all__ = ["Checkpoints"]
