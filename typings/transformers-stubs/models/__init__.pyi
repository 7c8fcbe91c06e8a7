"""The models of transformers that are named in this repository: name others here, too.

The package's own list leads pyright into all of its models. Their types come from the package.
"""
# ruff: noqa: F403

from .auto import *
from .dinat import *
from .llama import *
