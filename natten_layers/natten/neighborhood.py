"""``na1d``, ``na2d``, ``na3d`` and the function of any number of axes behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypedDict, Unpack, cast, overload

from torch import Tensor

from ..geometry import normalise_axes
from ..operations import neighborhood_attention

__all__ = ["Axes", "Causal", "na1d", "na2d", "na3d", "neighborhood_attention_generic"]

Axes = int | Sequence[int]
Causal = bool | Sequence[bool]


class KernelOptions(TypedDict, total=False):
    """What chooses among NATTEN's kernels and never changes a result."""

    q_tile_shape: Sequence[int] | None
    kv_tile_shape: Sequence[int] | None
    backward_q_tile_shape: Sequence[int] | None
    backward_kv_tile_shape: Sequence[int] | None
    backward_kv_splits: Sequence[int] | None
    backward_use_pt_reduction: bool
    run_persistent_kernel: bool
    kernel_schedule: Any
    torch_compile: bool


class NeighborhoodOperation(Protocol):
    """What type checkers are told: ``return_lse`` decides what comes back."""

    __name__: str

    @overload
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: Axes,
        stride: Axes | None = 1,
        dilation: Axes | None = 1,
        is_causal: Causal | None = False,
        scale: float | Tensor | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        backend: str | None = None,
        *,
        return_lse: Literal[False] = False,
        **options: Unpack[KernelOptions],
    ) -> Tensor: ...
    @overload
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: Axes,
        stride: Axes | None = 1,
        dilation: Axes | None = 1,
        is_causal: Causal | None = False,
        scale: float | Tensor | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        backend: str | None = None,
        *,
        return_lse: Literal[True],
        **options: Unpack[KernelOptions],
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: Axes,
        stride: Axes | None = 1,
        dilation: Axes | None = 1,
        is_causal: Causal | None = False,
        scale: float | Tensor | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        backend: str | None = None,
        *,
        return_lse: bool,
        **options: Unpack[KernelOptions],
    ) -> Tensor | tuple[Tensor, Tensor]: ...


def _operation(name: str, rank: int | None) -> NeighborhoodOperation:
    def na(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: Axes,
        stride: Axes | None = 1,
        dilation: Axes | None = 1,
        is_causal: Causal | None = False,
        scale: float | Tensor | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        backend: str | None = None,
        q_tile_shape: Sequence[int] | None = None,
        kv_tile_shape: Sequence[int] | None = None,
        backward_q_tile_shape: Sequence[int] | None = None,
        backward_kv_tile_shape: Sequence[int] | None = None,
        backward_kv_splits: Sequence[int] | None = None,
        backward_use_pt_reduction: bool = False,
        run_persistent_kernel: bool = True,
        kernel_schedule: Any = None,
        torch_compile: bool = False,
        return_lse: bool = False,
    ) -> Any:
        """Neighborhood attention with NATTEN's arguments in NATTEN's order, for one number of spatial axes.

        See :func:`natten_layers.neighborhood_attention` for shapes, for the arguments from ``query`` to
        ``additional_values`` and for ``return_lse``. A ``scale`` of 0.0 counts, where NATTEN takes its default instead.
        None for ``stride``, ``dilation`` or ``is_causal`` is the default, as in NATTEN.

        The arguments from ``attention_kwargs`` to ``torch_compile`` choose among NATTEN's kernels and never change a
        result. They are accepted so that calls need no change, and have no effect here.

        Raises:
            ValueError: as :func:`natten_layers.neighborhood_attention`, and for a query of another rank.
        """
        if isinstance(query, Tensor) and query.ndim - 3 not in ((1, 2, 3) if rank is None else (rank,)):
            axes = "1 to 3" if rank is None else rank
            raise ValueError(
                f"{name} takes a query [B, {axes} spatial axes, heads, head_dim], got {tuple(query.shape)}"
            )
        arguments: dict[str, Any] = {
            "stride": 1 if stride is None else stride,
            "dilation": 1 if dilation is None else dilation,
            "is_causal": False if is_causal is None else is_causal,
            "scale": scale,
            "additional_keys": additional_keys,
            "additional_values": additional_values,
            "return_lse": return_lse,
        }
        # One entry per axis: a shorter tuple would make the last spatial axis one of KV heads.
        count = rank or (query.ndim - 3 if isinstance(query, Tensor) else 1)
        return neighborhood_attention(
            query, key, value, normalise_axes("kernel_size", kernel_size, count, int), **arguments
        )

    na.__name__ = na.__qualname__ = name
    # A cast, as a type checker thinks that options of other names may come.
    return cast(NeighborhoodOperation, na)


na1d = _operation("na1d", 1)
"""NATTEN's ``na1d``, for ``query [B, L, heads, head_dim]``: NATTEN's arguments in NATTEN's order."""
na2d = _operation("na2d", 2)
"""NATTEN's ``na2d``, for ``query [B, H, W, heads, head_dim]``: NATTEN's arguments in NATTEN's order."""
na3d = _operation("na3d", 3)
"""NATTEN's ``na3d``, for ``query [B, T, H, W, heads, head_dim]``: NATTEN's arguments in NATTEN's order."""
neighborhood_attention_generic = _operation("neighborhood_attention_generic", None)
"""NATTEN's operation for any of these numbers of axes, which the query tells."""
