"""Attention, in the two shapes the model meets, by the implementation the user asks for.

                     varlen: packed samples, no padding       dense: a padded batch with a mask,
                     (training)                               or new tokens against a cache
    sdpa             torch's varlen kernel where there is     scaled dot product attention
     (default)       one, else one segment at a time
    eager            matrix products, one segment at a time   matrix products
    flash_attention_2  flash-attn's varlen kernel             scaled dot product attention

torch's varlen kernel needs no package: a GPU of compute capability 8.0 and up, and fp16 or bf16
tensors. What counts is the dtype that arrives, not the one of the weights: float32 weights under
autocast get it too. flash-attn's kernel has no mask argument, and rows that end in different
places would have to be unpadded at every decoded token; SDPA runs the same kind of kernel there.
This is the only module that imports flash-attn, and only when it is asked for.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IMPLEMENTATIONS = ("sdpa", "eager", "flash_attention_2")
"""What `attn_implementation` may be."""

_HALF = (torch.float16, torch.bfloat16)


def check_implementation(name: str | None) -> str:
    """The implementation that a request means on this machine.

    Args:
        name: one of `IMPLEMENTATIONS`, or None for `sdpa`.

    Raises:
        ValueError: another name.
        ImportError: flash-attn was asked for and cannot be imported.
    """
    if name is None:
        return "sdpa"
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"attn_implementation: expected one of {', '.join(IMPLEMENTATIONS)}, got {name!r}"
        )
    if name == "flash_attention_2":
        _flash_attn_varlen()
    return name


def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    implementation: str = "sdpa",
) -> Tensor:
    """Causal attention within each segment of a packed row.

    Args:
        query: (T, heads, head_dim).
        key: (T, key heads, head_dim); heads is a multiple of key heads.
        value: like `key`.
        cu_seqlens: int32 (S + 1,), bounds of the segments, from 0 to T, on the tensors' device.
        max_seqlen: length of the longest segment.
        implementation: one of `IMPLEMENTATIONS`.

    Returns:
        (T, heads, head_dim).

    Raises:
        ValueError: `flash_attention_2` with tensors other than fp16 and bf16.
        ImportError: `flash_attention_2` without the package.
    """
    if implementation == "flash_attention_2":
        if query.dtype not in _HALF:
            raise ValueError(
                f"flash_attention_2: expected fp16 or bf16, got {query.dtype}; load the model in "
                "one of them, run it under autocast, or use sdpa"
            )
        kernel = _flash_attn_varlen()
        return kernel(
            query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=True
        )
    key, value = _expand_heads(query, key, dim=1), _expand_heads(query, value, dim=1)
    if implementation == "sdpa" and _has_varlen_kernel(query):
        from torch.nn.attention.varlen import varlen_attn

        # (-1, 0) is "causal" since torch 2.11; one and the same cu_seqlens, since torch 2.15 asks
        # for that before it takes cuDNN's kernel. It can be told to return a pair, hence the type.
        return varlen_attn(
            query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=(-1, 0)
        )  # pyright: ignore[reportReturnType]
    segments = [
        _causal(query[start:stop], key[start:stop], value[start:stop], implementation)
        for start, stop in itertools.pairwise(cu_seqlens.tolist())
    ]
    return torch.cat(segments)


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    is_causal: bool = False,
    implementation: str = "sdpa",
) -> Tensor:
    """Attention over a padded batch, over new tokens against a cache, or over patches.

    `flash_attention_2` means `sdpa` here; the module docstring says why.

    Args:
        query: (B, heads, Tq, head_dim).
        key: (B, key heads, Tk, head_dim).
        value: like `key`.
        mask: bool, broadcastable to (B, heads, Tq, Tk), True where a key may be seen; None: all.
        is_causal: without a mask and with Tq = Tk, each sees itself and what is before: no memory
            is spent on a mask, and the flash kernels take it.
        implementation: one of `IMPLEMENTATIONS`.

    Returns:
        (B, heads, Tq, head_dim).
    """
    assert mask is None or not is_causal
    key, value = _expand_heads(query, key, dim=-3), _expand_heads(query, value, dim=-3)
    if implementation == "eager":
        return _eager(query, key, value, _lower_triangle(query) if is_causal else mask)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal)


def _causal(query: Tensor, key: Tensor, value: Tensor, implementation: str) -> Tensor:
    """One segment: (n, heads, head_dim) three times -> (n, heads, head_dim)."""
    query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    if implementation == "eager":
        return _eager(query, key, value, _lower_triangle(query)).transpose(0, 1)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(0, 1)


def _lower_triangle(query: Tensor) -> Tensor:
    length = query.shape[-2]
    return torch.ones(length, length, dtype=torch.bool, device=query.device).tril()


def _eager(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    # Scaled before the product: an unscaled one can be beyond fp16's 65,504.
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ value


def _expand_heads(query: Tensor, key: Tensor, *, dim: int) -> Tensor:
    repeats = query.shape[dim] // key.shape[dim]
    return key if repeats == 1 else key.repeat_interleave(repeats, dim=dim)


def _has_varlen_kernel(query: Tensor) -> bool:
    return query.is_cuda and query.dtype in _HALF and _capability(query.device.index) >= (8, 0)


# Not an operation that torch.compile can put into a graph; it never changes either.
@torch.compiler.assume_constant_result
def _capability(device_index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device_index)


def _flash_attn_varlen() -> Any:
    try:
        from flash_attn import (  # pyright: ignore[reportMissingImports]
            flash_attn_varlen_func,
        )
    except ImportError as error:
        raise ImportError(
            "attn_implementation='flash_attention_2' needs the flash-attn package, which cannot "
            f"be imported ({error}). Install the extra: pip install 'phi3v-train[flash-attn]', "
            "or uv sync --extra flash-attn. Or leave attn_implementation out: the default, sdpa, "
            "uses the varlen flash kernel built into torch, in fp16 and bf16, without a package."
        ) from error
    return flash_attn_varlen_func
