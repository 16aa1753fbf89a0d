"""The configuration of Phi-3-vision and Phi-3.5-vision, read from and written to the official file.

The official `config.json` asks for flash attention on every machine, calls its rotary embedding
by an old name (`rope_scaling.type: su`) and says nothing of the vision tower's size. Here the
attention request is dropped on load (the caller chooses), `su` is kept as it is, and an optional
`vision_config` object sizes the tower; absent, it is CLIP ViT-L/14-336.
"""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

CLIP_LARGE_14_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "num_channels": 3,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}

_COMPUTED = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "embd_layer.embedding_cls": "image",
    "embd_layer.hd_transform_order": "sub_glb",
    "embd_layer.projection_cls": "mlp",
    "embd_layer.use_hd_transform": True,
    "embd_layer.with_learnable_separator": True,
    "vision_config.hidden_act": "quick_gelu",
}
"""What the model computes whatever the file says; so the file may say nothing else."""

DEFAULT_IMAGE_TOKEN_ID = 32044
"""`<|image|>` in both published tokenizers."""


class Phi3VConfig(PreTrainedConfig):
    """Sizes and ids of the model; every field of the official `config.json` has its place.

    Fields are the official ones. Three are ours: `vision_config` (sizes of the vision tower),
    `image_token_id` (fills image slots in packed rows) and `rope_factors`, which holds
    `{"short_factor": [...], "long_factor": [...]}` of the official `rope_scaling`, each of length
    head_dim / 2, or None for plain rotary embedding.

    Raises:
        ValueError: a `rope_scaling` of another kind, factors of the wrong length, or a variant of
            the model that is not computed here (another activation, a sliding window ...).
    """

    model_type = "phi3_v"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 32064
    hidden_size: int = 3072
    intermediate_size: int = 8192
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    resid_pdrop: float | int = 0.0
    embd_pdrop: float | int = 0.0
    attention_dropout: float | int = 0.0
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    original_max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_factors: dict[str, Any] | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 32000
    pad_token_id: int | None = 32000
    sliding_window: int | None = None
    embd_layer: dict[str, Any] | None = None
    img_processor: dict[str, Any] | None = None
    vision_config: dict[str, Any] | None = None
    image_token_id: int = DEFAULT_IMAGE_TOKEN_ID

    def __post_init__(self, **kwargs: Any) -> None:
        """Normalise what the official file spells in its own way."""
        # The shipped file carries the author's choice for his machine; ours is made at load time.
        kwargs.pop("_attn_implementation", None)
        rope = kwargs.pop("rope_scaling", None) or kwargs.pop("rope_parameters", None)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self.vision_config = {**CLIP_LARGE_14_336, **(self.vision_config or {})}
        if rope is not None:
            kind = rope.get("type") or rope.get("rope_type")
            if kind not in ("su", "longrope"):
                raise ValueError(f"rope_scaling.type: expected su or longrope, got {kind!r}")
            self.rope_theta = rope.get("rope_theta", self.rope_theta)
            self.rope_factors = {
                name: [float(factor) for factor in rope[name]]
                for name in ("short_factor", "long_factor")
            }
        for name, factors in (self.rope_factors or {}).items():
            if len(factors) != self.head_dim // 2:
                raise ValueError(
                    f"rope_scaling.{name}: expected {self.head_dim // 2} factors "
                    f"(half of head_dim), got {len(factors)}"
                )
        self._refuse_other_variants()
        super().__post_init__(**kwargs)

    def _refuse_other_variants(self) -> None:
        for place, computed in _COMPUTED.items():
            section, _, name = place.rpartition(".")
            fields = (getattr(self, section) if section else vars(self)) or {}
            if fields.get(name, computed) != computed:
                raise ValueError(
                    f"config.json, {place}: expected {computed!r}, got {fields[name]!r}; this "
                    "model computes nothing else, so weights made for that would answer wrongly"
                )
        window, longest = self.sliding_window, self.max_position_embeddings
        if window is not None and window < longest:  # the published ones are as long or longer
            raise ValueError(
                f"config.json, sliding_window: expected null or at least max_position_embeddings "
                f"({longest}), got {window}; attention has no window here, so weights made for "
                "that would answer wrongly"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head of the language model."""
        return self.hidden_size // self.num_attention_heads

    def to_dict(self) -> dict[str, Any]:
        """The configuration as in the official file, without what transformers adds to all."""
        everyones = {*PreTrainedConfig().__dict__, "output_attentions"}
        output = {
            name: value
            for name, value in super().to_dict().items()
            if name not in everyones or name in type(self).__annotations__
        }
        factors = output.pop("rope_factors", None)
        output["rope_scaling"] = None if factors is None else {"type": "su", **factors}
        output["architectures"] = self.architectures or ["Phi3VForCausalLM"]
        if self.dtype is not None:
            # The older name is understood by every release; the published code reads no other.
            output["torch_dtype"] = str(self.dtype).removeprefix("torch.")
        if output.get("vision_config") == CLIP_LARGE_14_336:
            del output["vision_config"]
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        """All of it: the official file leaves no default out, and its readers count on that."""
        return self.to_dict()


AutoConfig.register(Phi3VConfig.model_type, Phi3VConfig, exist_ok=True)
