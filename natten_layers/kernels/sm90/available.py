"""Whether this Triton has Gluon with the API for Hopper, in which the kernels of this folder are written."""

from importlib import import_module

_HOPPER = "triton.experimental.gluon.language.nvidia.hopper"
_API = {
    "triton.experimental.gluon": ("jit", "constexpr_function"),
    "triton.experimental.gluon.nvidia.hopper": ("TensorDescriptor",),
    _HOPPER: ("fence_async_shared", "mbarrier", "warpgroup_mma", "warpgroup_mma_wait"),
    f"{_HOPPER}.tma": ("async_copy_global_to_shared", "async_copy_shared_to_global", "store_wait"),
}
"""What the kernels import, by module."""


def gluon_gap() -> str | None:
    """Why the kernels of this folder cannot be imported with this Triton, or None if they can.

    Asked instead of trying to import them: an error in one of our own modules must be raised, and not be taken for a
    Triton without Gluon, which would select slower kernels without a word.
    """
    for name, members in _API.items():
        try:
            module = import_module(name)
        except ImportError:
            return f"this Triton has no {name}"
        for member in members:
            if not hasattr(module, member):
                return f"this Triton has no {name}.{member}"
    return None
