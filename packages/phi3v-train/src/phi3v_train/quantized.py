"""Weights in 4 bits and optimizer moments in 8, by bitsandbytes.

    quantize_decoder(model, torch.bfloat16)     # 7.2 GB of decoder layers become 1.9 GB

nf4 with double quantisation, as in the QLoRA paper (https://arxiv.org/abs/2305.14314): 4 bits a
weight, a scale for 64 of them, the scales in 8 bits. Only the decoder's linear layers: the head
decides the tokens, and CLIP and the projector are a tenth of the weights.

The only module that imports bitsandbytes. It has kernels for GPUs and for CPUs.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from phi3v_train.config import OptimConfig
from phi3v_train.model_parts import DECODER_LINEARS
from phi3v_train.modeling_phi3_v import Phi3VForCausalLM

BLOCK = 64
"""Weights that share a scale. A matrix holds whole blocks, or its kernels refuse it."""


def quantize_decoder(
    model: Phi3VForCausalLM, compute_dtype: torch.dtype, device: torch.device | None = None
) -> None:
    """Replace the decoder's linear layers by 4-bit ones, in place, one after the other.

    Args:
        model: on a CPU, a GPU, or the meta device (where nothing is computed).
        compute_dtype: of the products with them.
        device: where the 4-bit weights go; None: where the layers are.

    Raises:
        ValueError: a layer can't be cut into blocks.
    """
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    decoder = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.fullmatch(DECODER_LINEARS, name)
    ]
    for name, module in decoder:
        if module.in_features % BLOCK:
            raise ValueError(
                f"method.name=qlora: {name} has {module.in_features} inputs, and 4-bit weights "
                f"need a multiple of {BLOCK}; use method.name=lora"
            )
        with torch.device("meta"):
            layer = Linear4bit(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                compute_dtype=compute_dtype,
                compress_statistics=True,
                quant_type="nf4",
            )
        make: Any = Params4bit  # its __init__, as type checkers see it, is Module's
        weights = make(
            module.weight.data,
            requires_grad=False,
            compress_statistics=True,
            quant_type="nf4",
            module=layer,
        )
        target = device or module.weight.device
        # Moving is what quantises.
        layer.weight = weights if target.type == "meta" else weights.to(target)
        layer.bias = module.bias
        model.set_submodule(name, layer)
    marked: Any = model
    marked.is_loaded_in_4bit = True  # what PEFT asks before it wraps a 4-bit layer


def num_weights(parameter: nn.Parameter) -> int:
    """How many weights a parameter stands for: two a byte where it is in 4 bits."""
    state: Any = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def adamw8bit(groups: Iterable[dict[str, Any]], optim: OptimConfig) -> torch.optim.Optimizer:
    """AdamW with moments in 8 bits, a scale for 256 of them (https://arxiv.org/abs/2110.02861).

    Tensors of less than 4,096 weights keep theirs in float32.
    """
    from bitsandbytes.optim.adamw import AdamW8bit

    return AdamW8bit(
        list(groups),
        lr=optim.learning_rate,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
    )
