"""The names that NATTEN's callers import from ``natten.utils``."""

from . import varlen

__all__ = ["varlen"]
