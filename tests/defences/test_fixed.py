"""A form that a defence calls fixed draws nothing; the others of a random one do."""

import jax
import numpy as np
import pytest

from rain_jax.defences import rain, shield
from rain_jax.models import upscalers

IMAGE = np.random.default_rng(1).uniform(size=(16, 16, 3)).astype(np.float32)
RANDOM = {
    "rain": lambda: rain(upscalers.bicubic(), reach=0.25),
    "shield": lambda: shield(qualities=(90, 10)),
}


@pytest.mark.parametrize("name", sorted(RANDOM))
def test_only_the_fixed_forms_draw_nothing(name):
    defence = RANDOM[name]()
    assert defence.fixed
    assert defence.fixed <= set(defence.surrogates)

    @jax.jit  # all forms in one program
    def seen_by(key, keys, image):
        variables = defence.init(key, image)
        forms = defence.surrogates.items()
        return {
            form: jax.vmap(apply, (None, 0, None))(variables, keys, image) for form, apply in forms
        }

    keys = jax.random.split(jax.random.key(2), 8)
    found = seen_by(jax.random.key(0), keys, IMAGE)
    assert set(found) == set(defence.surrogates)
    for form, seen in found.items():
        alike = np.all(np.asarray(seen) == np.asarray(seen)[:1])
        assert alike == (form in defence.fixed), form
