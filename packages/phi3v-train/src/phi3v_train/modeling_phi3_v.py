"""Phi-3-vision and Phi-3.5-vision: CLIP ViT-L/14-336, a projector, and a Phi-3-mini decoder.

    crops (C, 3, 336, 336) ──► vision tower, 23 of 24 layers ──► (C, 576, 1024)
                                       │ 2 x 2 patches merge, crops tile to the image,
                                       │ learned separators end rows and part local from global
                                       ▼
    ids (T,) ──► embedding ──► (T, 3072) ◄── projector ◄── image tokens (N, 4096)
                                  │
                                  ▼ 32 decoder layers, norm ──► (T, 3072) ──► lm_head, where needed

Two ways in, one set of functions behind them:

* `Phi3VForCausalLM.packed_loss(batch)`: a packed row of whole samples (see `collator`), uint8
  crops, logits only where a label is. Training.
* `Phi3VForCausalLM(input_ids=..., pixel_values=..., image_sizes=..., ...)`: the published model's
  call, with a padded batch, negative image ids and float views; `generate` works on it.

One departure from the published code, on purpose: it chooses the short or long rotary factors by
the padded length of the whole batch; here every sample has the factors of its own length, so that
neither padding nor neighbours change a result.

State-dict keys are the published checkpoint's. Its last vision layer and the norm behind it are
never computed (features are taken one layer earlier); they are kept, frozen, to be written again.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from phi3v_train import attention
from phi3v_train.chat import IGNORE_INDEX
from phi3v_train.collator import Batch
from phi3v_train.configuration_phi3_v import Phi3VConfig
from phi3v_train.hd_transform import CROP, IMAGE_MEAN, IMAGE_STD, num_image_tokens

_recompute = functools.partial(checkpoint, use_reentrant=False)
"""What gradient checkpointing calls layers with, unless transformers is asked for another way."""

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, query, key, value) -> attended values; each (..., heads, head_dim)."""


# --- pixels ---------------------------------------------------------------------------------------


def normalize_views(crops: Tensor, crop_grid: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Make the float views of the published processor from uint8 crops.

    Args:
        crops: uint8 (C, 3, 336, 336), local crops of all images in reading order.
        crop_grid: (rows, columns) of each image; the products sum to C.

    Returns:
        (global views (I, 3, 336, 336), local crops (C, 3, 336, 336)), float32. The global view is
        the bicubic down-sample, without antialiasing, of the *normalised* whole image.
    """
    mean = torch.tensor(IMAGE_MEAN, device=crops.device).view(1, 3, 1, 1)
    std = torch.tensor(IMAGE_STD, device=crops.device).view(1, 3, 1, 1)
    local = (crops.float() / 255 - mean) / std
    views: list[Tensor] = []
    start = 0
    for rows, columns in crop_grid:
        tiles = local[start : start + rows * columns].view(rows, columns, 3, CROP, CROP)
        whole = tiles.permute(2, 0, 3, 1, 4).reshape(1, 3, rows * CROP, columns * CROP)
        views.append(F.interpolate(whole, (CROP, CROP), mode="bicubic", align_corners=False))
        start += rows * columns
    return torch.cat(views) if views else local.new_zeros(0, 3, CROP, CROP), local


# --- vision tower ---------------------------------------------------------------------------------


class CLIPAttention(nn.Module):
    """Self-attention over the patches of one crop."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden: Tensor, implementation: str) -> Tensor:
        """(N, 577, H) -> (N, 577, H)."""
        query, key, value = (
            project(hidden).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )  # (N, heads, 577, head_dim)
        attended = attention.dense(query, key, value, None, implementation=implementation)
        return self.out_proj(attended.transpose(1, 2).flatten(-2))


class CLIPMLP(nn.Module):
    """Two linear layers with CLIP's quick GELU between them."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., H)."""
        hidden = self.fc1(hidden)
        return self.fc2(hidden * torch.sigmoid(1.702 * hidden))


class CLIPLayer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        width, eps = sizes["hidden_size"], sizes["layer_norm_eps"]
        self.self_attn = CLIPAttention(width, sizes["num_attention_heads"])
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.mlp = CLIPMLP(width, sizes["intermediate_size"])
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)

    def forward(self, hidden: Tensor, implementation: str) -> Tensor:
        """(N, 577, H) -> (N, 577, H)."""
        hidden = hidden + self.self_attn(self.layer_norm1(hidden), implementation)
        return hidden + self.mlp(self.layer_norm2(hidden))


class CLIPEmbeddings(nn.Module):
    """Patches to vectors, a class token in front, positions added."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        width, patch = sizes["hidden_size"], sizes["patch_size"]
        num_positions = (sizes["image_size"] // patch) ** 2 + 1
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.patch_embedding = nn.Conv2d(
            sizes["num_channels"], width, kernel_size=patch, stride=patch, bias=False
        )
        self.position_embedding = nn.Embedding(num_positions, width)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, 336, 336) -> (N, 577, H)."""
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (N, 576, H)
        first = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        tokens = torch.cat([first, patches], dim=1)
        # Looked up, not read from `.weight`: an offloaded weight is there only during the call.
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return tokens + self.position_embedding(places)


class CLIPEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CLIPLayer(sizes) for _ in range(sizes["num_hidden_layers"]))


class CLIPVisionTower(nn.Module):
    """CLIP's vision model up to the last layer but one, whose output Phi-3-vision reads."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        self.embeddings = CLIPEmbeddings(sizes)
        self.pre_layrnorm = nn.LayerNorm(sizes["hidden_size"], eps=sizes["layer_norm_eps"])
        self.encoder = CLIPEncoder(sizes)
        self.post_layernorm = nn.LayerNorm(sizes["hidden_size"], eps=sizes["layer_norm_eps"])
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func = _recompute
        for module in self.never_computed():
            module.requires_grad_(False)

    def never_computed(self) -> tuple[nn.Module, nn.Module]:
        """The last layer and the norm behind it: kept for the checkpoint's sake alone."""
        return self.encoder.layers[-1], self.post_layernorm

    def forward(self, pixels: Tensor, implementation: str = "sdpa") -> Tensor:
        """(N, 3, 336, 336) -> hidden states (N, 577, H), class token first."""
        hidden = self.pre_layrnorm(self.embeddings(pixels))
        checkpointing = self.gradient_checkpointing and self.training
        if checkpointing and any(p.requires_grad for p in self.encoder.layers[:-1].parameters()):
            # Reentrant checkpointing gives a layer no gradient when no input asks for one, as
            # behind frozen embeddings.
            hidden.requires_grad_()
        for layer in self.encoder.layers[:-1]:
            if checkpointing:
                hidden = self._gradient_checkpointing_func(layer, hidden, implementation)
            else:
                hidden = layer(hidden, implementation)
        return hidden


class CLIPVisionModel(nn.Module):
    """Holds the tower one level down, where the checkpoint has it."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        self.vision_model = CLIPVisionTower(sizes)


# --- image tokens ---------------------------------------------------------------------------------


class ImageEmbedding(nn.Module):
    """Views of images to the vectors that stand in the prompt for them."""

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__()
        sizes = config.vision_config
        assert sizes is not None
        merged = 4 * sizes["hidden_size"]
        self.img_processor = CLIPVisionModel(sizes)
        self.glb_GN = nn.Parameter(torch.zeros(1, 1, merged))
        """Between the local tokens and the global ones."""
        self.sub_GN = nn.Parameter(torch.zeros(1, 1, 1, merged))
        """At the end of each row of tokens."""
        self.img_projection = nn.Sequential(
            nn.Linear(merged, config.hidden_size),
            nn.GELU(),
            nn.Linear(config.hidden_size, config.hidden_size),
        )

    def forward(
        self,
        global_views: Tensor,
        local_crops: Tensor,
        crop_grid: Sequence[tuple[int, int]],
        implementation: str = "sdpa",
    ) -> Tensor:
        """Encode images.

        Args:
            global_views: float (I, 3, 336, 336), normalised.
            local_crops: float (C, 3, 336, 336), normalised; real ones only.
            crop_grid: (rows, columns) of each image.
            implementation: `sdpa` or `eager`.

        Returns:
            (N, hidden_size), N the sum of `num_image_tokens`; images in order, and within one:
            local rows, the separator, global rows ("sub_glb").
        """
        weight = self.img_processor.vision_model.embeddings.patch_embedding.weight
        views = torch.cat([global_views, local_crops]).to(weight.dtype)
        hidden = self.img_processor.vision_model(views, implementation)[:, 1:]  # (I + C, 576, H)
        num_images = len(global_views)
        merged = merge_patches(hidden)  # (I + C, 12, 12, 4 H)
        tokens: list[Tensor] = []
        start = num_images
        for image, (rows, columns) in enumerate(crop_grid):
            crops = merged[start : start + rows * columns]
            start += rows * columns
            tokens += [
                self._with_row_ends(tile_crops(crops, rows, columns)),
                self.glb_GN[0].to(merged.dtype),
                self._with_row_ends(merged[image]),
            ]
        return self.img_projection(torch.cat(tokens))

    def _with_row_ends(self, tokens: Tensor) -> Tensor:
        """(rows, columns, D) -> (rows * (columns + 1), D), the separator ending each row."""
        ends = self.sub_GN[0].to(tokens.dtype).expand(len(tokens), 1, -1)
        return torch.cat([tokens, ends], dim=1).flatten(0, 1)


def merge_patches(hidden: Tensor) -> Tensor:
    """Put 2 x 2 neighbouring patches into one vector: (N, 576, H) -> (N, 12, 12, 4 H)."""
    count, num_patches, width = hidden.shape
    side = math.isqrt(num_patches) // 2
    blocks = hidden.view(count, side, 2, side, 2, width).permute(0, 1, 3, 2, 4, 5)
    return blocks.reshape(count, side, side, 4 * width)


def tile_crops(crops: Tensor, rows: int, columns: int) -> Tensor:
    """Lay crops out as the image: (rows * columns, 12, 12, D) -> (12 rows, 12 columns, D)."""
    side, width = crops.shape[1], crops.shape[-1]
    tiles = crops.view(rows, columns, side, side, width).permute(0, 2, 1, 3, 4)
    return tiles.reshape(rows * side, columns * side, width)


# --- decoder --------------------------------------------------------------------------------------


class Phi3VRMSNorm(nn.Module):
    """Root mean square normalisation, computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., H), same dtype."""
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(hidden.dtype)


def rope_tables(config: Phi3VConfig, positions: Tensor, is_long: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, with the factors of each token's own sample.

    Args:
        config: of the model.
        positions: int64, any shape (...).
        is_long: bool, same shape: the token's sample exceeds `original_max_position_embeddings`.

    Returns:
        (cos, sin), float32 (..., head_dim), both scaled by the factor the model was trained with:
        sqrt(1 + ln(max / original) / ln(original)), for short and long samples alike.
    """
    device, dim = positions.device, config.head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.int64, device=device).float() / dim
    base = torch.pow(torch.tensor(config.rope_theta, device=device), exponents)  # (head_dim / 2,)
    scale = 1.0
    if config.rope_factors is None:
        frequencies = (1.0 / base).expand(*positions.shape, -1)
    else:
        short, long = (
            1.0 / (torch.tensor(config.rope_factors[name], device=device) * base)
            for name in ("short_factor", "long_factor")
        )
        frequencies = torch.where(is_long[..., None], long, short)
        original = config.original_max_position_embeddings
        stretch = config.max_position_embeddings / original
        if stretch > 1:
            scale = math.sqrt(1 + math.log(stretch) / math.log(original))
    angles = positions[..., None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos() * scale, angles.sin() * scale


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embedding to (..., heads, head_dim); tables are (..., head_dim)."""
    first, second = states.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (states * cos.unsqueeze(-2) + turned * sin.unsqueeze(-2)).to(states.dtype)


class Phi3VAttention(nn.Module):
    """Self-attention with fused query, key and value projection."""

    def __init__(self, config: Phi3VConfig, layer: int) -> None:
        super().__init__()
        assert config.num_key_value_heads is not None
        self.layer = layer
        self.head_dim = config.head_dim
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        width = self.head_dim * (self.num_heads + 2 * self.num_key_value_heads)
        self.qkv_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """(..., H) -> (..., H)."""
        heads = self.qkv_proj(hidden).unflatten(-1, (-1, self.head_dim))
        counts = (self.num_heads, self.num_key_value_heads, self.num_key_value_heads)
        query, key, value = heads.split(counts, dim=-2)
        attended = self._attend(attend, rotate(query, cos, sin), rotate(key, cos, sin), value)
        return self.o_proj(attended.flatten(-2))

    @torch.compiler.disable(recursive=True)
    def _attend(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # The one planned break in a compiled layer. What `attend` closes over (bounds of segments,
        # a mask, a cache) and the layer's number differ from call to call and layer to layer, and
        # each would be a reason to compile again; the kernel behind it gains nothing from a graph.
        return attend(self.layer, query, key, value)


class Phi3VMLP(nn.Module):
    """Gated SiLU, gate and up projection fused."""

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__()
        width = config.intermediate_size
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., H)."""
        gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Phi3VDecoderLayer(nn.Module):
    """One pre-norm decoder layer; tokens may be packed (T, H) or padded (B, T, H)."""

    def __init__(self, config: Phi3VConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Phi3VAttention(config, layer)
        self.mlp = Phi3VMLP(config)
        self.input_layernorm = Phi3VRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Phi3VRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """(..., H) -> (..., H)."""
        attended = self.self_attn(self.input_layernorm(hidden), cos, sin, attend)
        hidden = hidden + self.dropout(attended)
        return hidden + self.dropout(self.mlp(self.post_attention_layernorm(hidden)))


@dataclass(frozen=True, slots=True)
class ImageInputs:
    """Images on their way into the model, in the one form the model works on."""

    global_views: Tensor
    """float (I, 3, 336, 336), normalised."""
    local_crops: Tensor
    """float (C, 3, 336, 336), normalised."""
    crop_grid: list[tuple[int, int]]

    @property
    def num_tokens(self) -> int:
        """Image tokens of all images."""
        return sum(num_image_tokens(rows, columns) for rows, columns in self.crop_grid)

    @classmethod
    def from_crops(cls, crops: Tensor, crop_grid: Tensor) -> "ImageInputs":
        """From uint8 crops (C, 3, 336, 336) and their grids (I, 2)."""
        grid = [(int(rows), int(columns)) for rows, columns in crop_grid.tolist()]
        num_crops = sum(rows * columns for rows, columns in grid)
        if num_crops != len(crops):
            raise ValueError(
                f"crop_grid speaks of {num_crops} crops, pixel_values has {len(crops)}"
            )
        return cls(*normalize_views(crops, grid), grid)

    @classmethod
    def from_padded_views(cls, pixel_values: Tensor, image_sizes: Tensor) -> "ImageInputs":
        """From the published processor's output.

        Args:
            pixel_values: float (I, views, 3, 336, 336): global view, local crops, zero padding.
            image_sizes: int (I, 2), (height, width) of the padded images in pixels.
        """
        grid = [(int(h) // CROP, int(w) // CROP) for h, w in image_sizes.tolist()]
        if len(grid) != len(pixel_values):
            raise ValueError(f"image_sizes has {len(grid)} rows, pixel_values {len(pixel_values)}")
        for image, (rows, columns) in enumerate(grid):
            if rows * columns + 1 > pixel_values.shape[1]:
                raise ValueError(
                    f"image {image}: image_sizes needs {rows} x {columns} crops and a global view, "
                    f"pixel_values has {pixel_values.shape[1]} views"
                )
        local = [
            views[1 : 1 + rows * columns]
            for views, (rows, columns) in zip(pixel_values, grid, strict=True)
        ]
        return cls(pixel_values[:, 0], torch.cat(local), grid)


class Phi3VModel(nn.Module):
    """Embedding, images, decoder layers and the final norm."""

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.embed_dropout = nn.Dropout(config.embd_pdrop)
        self.vision_embed_tokens = ImageEmbedding(config)
        self.layers = nn.ModuleList(
            Phi3VDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = Phi3VRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func = _recompute

    def embed(self, input_ids: Tensor, is_image: Tensor, images: ImageInputs | None) -> Tensor:
        """Embed tokens and put image features into their slots.

        Args:
            input_ids: int64 (...); what stands in an image slot is not looked up.
            is_image: bool, same shape: the slots.
            images: what fills them, in reading order.

        Returns:
            (..., hidden_size).

        Raises:
            ValueError: as many slots as image tokens are needed.
        """
        hidden = self.embed_dropout(self.embed_tokens(input_ids.masked_fill(is_image, 0)))
        if images is None:
            return hidden
        features = self.vision_embed_tokens(
            images.global_views,
            images.local_crops,
            images.crop_grid,
            self.config._attn_implementation or "sdpa",
        )
        num_slots = int(is_image.sum())
        if num_slots != len(features):
            raise ValueError(
                f"the prompt has {num_slots} image slots, the {len(images.crop_grid)} images have "
                f"{len(features)} tokens; was the text encoded with another num_crops?"
            )
        return hidden.masked_scatter(is_image[..., None], features.to(hidden))

    def decode(
        self,
        hidden: Tensor,
        positions: Tensor,
        is_long: Tensor,
        attend: Attend,
        states: list[Tensor] | None = None,
    ) -> Tensor:
        """Run the decoder: (..., H) -> (..., H).

        Args:
            hidden: embedded tokens.
            positions: of `rope_tables`.
            is_long: of `rope_tables`.
            attend: attention over the tokens and what came before.
            states: gets each layer's input, then the result.
        """
        cos, sin = rope_tables(self.config, positions, is_long)
        cos, sin = cos.to(hidden.dtype), sin.to(hidden.dtype)
        for layer in self.layers:
            if states is not None:
                states.append(hidden)
            if self.gradient_checkpointing and self.training:
                hidden = self._gradient_checkpointing_func(layer, hidden, cos, sin, attend)
            else:
                hidden = layer(hidden, cos, sin, attend)
        hidden = self.norm(hidden)
        if states is not None:
            states.append(hidden)
        return hidden

    def packed(self, batch: Batch) -> Tensor:
        """Hidden states of a packed row: (T, hidden_size)."""
        implementation = self.config._attn_implementation or "sdpa"
        is_image = batch.input_ids == self.config.image_token_id
        if len(batch.crop_grid):
            images = ImageInputs.from_crops(batch.pixel_values, batch.crop_grid)
            hidden = self.embed(batch.input_ids, is_image, images)
        else:
            hidden = self.embed(batch.input_ids, is_image, None)
            if self.training:
                # A text-only row must give every vision tensor a gradient too (zero), or ranks
                # with and without images would reduce different sets of tensors.
                blank = batch.pixel_values.new_zeros(1, 3, CROP, CROP)
                idle = self.vision_embed_tokens(
                    *normalize_views(blank, [(1, 1)]), [(1, 1)], implementation
                )
                hidden = hidden + 0 * idle.sum().to(hidden.dtype)
        lengths = batch.cu_seqlens.diff()
        is_long = (lengths > self.config.original_max_position_embeddings).repeat_interleave(
            lengths, output_size=len(batch.input_ids)
        )

        def attend(_: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attention.varlen(
                query,
                key,
                value,
                batch.cu_seqlens,
                batch.max_seqlen,
                implementation=implementation,
            )

        return self.decode(hidden, batch.position_ids, is_long, attend)


class Phi3VPreTrainedModel(PreTrainedModel):
    """What transformers needs to know to load, save, place and quantise the model."""

    config_class = Phi3VConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = ["Phi3VDecoderLayer", "CLIPLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keys_to_ignore_on_load_unexpected = [
        r"model\.vision_embed_tokens\.wte\.weight",
        r".*\.position_ids$",
    ]

    def __init__(self, config: Phi3VConfig) -> None:
        # Before transformers looks at it: its own message does not name our extra, and where the
        # `kernels` package is installed it would download a kernel instead.
        config._attn_implementation = attention.check_implementation(config._attn_implementation)
        super().__init__(config)

    def set_attn_implementation(
        self, attn_implementation: str | dict[str, str], allow_all_kernels: bool = False
    ) -> None:
        """Choose the attention of a loaded model: `sdpa`, `eager` or `flash_attention_2`.

        Raises:
            ValueError: another name, or a dict (transformers' way to name parts of a model; here
                one choice holds for all of it).
            ImportError: flash-attn was asked for and cannot be imported.
        """
        if not isinstance(attn_implementation, str):
            raise ValueError(f"expected one name for the whole model, got {attn_implementation!r}")
        self.config._attn_implementation = attention.check_implementation(attn_implementation)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, CLIPEmbeddings):
            nn.init.normal_(module.class_embedding, std=std)
        elif isinstance(module, ImageEmbedding):
            nn.init.normal_(module.glb_GN, std=std)
            nn.init.normal_(module.sub_GN, std=std)


class Phi3VForCausalLM(Phi3VPreTrainedModel, GenerationMixin):
    """The model with its language head; see the module docstring for its two ways in."""

    accepts_loss_kwargs = True
    """Tells transformers' Trainer that `forward` takes `num_items_in_batch`."""

    def __init__(self, config: Phi3VConfig) -> None:
        super().__init__(config)
        self.model = Phi3VModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The one embedding table; the published code's second name for it is not kept."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding table."""
        assert isinstance(value, nn.Embedding)
        self.model.embed_tokens = value

    def packed_loss(self, batch: Batch) -> Tensor:
        """Sum of the cross entropies at the label positions of a packed row (scalar float32).

        A sum, not a mean: the trainer divides by the label tokens of the whole step, so that
        packing, accumulation and world size do not change the result.
        """
        hidden = self.model.packed(batch)
        targets = (batch.labels[1:] != IGNORE_INDEX).nonzero()[:, 0] + 1
        logits = self.lm_head(hidden[targets - 1]).float()
        return F.cross_entropy(logits, batch.labels[targets], reduction="sum")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        crop_grid: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """The published model's call: its arguments in its order, then three of ours by name.

        Args:
            input_ids: int64 (B, T). Image slots hold negative numbers (image n as `-n` repeated,
                as the processor makes them) or `config.image_token_id`.
            attention_mask: (B, T including the cache), non-zero where a token is real.
            position_ids: int64 (B, T); default: 0, 1, 2 ... after the cache.
            past_key_values: keys and values of earlier tokens.
            inputs_embeds: (B, T, hidden_size), instead of `input_ids`; text only.
            pixel_values: float (I, num_crops + 1, 3, 336, 336) with `image_sizes`, or uint8
                (C, 3, 336, 336) with `crop_grid`.
            image_sizes: int (I, 2): (height, width) of the padded images.
            labels: int64 (B, T), aligned with `input_ids`; -100 where no loss.
            use_cache: return keys and values.
            output_attentions: not offered; no attention used here returns its weights.
            output_hidden_states: return the input of every layer and the last norm's output.
            return_dict: False: a tuple of what is not None, in the order below.
            crop_grid: int (I, 2): (rows, columns) of local crops.
            logits_to_keep: compute logits for this many last positions only (0: all).
            num_items_in_batch: what the summed loss is divided by, instead of the number of
                labels in this batch; a trainer that accumulates gradients knows it.

        Returns:
            loss (mean over labels), logits (B, T or fewer, vocab_size), the cache, and the hidden
            states, (B, T, hidden_size) each, one more than layers.

        Raises:
            ValueError: images and image slots that don't match; attention weights asked for.
            TypeError: an argument of another name; the published model knows no others either,
                and a misspelt `pixel_values` must not become a model that sees no picture.
        """
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError(
                "output_attentions: attention weights are not kept (neither sdpa nor the flash "
                "kernels return them); expected False"
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected one of input_ids and inputs_embeds, got both or none")
        if past_key_values is not None and past_key_values.is_compileable:
            raise ValueError(
                "past_key_values: expected a cache that grows, got one of fixed length "
                f"({type(past_key_values).__name__}); leave cache_implementation at its default"
            )
        if inputs_embeds is not None and pixel_values is not None:
            raise ValueError(
                "expected no pixel_values beside inputs_embeds, which have no image slots; pass "
                "input_ids"
            )
        images = self._image_inputs(pixel_values, image_sizes, crop_grid)
        if input_ids is None:
            assert inputs_embeds is not None
            hidden = inputs_embeds
        else:
            is_image = input_ids < 0
            if images is not None:
                is_image = is_image | (input_ids == self.config.image_token_id)
            elif bool(is_image.any()):
                raise ValueError("the prompt has image slots, but no pixel_values were given")
            hidden = self.model.embed(input_ids, is_image, images)

        num_rows, num_new = hidden.shape[:2]
        cache = past_key_values
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = None if self.training else DynamicCache()
        num_past = cache.get_seq_length() if cache is not None else 0
        device = hidden.device
        if position_ids is None:
            position_ids = torch.arange(num_past, num_past + num_new, device=device)[None]
        position_ids = position_ids.expand(num_rows, -1)
        # Without padding a prompt is plainly causal, and one new token sees everything: neither
        # needs a mask, which grows with the square of the length.
        is_padded = attention_mask is not None and not bool((attention_mask != 0).all())
        is_causal = not is_padded and num_past == 0
        mask = None
        if is_padded or (num_past > 0 and num_new > 1):
            mask = causal_mask(num_new, num_past, attention_mask, device)

        lengths = sample_lengths(position_ids, attention_mask)
        limit = self.config.original_max_position_embeddings
        is_long = (lengths > limit)[:, None].expand(-1, num_new)
        implementation = self.config._attn_implementation or "sdpa"
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states: list[Tensor] | None = [] if output_hidden_states else None

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
            if cache is not None:
                key, value = cache.update(key, value, layer)
            # A layer may be on another device than the first.
            seen = None if mask is None else mask.to(query.device)
            attended = attention.dense(
                query, key, value, seen, is_causal=is_causal, implementation=implementation
            )
            return attended.transpose(1, 2)

        hidden = self.model.decode(hidden, position_ids, is_long, attend, states)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(
                logits[:, :-1].float().flatten(0, 1),
                labels[:, 1:].flatten().to(logits.device),
                ignore_index=IGNORE_INDEX,
                reduction="mean" if num_items_in_batch is None else "sum",
            )
            if num_items_in_batch is not None:
                loss = loss / num_items_in_batch
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache,
            hidden_states=None if states is None else tuple(states),
        )
        as_tuple = not (self.config.return_dict if return_dict is None else return_dict)
        return output.to_tuple() if as_tuple else output

    @staticmethod
    def _image_inputs(
        pixel_values: Tensor | None, image_sizes: Tensor | None, crop_grid: Tensor | None
    ) -> ImageInputs | None:
        if pixel_values is None:
            return None
        if crop_grid is not None:
            return ImageInputs.from_crops(pixel_values, crop_grid)
        if image_sizes is None:
            raise ValueError("pixel_values need image_sizes (float views) or crop_grid (uint8)")
        return ImageInputs.from_padded_views(pixel_values, image_sizes)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in transformers, and once more: begin again when a row outgrows the short factors.

        The keys in the cache were computed with the short rotary factors, so the step that takes
        a row past `original_max_position_embeddings` recomputes the prompt, pictures included,
        with an empty cache. The published model does the same.
        """
        # transformers hands on what its stopping at strings needs; no model does.
        kwargs.pop("tokenizer", None)
        if past_key_values is not None and self._outgrows_short_factors(
            input_ids.shape[1], past_key_values.get_seq_length(), attention_mask
        ):
            past_key_values, next_sequence_length, is_first_iteration = DynamicCache(), None, True
        # Pyright cannot bind the mixin's self-typed methods to a real model.
        return super().prepare_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    def _expand_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """As in transformers, for beams and several answers; each row takes its own images along.

        transformers repeats every tensor entry by entry, [A, B] -> [A, A, B, B]. A row with the
        images A and B must become two rows with A, B, A, B, and a row without any has none to
        repeat.
        """
        names = ("pixel_values", "image_sizes", "crop_grid")
        pictures = {n: model_kwargs.pop(n) for n in names if model_kwargs.get(n) is not None}
        if expand_size > 1 and input_ids is not None and "pixel_values" in pictures:
            is_slot = (input_ids < 0) | (input_ids == self.config.image_token_id)
            pictures = repeat_images(pictures, is_slot.sum(dim=1).tolist(), expand_size)
        # Pyright cannot bind the mixin's self-typed methods to a real model.
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **model_kwargs,
        )
        return input_ids, {**model_kwargs, **pictures}

    def _outgrows_short_factors(
        self, num_tokens: int, num_past: int, attention_mask: Tensor | None
    ) -> bool:
        """Whether a row is longer than the original limit now, and was not in the cache."""
        limit = self.config.original_max_position_embeddings
        if self.config.rope_factors is None or num_past == 0 or num_tokens <= limit:
            return False
        if attention_mask is None:
            return num_past <= limit
        now, before = attention_mask.sum(dim=-1), attention_mask[:, :num_past].sum(dim=-1)
        return bool(((now > limit) & (before <= limit)).any())

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """As in transformers, over ids that are all in the vocabulary."""
        return _SlotsAsTokens(
            super()._get_logits_processor(*args, **kwargs),  # pyright: ignore[reportAttributeAccessIssue]
            self.config.image_token_id,
        )


class _SlotsAsTokens(LogitsProcessorList):
    """Processors that see the image token where the prompt has negative ids.

    A repetition penalty looks the prompt's ids up among the logits, where -1 is nowhere.
    """

    def __init__(self, processors: LogitsProcessorList, image_token_id: int) -> None:
        super().__init__(processors)
        self.image_token_id = image_token_id

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return super().__call__(
            input_ids.masked_fill(input_ids < 0, self.image_token_id),  # pyright: ignore[reportArgumentType]
            scores,
            **kwargs,
        )


def repeat_images(
    pictures: dict[str, Tensor], num_slots: Sequence[int], times: int
) -> dict[str, Tensor]:
    """Repeat each row's images as a group: of rows with [A, B], [] and [C], A B A B C C.

    Args:
        pictures: `pixel_values` with `image_sizes` or `crop_grid`, as in the model's call.
        num_slots: image slots of each row.
        times: how often.

    Raises:
        ValueError: the images don't fill the rows one after another.
    """
    if "crop_grid" in pictures:
        grid = pictures["crop_grid"]
    elif "image_sizes" in pictures:
        grid = pictures["image_sizes"] // CROP
    else:
        return pictures  # the model's call will say what is missing
    num_tokens = [num_image_tokens(rows, columns) for rows, columns in grid.tolist()]
    starts = [0, *itertools.accumulate(num_tokens)]
    ends = [0, *itertools.accumulate(num_slots)]
    if not set(ends) <= set(starts) or ends[-1] != starts[-1]:
        raise ValueError(
            "expected images that fill the rows one after another, got rows with "
            f"{list(num_slots)} image slots and images of {num_tokens} tokens"
        )
    order: list[int] = []
    for start, end in itertools.pairwise(ends):
        order += [*range(starts.index(start), starts.index(end))] * times
    repeated = {name: tensor[order] for name, tensor in pictures.items() if name != "pixel_values"}
    views = pictures["pixel_values"]
    per_image = views.split(grid.prod(dim=1).tolist() if "crop_grid" in pictures else 1)
    return {"pixel_values": torch.cat([per_image[image] for image in order]), **repeated}


def sample_lengths(position_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """How long the samples of a padded batch are, whatever the padding beside them: int64 (B,).

    Args:
        position_ids: int64 (B, T), of the new tokens.
        attention_mask: (B, T including the cache), non-zero where a token is real, or None: all
            are. Tokens between two real ones count.
    """
    if attention_mask is None:
        return position_ids.amax(dim=1) + 1
    width = attention_mask.shape[1]
    places = torch.arange(width, device=attention_mask.device)
    is_real = attention_mask != 0
    first = places.masked_fill(~is_real, width).amin(dim=1)
    last = places.masked_fill(~is_real, -1).amax(dim=1)
    return (last - first + 1).clamp(min=0).to(position_ids.device)


def causal_mask(
    num_new: int, num_past: int, attention_mask: Tensor | None, device: torch.device
) -> Tensor:
    """Which keys each new token may see.

    Args:
        num_new: new tokens.
        num_past: tokens in the cache.
        attention_mask: (B, num_past + num_new), non-zero where a token is real, or None.
        device: where to make it.

    Returns:
        bool (B or 1, 1, num_new, num_past + num_new). A padding token sees itself, so that no row
        of the softmax is empty.
    """
    keys = torch.arange(num_past + num_new, device=device)
    queries = torch.arange(num_past, num_past + num_new, device=device)[:, None]
    mask = (keys <= queries)[None, None]
    if attention_mask is None:
        return mask
    return (mask & (attention_mask != 0)[:, None, None, :]) | (keys == queries)


for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText):
    auto_class.register(Phi3VConfig, Phi3VForCausalLM, exist_ok=True)
