"""The type checker that conftest.py puts on every function of the package."""

import functools

import jax
from beartype import BeartypeConf, beartype

# As pyright and PEP 484 have it: an int is welcome where a float is asked for.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check_arrays_only(pytree: type) -> None:
    """Leaves a pytree's fields unchecked where its leaves are not arrays.

    JAX rebuilds pytrees through `__init__` with whatever it maps the leaves to: NumPy arrays, shapes, sentinels.
    """
    init = pytree.__init__

    @functools.wraps(init)
    def lenient(self, *args, **kwargs):
        arrays = all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((args, kwargs)))
        (init if arrays else init.__wrapped__)(self, *args, **kwargs)

    pytree.__init__ = lenient


def leave_to_itself(config: type) -> None:
    """Takes the type checker off a config, which refuses wrong types by its own, better message."""
    config.__init__ = config.__init__.__wrapped__
