"""The type checker that conftest.py puts on every function of the package."""

from beartype import BeartypeConf, beartype

# As pyright and PEP 484 have it: an int is welcome where a float is asked for.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
