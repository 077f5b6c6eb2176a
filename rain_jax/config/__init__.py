"""From a config to the objects that it describes, checked before anything is compiled.

A config file's `get_config` returns `config(**sections)`. `build.experiment` makes the objects:
`schema` turns a section into a call of the library, `options` has the sections that are no such
call, `tree` completes a config by its defaults, `networks`, `attack_columns` and `corrupted` make
what their names say, and `dry_run` traces all of it on the shapes of its data.
"""

from rain_jax.config.tree import config

__all__ = ["config"]
