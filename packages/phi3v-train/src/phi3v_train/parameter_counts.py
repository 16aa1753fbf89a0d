"""How many weights the model has, by part, from its sizes alone.

    counts = count_parameters(Phi3VConfig(), MethodConfig(name="lora"))
    counts.total["llm"]         # 3_821_079_552
    counts.adapters             # of the adapters; 0 in full training
    counts.trained              # all that train: adapters, or the weights themselves

Arithmetic, so that memory can be predicted before a model is there to be counted; the tests
compare it with the model.
"""

from dataclasses import dataclass

from phi3v_train.config import MethodConfig, Part
from phi3v_train.configuration_phi3_v import Phi3VConfig

PARTS: tuple[Part, ...] = ("vision", "projector", "llm")


@dataclass(frozen=True, slots=True)
class Linears:
    """Equal linear layers."""

    inputs: int
    outputs: int
    count: int = 1

    @property
    def num_weights(self) -> int:
        """Of their matrices, biases not counted."""
        return self.inputs * self.outputs * self.count


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Weights of a model that a method makes ready to train."""

    total: dict[Part, int]
    """Of the model itself, by part, with what is never computed."""

    never_computed: int
    """Of CLIP's last layer and the norm behind it, which are part of `vision` and never train."""

    linear: dict[Part, int]
    """In linear layers and so in matrix products, by part."""

    decoder_linear: int
    """In the decoder's linear layers: what QLoRA keeps in 4 bits."""

    largest_layer: int
    """Of one decoder layer or one CLIP layer, whichever has more."""

    outside_layers: int
    """Of what is in no layer: embeddings, head, projector, norms."""

    own: int
    """Of the model's own weights that train."""

    adapters: int
    """Of the adapters."""

    @property
    def trained(self) -> int:
        """All that train."""
        return self.own + self.adapters

    @property
    def model(self) -> int:
        """The model's own weights, all parts."""
        return sum(self.total.values())


def linear_layers(config: Phi3VConfig) -> dict[Part, tuple[Linears, ...]]:
    """The linear layers that adapters are put on, by part: all but those never computed."""
    clip = config.vision_config
    heads = config.num_attention_heads
    kv_heads = config.num_key_value_heads
    assert clip is not None
    assert kv_heads is not None
    width, mlp, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    attention = heads * config.head_dim
    clip_width, clip_mlp = clip["hidden_size"], clip["intermediate_size"]
    clip_layers = clip["num_hidden_layers"] - 1
    return {
        "vision": (
            Linears(clip_width, clip_width, 4 * clip_layers),
            Linears(clip_width, clip_mlp, clip_layers),
            Linears(clip_mlp, clip_width, clip_layers),
        ),
        "projector": (Linears(4 * clip_width, width), Linears(width, width)),
        "llm": (
            Linears(width, attention + 2 * kv_heads * config.head_dim, layers),
            Linears(attention, width, layers),
            Linears(width, 2 * mlp, layers),
            Linears(mlp, width, layers),
            Linears(width, config.vocab_size),  # the head
        ),
    }


def count_parameters(config: Phi3VConfig, method: MethodConfig) -> ParameterCounts:
    """Count the weights of a model and those that a method trains.

    Args:
        config: sizes of the model.
        method: what trains.
    """
    clip = config.vision_config
    assert clip is not None
    linears = linear_layers(config)
    linear: dict[Part, int] = {p: sum(kind.num_weights for kind in linears[p]) for p in PARTS}
    width, layers = config.hidden_size, config.num_hidden_layers
    embedding = config.vocab_size * width
    decoder_linear = linear["llm"] - embedding
    decoder_layer = decoder_linear // layers + 2 * width

    clip_width, clip_mlp, clip_layers = (
        clip[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    clip_layer = (
        4 * clip_width * (clip_width + 1)
        + 2 * clip_width * clip_mlp
        + clip_width
        + clip_mlp
        + 4 * clip_width
    )
    num_patches = (clip["image_size"] // clip["patch_size"]) ** 2
    clip_embeddings = clip_width * (
        1 + clip["num_channels"] * clip["patch_size"] ** 2 + num_patches + 1
    )
    norm = 2 * clip_width
    total: dict[Part, int] = {
        "vision": clip_embeddings + clip_layers * clip_layer + 2 * norm,
        "projector": linear["projector"] + 2 * width + 2 * 4 * clip_width,
        "llm": layers * decoder_layer
        + width
        + embedding * (1 if config.tie_word_embeddings else 2),
    }
    never = clip_layer + norm
    return ParameterCounts(
        total=total,
        never_computed=never,
        linear=linear,
        decoder_linear=decoder_linear,
        largest_layer=max(decoder_layer, clip_layer),
        outside_layers=sum(total.values()) - layers * decoder_layer - clip_layers * clip_layer,
        own=sum(total[p] - (never if p == "vision" else 0) for p in method.full_parts),
        adapters=sum(
            method.lora.rank * (kind.inputs + kind.outputs) * kind.count
            for part in method.adapter_parts
            for kind in linears[part]
        ),
    )
