"""One random row through a model: are these two the same?

    before = probe(model)           # (T, vocab_size) float32
    ...
    difference = largest_difference(before, probe(merged))

A picture of noise and random tokens, always the same ones, so that every part of the model takes
part in every logit.
"""

import torch
from torch import Tensor

from phi3v_train.hd_transform import num_image_tokens
from phi3v_train.modeling_phi3_v import Phi3VForCausalLM

_NUM_TOKENS = 24
"""Of text, around the picture."""


def probe(model: Phi3VForCausalLM) -> Tensor:
    """Logits of the row, at every token: float32 (T, vocab_size), on the CPU.

    Args:
        model: on one device, in any dtype; its mode (training or evaluation) stays as it is.
    """
    random = torch.Generator().manual_seed(0)
    config = model.config
    text = torch.randint(3, min(config.vocab_size, 32000), (_NUM_TOKENS,), generator=random)
    text[text == config.image_token_id] = 3
    slots = torch.full((num_image_tokens(1, 1),), -1)
    ids = torch.cat([text[:4], slots, text[4:]])[None]
    crops = torch.randint(0, 256, (1, 3, 336, 336), generator=random, dtype=torch.uint8)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(
            input_ids=ids.to(device),
            pixel_values=crops.to(device),
            crop_grid=torch.ones(1, 2, dtype=torch.int64, device=device),
            use_cache=False,
        ).logits
    model.train(was_training)
    return logits[0].float().cpu()


def largest_difference(one: Tensor, other: Tensor) -> float:
    """The largest difference of two logits, as a share of the largest logit; NaN where one is."""
    scale = max(float(one.abs().max()), float(other.abs().max()), 1e-30)
    return float((one - other).abs().max()) / scale
