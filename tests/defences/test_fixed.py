"""A form that a defence calls fixed draws nothing; the others of a random one do."""

import jax
import jax.numpy as jnp
import pytest

from rain_jax.defences import rain, shield
from rain_jax.models import upscalers

IMAGE = jax.random.uniform(jax.random.key(1), (16, 16, 3))
RANDOM = {
    "rain": lambda: rain(upscalers.bicubic(), reach=0.25),
    "shield": lambda: shield(qualities=(90, 10)),
}


@pytest.mark.parametrize("name", sorted(RANDOM))
def test_only_the_fixed_forms_draw_nothing(name):
    defence = RANDOM[name]()
    assert defence.fixed
    assert defence.fixed <= set(defence.surrogates)
    variables = defence.init(jax.random.key(0), IMAGE)
    keys = jax.random.split(jax.random.key(2), 8)
    for form, apply in defence.surrogates.items():
        seen = jax.vmap(lambda key, apply=apply: apply(variables, key, IMAGE))(keys)
        alike = bool(jnp.all(seen == seen[:1]))
        assert alike == (form in defence.fixed), form
