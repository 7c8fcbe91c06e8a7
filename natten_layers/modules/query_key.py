"""From projected query and key heads to what attention takes: normalisation and rotation, fused or in PyTorch."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor, nn

from ..arguments import Call
from ..kernels.host.problem import QKPrep
from ..kernels.ops import attention as attention_ops
from ..kernels.ops import qk_prep as qk_prep_ops
from ..kernels.ops import qk_prep_attention as qk_prep_attention_ops
from ..kernels.ops.define import is_tracked
from ..operations import Impl, attend, takes_fused
from .base import is_plain
from .norm import RMSNorm, cosine_normalize, rms_normalize
from .rope import Angles, angles_of

__all__ = ["HeadNorm", "Pending", "attend_with_qk_prep", "call_watched", "normalize_and_rotate"]


class HeadNorm(NamedTuple):
    """Normalisation of every head by itself."""

    kind: Literal["cosine", "rms"]
    query_gain: Tensor | None  # cosine: one a head [Hq], None is 1; rms: one an element [D]
    key_gain: Tensor | None
    eps: float = 1e-6

    def apply(self, x: Tensor, gain: Tensor | None) -> Tensor:
        if self.kind == "cosine":
            return cosine_normalize(x, gain, self.eps)
        assert gain is not None
        return rms_normalize(x, gain, self.eps)


class Pending(NamedTuple):
    """Query and key heads, and what has yet to be done to them before they are multiplied."""

    query: Tensor
    key: Tensor
    norm: HeadNorm | None
    angles: Angles | None


def call_watched(
    query: Tensor,
    key: Tensor,
    norm: HeadNorm | tuple[nn.Module, nn.Module] | None,
    rope: nn.Module | None,
    positions: Tensor | None,
) -> Pending:
    """Leave normalisation and rotation to the kernels where their modules do what we know and nobody watches them.

    Otherwise, modules are called here: other classes than ours, and those that have hooks.

    Args:
        norm: of query and key: modules, or what to do.
        rope: called as ``rope(query, key, positions)``.
    """
    if norm is not None and not isinstance(norm, HeadNorm):
        described = _describe(*norm)
        if described is None:
            query, key = norm[0](query), norm[1](key)
        norm = described
    if rope is None:
        return Pending(query, key, norm, None)
    angles = angles_of(rope, query, key, positions)
    if angles is None:
        query, key = _rotated(rope, *normalize_and_rotate(query, key, norm, None), positions)
        norm = None
    return Pending(query, key, norm, angles)


def _rotated(rope: nn.Module, query: Tensor, key: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """What a module that only calling it can tell makes of query and key."""
    result = rope(query, key, positions)
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

    The fused form is one launch that reads the heads where they lie and writes contiguous ones, with one rounding to
    their dtype at the end; in PyTorch each step rounds. Neither changes its inputs.

    Args:
        norm, angles: None leaves that step out.
        impl: "auto" takes the fused kernel where attention takes its own; "fused" and "eager" never fall back.

    Raises:
        RuntimeError: ``impl="fused"`` where the kernel cannot run.
    """
    if norm is None and angles is None:
        return query, key
    if takes_fused(impl, query, lambda: _unsupported(query, key, angles)):
        return _fused(query, key, norm, angles)
    if norm is not None:
        query, key = norm.apply(query, norm.query_gain), norm.apply(key, norm.key_gain)
    return (query, key) if angles is None else angles.turn(query, key)


def _unsupported(query: Tensor, key: Tensor, angles: Angles | None) -> str | None:
    if angles is not None and (angles.positions.requires_grad or angles.freqs.requires_grad):
        return "positions or frequencies require a gradient"
    return attention_ops.unsupported(query, key)


def _fused(query: Tensor, key: Tensor, norm: HeadNorm | None, angles: Angles | None) -> tuple[Tensor, Tensor]:
    return qk_prep_ops.qk_prep(query, key, _rotation(query, norm, angles))


def _rotation(query: Tensor, norm: HeadNorm | None, angles: Angles | None) -> QKPrep:
    """What the operators take behind query and key."""
    positions = freqs = None
    query_gain, key_gain = (None, None) if norm is None else (norm.query_gain, norm.key_gain)
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
    """:func:`neighborhood_attention` of heads that :func:`normalize_and_rotate` prepares first; registers are ready.

    Where no gradient is asked for, this is one operation, and where the kernels can, one launch.

    Args:
        call: prepared arguments of attention, with heads as they are projected.
        rpb: a bias on relative positions, as :func:`neighborhood_attention` takes it.

    Raises:
        RuntimeError: ``impl="fused"`` where the kernels cannot run.
    """
    query, key = call.inputs.query, call.inputs.key
    if norm is not None or angles is not None:
        tracked = is_tracked((*call.inputs, *(norm or ()), *(angles or ())))
        if rpb is None and not tracked and takes_fused(impl, query, call.why_not_fused):
            return call.restore(
                qk_prep_attention_ops.attention(call.inputs, call.options, _rotation(query, norm, angles))
            )
        query, key = normalize_and_rotate(query, key, norm, angles, impl=impl)
    return attend(call._replace(inputs=call.inputs._replace(query=query, key=key)), impl, rpb)
