"""The name that NATTEN's callers import from ``natten.utils.varlen``."""

from ..natten.dense import generate_varlen_parameters

__all__ = ["generate_varlen_parameters"]
