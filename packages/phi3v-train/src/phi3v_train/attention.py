"""Attention, in the two shapes the model meets.

`varlen`   packed samples in one row, no padding: training.
`dense`    a padded batch with a mask, or one new token against a cache: generation and the
           Hugging Face call.

On a GPU of compute capability 8.0 and up, in fp16 or bf16, `varlen` is torch's own flash kernel:
no extra package, and no difference between fp16 and bf16. Elsewhere it is scaled dot product
attention, one segment at a time. flash-attn's kernel is not needed for either.
"""

import itertools
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> Tensor:
    """Causal attention within each segment of a packed row.

    Args:
        query: (T, heads, head_dim).
        key: (T, key heads, head_dim); heads is a multiple of key heads.
        value: like `key`.
        cu_seqlens: int32 (S + 1,), bounds of the segments, from 0 to T, on the tensors' device.
        max_seqlen: length of the longest segment.

    Returns:
        (T, heads, head_dim).
    """
    key, value = _expand_heads(query, key), _expand_heads(query, value)
    if _has_varlen_kernel(query):
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(
            query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **_causal_argument()
        )  # pyright: ignore[reportReturnType]
    bounds = cu_seqlens.tolist()
    segments = [
        F.scaled_dot_product_attention(
            query[start:stop].transpose(0, 1),
            key[start:stop].transpose(0, 1),
            value[start:stop].transpose(0, 1),
            is_causal=True,
        ).transpose(0, 1)
        for start, stop in itertools.pairwise(bounds)
    ]
    return torch.cat(segments)


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    implementation: str = "sdpa",
) -> Tensor:
    """Attention over a padded batch.

    Args:
        query: (B, heads, Tq, head_dim).
        key: (B, key heads, Tk, head_dim).
        value: like `key`.
        mask: bool, broadcastable to (B, heads, Tq, Tk), True where a key may be seen; None: all.
        implementation: `sdpa`, or `eager` for plain matrix products with a float32 softmax.

    Returns:
        (B, heads, Tq, head_dim).
    """
    if query.shape[1] != key.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    if implementation != "eager":
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ value


def _expand_heads(query: Tensor, key: Tensor) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    return key if repeats == 1 else key.repeat_interleave(repeats, dim=1)


def _has_varlen_kernel(query: Tensor) -> bool:
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


@cache
def _causal_argument() -> dict[str, Any]:
    """How this torch spells "causal": `is_causal` at first, a window with no right side now."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    parameters = inspect.signature(varlen_attn).parameters
    return {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
