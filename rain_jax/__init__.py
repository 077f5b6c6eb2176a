"""Adversarially robust image classification in JAX: train, defend and measure honestly.

Start at `types`, the words that everything here uses. `attacks`, `methods` and `models` are
registries: what their `__all__` names can be named in a config.
"""

__version__ = "0.1.0"
