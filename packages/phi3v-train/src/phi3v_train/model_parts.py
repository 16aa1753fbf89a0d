"""The parts of the model that users name, and which weights and layers they are.

    vision      CLIP                                model.vision_embed_tokens.img_processor
    projector   image projection and separators     model.vision_embed_tokens.{img_projection,*_GN}
    llm         everything else                     embedding, decoder layers, norm, lm_head

Users name parts, not modules: a list of module names that fits another model matches half of this
one and says nothing.
"""

from phi3v_train.config import Part
from phi3v_train.modeling_phi3_v import Phi3VForCausalLM

_VISION = "model.vision_embed_tokens.img_processor."
_PROJECTOR = "model.vision_embed_tokens."


def part_of(name: str) -> Part:
    """The part of the model that a parameter or module belongs to, by its official name."""
    if name.startswith(_VISION):
        return "vision"
    return "projector" if name.startswith(_PROJECTOR) else "llm"


def linear_layers(model: Phi3VForCausalLM, part: Part) -> str:
    """A regular expression over official module names: the linear layers of a part.

    As in the recipe: all linear layers of the decoder and its head, of CLIP without its last
    layer (which is never computed), and of the projection.
    """
    if part == "llm":
        return f"{DECODER_LINEARS}|lm_head"
    if part == "projector":
        return r"model\.vision_embed_tokens\.img_projection\.(0|2)"
    num_layers = len(model.model.vision_embed_tokens.img_processor.vision_model.encoder.layers)
    computed = "|".join(str(layer) for layer in range(num_layers - 1))
    return (
        r"model\.vision_embed_tokens\.img_processor\.vision_model\.encoder\.layers"
        rf"\.({computed})\.(self_attn\.(q_proj|k_proj|v_proj|out_proj)|mlp\.(fc1|fc2))"
    )


DECODER_LINEARS = (
    r"model\.layers\.\d+\.(self_attn\.(qkv_proj|o_proj)|mlp\.(gate_up_proj|down_proj))"
)
"""Official module names of the decoder's linear layers: 3.6 of the model's 4.1 billion weights."""
