"""Normalisation and RoPE of query and key heads before attention, fused into a kernel or in PyTorch."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from ..arguments import Call, with_bias
from ..explanation import Explanation, explain_call
from ..kernels.host.qk_prep import QKPrep
from ..kernels.ops import attention as attention_ops
from ..kernels.ops import qk_prep as qk_prep_ops
from ..kernels.ops import qk_prep_attention as qk_prep_attention_ops
from ..kernels.ops.transforms import is_differentiated, is_forward_mode, is_tracked
from ..operations import Impl, attend, takes_fused
from .base import is_plain
from .norm import RMSNorm, cosine_normalize, rms_normalize
from .rope import Angles, angles_of

__all__ = [
    "HeadNorm",
    "Heads",
    "Pending",
    "Prepared",
    "Projected",
    "attend_with_qk_prep",
    "call_watched",
    "explain_with_qk_prep",
    "normalize_and_rotate",
]


class HeadNorm(NamedTuple):
    """How each query and key head is normalised."""

    kind: Literal["cosine", "rms"]
    query_gain: Tensor | None  # cosine: per head [Hq]; rms: per element [D]; None means 1
    key_gain: Tensor | None
    eps: float = 1e-6

    def apply(self, x: Tensor, gain: Tensor | None) -> Tensor:
        if self.kind == "cosine":
            return cosine_normalize(x, gain, self.eps)
        return rms_normalize(x, _element_gain(x, gain), self.eps)


class Heads(NamedTuple):
    """Query, key and value heads in the layout that :func:`natten_layers.neighborhood_attention` takes."""

    query: Tensor  # [B, *tokens, Hq, D]
    key: Tensor  # [B, *tokens, Hkv, D]
    value: Tensor  # [B, *tokens, Hkv, D]


class Projected(NamedTuple):
    """Heads as they are projected, and the normalisation and RoPE that queries and keys still need."""

    heads: Heads
    norm: HeadNorm | None = None
    angles: Angles | None = None

    def prepared(self) -> Heads:
        """The heads, with queries and keys normalised and rotated."""
        query, key, value = self.heads
        return Heads(*normalize_and_rotate(query, key, self.norm, self.angles), value)


class Prepared(NamedTuple):
    """The arguments of :func:`attend_with_qk_prep`."""

    call: Call
    norm: HeadNorm | None = None
    angles: Angles | None = None
    rpb: Tensor | None = None


class Pending(NamedTuple):
    """Query and key heads, and the normalisation and RoPE that they still need; None where that step is done."""

    query: Tensor
    key: Tensor
    norm: HeadNorm | None
    angles: Angles | None


def _element_gain(x: Tensor, gain: Tensor | None) -> Tensor:
    """The gain of an RMS norm, whose kernels always read one."""
    return x.new_ones(x.shape[-1]) if gain is None else gain


def call_watched(
    query: Tensor,
    key: Tensor,
    norm: HeadNorm | tuple[nn.Module, nn.Module] | None,
    rope: nn.Module | None,
    positions: Tensor | None,
    **options: Any,
) -> Pending:
    """Call those normalisation and RoPE modules that cannot be fused, and describe the others for the kernels.

    A module is fused only if it is one of this library's classes and a call of it would run nothing else, such as
    hooks; otherwise it is called.

    Args:
        query: ``[B, *spatial, Hq, D]``.
        key: ``[B, *spatial, Hkv, D]``.
        norm: modules that normalise query and key, or the description of a normalisation.
        rope: module that is called as ``rope(query, key, positions, **options)``.
        positions: positions in the form that ``rope`` takes.

    Returns:
        Query and key after the called modules, and the steps that are left to the kernels.

    Raises:
        ValueError: ``rope`` does not return a query and a key of the shapes that it was given.
    """
    if norm is not None and not isinstance(norm, HeadNorm):
        described = _describe(*norm)
        if described is None:
            query, key = norm[0](query), norm[1](key)
        norm = described
    if rope is None:
        return Pending(query, key, norm, None)
    angles = angles_of(rope, query, key, positions, **options)
    if angles is None:
        query, key = _rotated(rope, *normalize_and_rotate(query, key, norm, None), positions, **options)
        norm = None
    return Pending(query, key, norm, angles)


def _rotated(
    rope: nn.Module, query: Tensor, key: Tensor, positions: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Call ``rope`` and check that it returns a query and a key of the same shapes."""
    result = rope(query, key, positions, **options)
    pair = isinstance(result, tuple | list) and len(result) == 2 and all(isinstance(x, Tensor) for x in result)
    if not pair or (result[0].shape, result[1].shape) != (query.shape, key.shape):
        found = [tuple(x.shape) if isinstance(x, Tensor) else x for x in result] if pair else type(result).__name__
        raise ValueError(
            f"{type(rope).__name__} as rope must return query and key rotated, of shapes {tuple(query.shape)} and "
            f"{tuple(key.shape)}; it returned {found}"
        )
    return result[0], result[1]


def _describe(q_norm: nn.Module, k_norm: nn.Module) -> HeadNorm | None:
    query, key = _rms_norm(q_norm), _rms_norm(k_norm)
    if query is None or key is None or query[1] != key[1]:
        return None
    return HeadNorm("rms", query[0], key[0], key[1])


def _rms_norm(norm: nn.Module) -> tuple[Tensor, float] | None:
    """Gain and eps of an RMS norm of ours or of torch's that may be fused; otherwise None."""
    if isinstance(norm, RMSNorm):
        plain, gain = is_plain(norm, RMSNorm.forward), norm.gain()
    elif isinstance(norm, nn.RMSNorm):
        plain, gain = is_plain(norm, nn.RMSNorm.forward) and len(norm.normalized_shape) == 1, norm.weight
    else:
        return None
    return (gain, norm.eps) if plain and gain is not None and norm.eps is not None else None


def normalize_and_rotate(
    query: Tensor, key: Tensor, norm: HeadNorm | None, angles: Angles | None, *, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """Normalise ``query [B, *spatial, Hq, D]`` and ``key [B, *spatial, Hkv, D]``, then rotate them.

    The fused kernel is one launch. It reads the heads with their strides, writes contiguous ones, and rounds to their
    dtype once, at the end; in PyTorch each step rounds. Neither changes its inputs.

    Args:
        norm: the normalisation; None leaves it out.
        angles: positions and frequencies of RoPE; None leaves it out.
        impl: "auto" uses the fused kernel where attention would use its own; "fused" and "eager" never fall back.

    Returns:
        Query and key, of the shapes and dtypes given.

    Raises:
        RuntimeError: ``impl="fused"`` and the kernel cannot run.
    """
    if norm is None and angles is None:
        return query, key
    if takes_fused(impl, query, lambda: _unsupported(query, key, angles)):
        return _fused(query, key, norm, angles)
    if norm is not None:
        query, key = norm.apply(query, norm.query_gain), norm.apply(key, norm.key_gain)
    return (query, key) if angles is None else angles.rotate(query, key)


def _unsupported(query: Tensor, key: Tensor, angles: Angles | None) -> str | None:
    if angles is not None and (angles.positions.requires_grad or angles.freqs.requires_grad):
        return "positions or frequencies require a gradient"
    return attention_ops.unsupported(query, key)


def _fused(query: Tensor, key: Tensor, norm: HeadNorm | None, angles: Angles | None) -> tuple[Tensor, Tensor]:
    return qk_prep_ops.qk_prep(query, key, _rotation(query, norm, angles))


def _rotation(query: Tensor, norm: HeadNorm | None, angles: Angles | None) -> QKPrep:
    """Gains, positions and frequencies in the form that the operators take."""
    positions = freqs = None
    query_gain, key_gain = (None, None) if norm is None else (norm.query_gain, norm.key_gain)
    if norm is not None and norm.kind == "rms":
        query_gain, key_gain = (_element_gain(query, gain) for gain in (query_gain, key_gain))
    if angles is not None:
        positions, freqs = angles.positions.contiguous(), angles.freqs.float().contiguous()
        if positions.ndim < query.ndim - 1:
            positions = positions[None]
    return QKPrep(
        None if query_gain is None else query_gain.contiguous(),
        None if key_gain is None else key_gain.contiguous(),
        positions,
        freqs,
        1.0 if angles is None else angles.factor,
        "none" if norm is None else norm.kind,
        0.0 if norm is None else norm.eps,
        () if angles is None else angles.split,
        angles is not None and angles.interleaved,
    )


def attend_with_qk_prep(
    call: Call, norm: HeadNorm | None, angles: Angles | None, rpb: Tensor | None = None, *, impl: Impl = "auto"
) -> Tensor:
    """Normalise and rotate query and key heads, then compute :func:`neighborhood_attention`.

    Without gradients this is one operation, and one launch where a kernel supports that. Register keys in ``call`` are
    expected to be normalised already.

    Args:
        call: prepared arguments of attention, with query and key heads as they are projected.
        norm: normalisation of query and key heads, or None.
        angles: positions and frequencies of RoPE, or None.
        rpb: a bias on relative positions, as :func:`neighborhood_attention` takes it, or None.
        impl: see :func:`normalize_and_rotate`.

    Returns:
        ``[B, *spatial, Hq, Dv]``.

    Raises:
        RuntimeError: ``impl="fused"`` and the kernels cannot run.
    """
    query, key = call.inputs.query, call.inputs.key
    if norm is not None or angles is not None:
        tracked = is_differentiated((*call.inputs, *(norm or ()), *(angles or ())))
        if rpb is None and not tracked and takes_fused(impl, query, call.why_not_fused):
            return call.restore(
                qk_prep_attention_ops.attention(call.inputs, call.options, _rotation(query, norm, angles))
            )
        query, key = normalize_and_rotate(query, key, norm, angles, impl=impl)
    return attend(call._replace(inputs=call.inputs._replace(query=query, key=key)), impl, rpb)


def explain_with_qk_prep(
    prepared: Prepared, needs_grad: bool | None, forward_mode: bool | None, device: str | None
) -> Explanation:
    """The kernels that :func:`attend_with_qk_prep` of these arguments takes, as :func:`natten_layers.explain` says."""
    call, norm, angles, rpb = prepared
    if needs_grad is None:
        needs_grad = is_tracked((*call.inputs, rpb, *(norm or ()), *(angles or ())))
    forward_mode = is_forward_mode() if forward_mode is None else forward_mode
    prep, inputs = None, call.inputs
    if norm is not None or angles is not None:
        if rpb is None and not needs_grad and not forward_mode:
            prep = _rotation(inputs.query, norm, angles).kind
        else:  # attention reads what the launch before it has written: contiguous tensors
            query, key = (x.new_empty(x.shape) for x in (inputs.query, inputs.key))
            call = call._replace(inputs=inputs._replace(query=query, key=key))
    return explain_call(
        with_bias(call, rpb), needs_grad=needs_grad, forward_mode=forward_mode, device=device, prep=prep
    )
