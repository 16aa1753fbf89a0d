"""Memory of a GPU and speed of training, predicted by arithmetic, before anything is rented.

    memory = estimate_memory(config, Phi3VConfig(), world_size=8, engine="fsdp2")
    memory.total                                 # bytes on each GPU at the worst moment
    speed = estimate_speed(config, Phi3VConfig(), setting, workload)
    speed.images_per_second                      # of all GPUs together

What is on a GPU, P weights of which Q train, c bytes of computing precision (2; 4 in fp32):

    weights       4 Q + c (P - Q); in full training 4 P; under zero c P; 4 bits in QLoRA's decoder
    gradients     4 Q; under zero c Q
    optimizer     8 Q of AdamW, 2 Q in 8 bits; under zero 4 Q of masters more
    ...of which fsdp2 and zero3 keep a share of all, zero2 of gradients and optimizer, zero1 of the
    optimizer; offloaded parts are in host memory
    working       copies: weights cast by autocast, layers gathered, buckets of communication,
                  and whole gradients between the rows of a step (fsdp2)
    activations   what autograd keeps of the longest row: see `decoder_bytes` and `clip_bytes`
    logits        14 bytes an entry, at label positions only
    margin        CUDA's context and libraries, NCCL's buffers, 5 % for what the allocator can't use

What a step takes: its operations (recomputed ones too) over peak and efficiency, the optimizer's
passes over memory, and communication, which hides behind computing under ddp and fsdp2 and doesn't
under zero. The efficiency is assumed, not measured (see `gpus`).
"""

import math
from dataclasses import dataclass
from typing import Literal

from phi3v_train.config import MethodConfig, TrainConfig
from phi3v_train.configuration_phi3_v import Phi3VConfig
from phi3v_train.flops import Work, forward_flops, training_flops
from phi3v_train.gpus import Gpu
from phi3v_train.parameter_counts import ParameterCounts, count_parameters
from phi3v_train.workload import Workload, default_workload

GIB = 2**30

EngineName = Literal["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"]
Precision = Literal["fp32", "bf16", "fp16"]

CUDA_CONTEXT = int(0.8 * GIB)
"""CUDA's context, cuBLAS's workspaces and loaded kernels: 0.5 to 1 GiB, by GPU and driver."""

NCCL_BUFFERS = int(0.8 * GIB)
"""Where there are several GPUs."""

FRAGMENTATION = 0.05
"""Of everything: what the allocator holds and can't give."""

ZERO_BUCKET = 500_000_000
"""Weights in DeepSpeed's buckets, one for reducing and one for gathering, by default."""

ZERO3_LIVE = 1_000_000_000
"""Weights that ZeRO-3 lets be whole at a time, by default."""

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a 4-bit weight: itself, its part of an 8-bit scale per 64, and of a 32-bit one per 256."""


# --- memory ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on each GPU when most is needed."""

    weights: int
    gradients: int
    optimizer: int
    working: int
    activations: int
    logits: int
    margin: int
    host: int = 0
    """In host memory, per GPU: what is offloaded."""

    @property
    def total(self) -> int:
        """On the GPU."""
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.working
            + self.activations
            + self.logits
            + self.margin
        )


def estimate_memory(
    config: TrainConfig,
    model_config: Phi3VConfig,
    world_size: int,
    *,
    engine: EngineName,
    precision: Precision = "bf16",
    workload: Workload | None = None,
    has_varlen: bool = True,
) -> Memory:
    """Predict what each GPU must hold.

    Args:
        config: of the run; its method, optimizer, row length, batch size and offloading count.
        model_config: sizes of the model.
        world_size: GPUs.
        engine: how they share the work.
        precision: of computing.
        workload: what is trained on; none: pages of documents in full rows.
        has_varlen: the GPU attends to packed rows at once (compute capability 8.0 and up).
    """
    workload = workload or default_workload(config.data.max_tokens_per_row)
    counts = count_parameters(model_config, config.method)
    states = _states(config, counts, world_size, engine, precision)
    if engine == "fsdp2" and rows_per_step(config, workload, world_size) > 1:
        states = states.more_working(4 * counts.trained)
    activations = activation_bytes(
        model_config,
        config.method,
        workload.row,
        precision,
        engine,
        has_varlen=has_varlen and precision != "fp32",
    )
    # logits in the precision of computing, in float32, their logarithms and their gradient
    logits = (
        workload.row.num_label_tokens
        * model_config.vocab_size
        * (12 + (2 if precision != "fp32" else 0))
    )
    held = states.on_device + activations + logits
    margin = CUDA_CONTEXT + (NCCL_BUFFERS if world_size > 1 else 0) + int(FRAGMENTATION * held)
    return Memory(
        weights=states.weights,
        gradients=states.gradients,
        optimizer=states.optimizer,
        working=states.working,
        activations=activations,
        logits=logits,
        margin=margin,
        host=states.host,
    )


def rows_per_step(config: TrainConfig, workload: Workload, world_size: int) -> int:
    """Rows that a GPU runs for one optimizer step."""
    batch = config.train.global_batch_size
    if config.train.global_batch_unit == "label_tokens":
        labels = workload.total.num_label_tokens / workload.num_samples
        batch = max(1, round(batch / labels))
    tokens = batch * workload.tokens_per_sample / world_size
    return max(1, math.ceil(tokens / config.data.max_tokens_per_row))


@dataclass(frozen=True, slots=True)
class _States:
    weights: int
    gradients: int
    optimizer: int
    working: int
    host: int = 0

    @property
    def on_device(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.working

    def more_working(self, size: int) -> "_States":
        return _States(self.weights, self.gradients, self.optimizer, self.working + size, self.host)


def _states(
    config: TrainConfig,
    counts: ParameterCounts,
    world_size: int,
    engine: EngineName,
    precision: Precision,
) -> _States:
    """Weights, gradients, moments and the copies that engines make of them."""
    compute = 4 if precision == "fp32" else 2
    moments = 2 if config.optim.name == "adamw8bit" else 8
    trained = counts.trained
    frozen = counts.model - counts.own
    # full training keeps even what is frozen in float32; adapters have a base that is not
    frozen_bytes = 4 if config.method.name == "full" else compute
    four_bit = counts.decoder_linear if config.method.name == "qlora" else 0
    base = int(four_bit * NF4_BYTES) + (frozen - four_bit) * frozen_bytes
    linear = sum(counts.linear.values()) - four_bit

    if engine in ("single", "ddp"):
        # autocast casts float32 weights once a pass, and autograd keeps the copies
        cast = 2 if precision != "fp32" and config.method.name == "full" else 0
        adapters = 2 * counts.adapters if precision != "fp32" else 0
        return _States(base + 4 * trained, 4 * trained, moments * trained, cast * linear + adapters)

    def share(size: int) -> int:
        return -(-size // world_size)

    if engine == "fsdp2":
        weights, gradients, optimizer = (
            share(size) for size in (base + 4 * trained, 4 * trained, moments * trained)
        )
        # the layer at work and the next one, and what is outside the layers
        gathered = compute * (2 * counts.largest_layer + counts.outside_layers)
        unsharded = 4 * counts.largest_layer if trained > counts.largest_layer else 0
        if config.parallel.offload_parameters:
            host = weights + gradients + optimizer
            return _States(0, 0, 0, gathered + unsharded, host)
        return _States(weights, gradients, optimizer, gathered + unsharded)

    weights = compute * (counts.model - four_bit) + int(four_bit * NF4_BYTES)
    weights += compute * counts.adapters
    gradients = compute * trained
    optimizer = share((4 + moments) * trained)
    buckets = compute * (min(ZERO_BUCKET, trained) + min(ZERO_BUCKET, trained))
    if engine == "zero3":
        weights, gradients = share(weights), share(gradients)
        buckets += compute * min(ZERO3_LIVE, counts.model)
    elif engine == "zero2":
        gradients = share(gradients)
    host = 0
    if config.parallel.offload_parameters and engine == "zero3":
        host += weights
        weights = 0
    if config.parallel.offload_optimizer or config.parallel.offload_parameters:
        host += optimizer + share(4 * trained)  # gradients go there to be used
        optimizer = 0
        gradients = 0 if engine != "zero1" else gradients
    return _States(weights, gradients, optimizer, buckets, host)


# --- activations ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Part:
    """How autograd sees one part of the model."""

    keeps: bool
    """Gradients pass: something in it, or in front of it, trains."""
    own: bool
    """Its own weights train."""
    adapted: bool
    stream: int
    """Bytes of a number in the residual stream."""
    compute: int
    """Bytes of a number in matrix products."""
    autocast: bool
    """Products cast what they are given, each for itself; norms compute in float32."""


def _part(method: MethodConfig, name: str, precision: Precision, engine: EngineName) -> _Part:
    order = ("vision", "projector", "llm")
    before = order[: order.index(name) + 1]
    compute = 4 if precision == "fp32" else 2
    own = name in method.full_parts
    whole = engine in ("single", "ddp")
    # weights in shares are gathered in the precision of computing
    float32 = whole and (own or method.name == "full")
    return _Part(
        keeps=any(part in method.trained_parts for part in before),
        own=own,
        adapted=name in method.adapter_parts,
        stream=4 if float32 else compute,
        compute=compute,
        autocast=whole and compute == 2,
    )


def decoder_bytes(
    config: Phi3VConfig, part: _Part, rank: int = 0, *, has_varlen: bool = True
) -> int:
    """What autograd keeps of one decoder layer, in bytes a token.

    Two norms in float32 (with a number per token), and their result where the norm's weight
    trains; the input of a linear layer where its weight trains or an adapter reads it (under
    autocast from a copy of its own); query, key, value, rotated query and key, attention's result;
    gate and up, the gate's activation, and their product.
    """
    if not part.keeps:
        return 0
    width, mlp, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    kv_heads = config.num_key_value_heads
    assert kv_heads is not None
    query, key = heads * config.head_dim, kv_heads * config.head_dim
    inputs = part.own or part.adapted
    size = 2 * 4 * (width + 1)
    if part.own:
        size += 2 * part.stream * width
    if inputs:
        size += part.compute * (2 * width + mlp)
    copies = part.adapted and part.autocast
    if copies or (inputs and not has_varlen):
        size += part.compute * query  # of attention's result, for the layer that reads it
    size += part.compute * 4 * rank
    size += part.compute * ((query + 2 * key) + (query + key) + query) + 4 * heads
    return size + part.compute * 3 * mlp


def clip_bytes(config: Phi3VConfig, part: _Part, rank: int = 0) -> int:
    """What autograd keeps of one CLIP layer, in bytes a crop (577 positions).

    Inputs of two norms; under autocast these are float32, and query, key and value are projected
    from a copy each; query, key, value, attention's result; the MLP's three.
    """
    if not part.keeps:
        return 0
    clip = config.vision_config
    assert clip is not None
    width, mlp = clip["hidden_size"], clip["intermediate_size"]
    inputs = part.own or part.adapted
    size = 2 * width * (4 if part.autocast else part.compute)
    if inputs:
        casts = 3 if part.autocast else 1
        size += part.compute * (casts * width + width + mlp)
    if part.adapted and part.autocast:
        size += part.compute * width
    size += part.compute * 6 * rank
    size += part.compute * (4 * width + 2 * mlp) + 4 * clip["num_attention_heads"] + 16
    return size * _positions(config)


def _positions(config: Phi3VConfig) -> int:
    clip = config.vision_config
    assert clip is not None
    return (clip["image_size"] // clip["patch_size"]) ** 2 + 1


def activation_bytes(
    config: Phi3VConfig,
    method: MethodConfig,
    row: Work,
    precision: Precision,
    engine: EngineName = "single",
    *,
    has_varlen: bool = True,
) -> int:
    """What autograd keeps of a row between the forward and the backward pass, in bytes.

    With gradient checkpointing a layer keeps its input alone; one layer at a time is made whole.
    """
    clip = config.vision_config
    assert clip is not None

    def rank(part: _Part) -> int:
        return method.lora.rank if part.adapted else 0

    vision, projector, llm = (
        _part(method, name, precision, engine) for name in ("vision", "projector", "llm")
    )
    decoder = decoder_bytes(config, llm, rank(llm), has_varlen=has_varlen) * row.num_tokens
    tower = clip_bytes(config, vision, rank(vision)) * row.num_crops
    layers, clip_layers = config.num_hidden_layers, clip["num_hidden_layers"] - 1
    size = 0
    if method.gradient_checkpointing:
        if llm.keeps:
            size += layers * llm.stream * config.hidden_size * row.num_tokens
        if vision.keeps:
            inputs = vision.stream * clip["hidden_size"] * _positions(config)
            size += clip_layers * inputs * row.num_crops
        size += max(decoder, tower)
    else:
        size += layers * decoder + clip_layers * tower
    if projector.keeps:
        merged = 4 * clip["hidden_size"]
        size += projector.compute * (merged + 2 * config.hidden_size) * row.num_image_tokens
    # pixels as bytes and as normalised float32, and the residual stream at both ends
    pixels = 3 * clip["image_size"] ** 2
    size += row.num_crops * pixels * (1 + 4 + llm.compute)
    return size + 3 * llm.stream * config.hidden_size * row.num_tokens


# --- speed ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hardware:
    """GPUs of one kind, in one or more machines."""

    gpu: Gpu
    num_gpus: int
    gpus_per_machine: int
    network_gb_s: float | None = None
    """Between machines, of all GPUs of one together; None: not known, or one machine."""
    host_gib: float | None = None
    """Memory of a machine beside its GPUs'; None: not known."""

    @property
    def bus_gb_s(self) -> float:
        """What a GPU gets in a collective over all of them."""
        if self.num_gpus <= self.gpus_per_machine or self.network_gb_s is None:
            return self.gpu.bus_gb_s
        # a ring enters and leaves a machine over its network: all of it serves each hop
        return min(self.gpu.bus_gb_s, 0.8 * self.network_gb_s)


@dataclass(frozen=True, slots=True)
class Speed:
    """Of all GPUs together."""

    images_per_second: float
    """Samples, where they have no images."""
    samples_per_second: float
    tokens_per_second: float
    mfu: float
    """Model operations (recomputed ones don't count) over the peak, 0 to 1."""
    compute_seconds: float
    """Of a step, on each GPU; likewise below."""
    communication_seconds: float
    """Not hidden behind computing."""
    optimizer_seconds: float


def estimate_speed(
    config: TrainConfig,
    model_config: Phi3VConfig,
    hardware: Hardware,
    workload: Workload,
    *,
    engine: EngineName,
    efficiency: float | None = None,
) -> Speed:
    """Predict the speed of training.

    Args:
        config: of the run.
        model_config: sizes of the model.
        hardware: GPUs and what joins them.
        workload: what is trained on.
        engine: how they share the work.
        efficiency: share of the peak while computing; none: the GPU's assumed one.
    """
    gpu, count = hardware.gpu, hardware.num_gpus
    rows = rows_per_step(config, workload, count)
    per_row = max(1.0, config.data.max_tokens_per_row / workload.tokens_per_sample)
    batch = min(config.train.global_batch_size, rows * count * per_row)
    if config.train.global_batch_unit == "label_tokens":
        batch = rows * count * per_row
    samples = batch / workload.num_samples  # of the data set, in one step
    useful = training_flops(model_config, config.method, workload.total) * samples
    done = useful + recomputed_flops(model_config, config.method, workload.total) * samples
    if config.method.name == "qlora":
        done *= UNPACKING
    compute = done / count / (gpu.peak * (efficiency or gpu.efficiency))
    counts = count_parameters(model_config, config.method)
    optimizer = _optimizer_seconds(config, counts, hardware, engine)
    wire = _communication_bytes(counts, engine, rows, count) / (hardware.bus_gb_s * 1e9)
    hidden = min(wire, compute) if engine in ("ddp", "fsdp2") else 0.0
    seconds = compute + optimizer + wire - hidden
    rate = batch / seconds
    return Speed(
        images_per_second=rate
        * (workload.num_images or workload.num_samples)
        / workload.num_samples,
        samples_per_second=rate,
        tokens_per_second=rate * workload.tokens_per_sample,
        mfu=useful / seconds / (gpu.peak * count),
        compute_seconds=compute,
        communication_seconds=wire - hidden,
        optimizer_seconds=optimizer,
    )


def recomputed_flops(config: Phi3VConfig, method: MethodConfig, work: Work) -> float:
    """Operations that gradient checkpointing does a second time."""
    if not method.gradient_checkpointing:
        return 0.0
    forward = forward_flops(config, work)
    head = 2.0 * work.num_label_tokens * config.hidden_size * config.vocab_size
    again = forward["llm"] - head
    return again + (forward["vision"] if "vision" in method.trained_parts else 0.0)


def _optimizer_seconds(
    config: TrainConfig, counts: ParameterCounts, hardware: Hardware, engine: EngineName
) -> float:
    """AdamW reads 16 bytes a weight (itself, its gradient, two moments) and writes 12."""
    sharing = 1 if engine in ("single", "ddp") else hardware.num_gpus
    mine = counts.trained / sharing
    if config.parallel.offload_optimizer or config.parallel.offload_parameters:
        # gradients and weights cross PCIe; the host's memory is shared by its GPUs
        here = min(hardware.num_gpus, hardware.gpus_per_machine)
        return mine * (8 / PCIE_BYTES_PER_SECOND + 28 * here / HOST_BYTES_PER_SECOND)
    return 28 * mine / (0.8 * hardware.gpu.memory_gb_s * 1e9)


UNPACKING = 1.15
"""Time of products with 4-bit weights over 16-bit ones: 12.127 / 10.545 images a second in the
cookbook's table."""

PCIE_BYTES_PER_SECOND = 12e9
"""To and from the host, version 4.0, as copies reach it."""

HOST_BYTES_PER_SECOND = 100e9
"""Memory of a server, all cores together, in an update by vector instructions."""


def _communication_bytes(
    counts: ParameterCounts, engine: EngineName, rows: int, world_size: int
) -> float:
    """What a GPU sends for one step."""
    if world_size == 1 or engine == "single":
        return 0.0
    trained, model = counts.trained, counts.model
    size: float = {
        "ddp": 2 * 4 * trained,
        "fsdp2": rows * 2 * 2 * model + 4 * trained,
        "zero1": 2 * trained + 2 * trained,
        "zero2": rows * 2 * trained + 2 * trained,
        "zero3": rows * (2 * 2 * model + 2 * trained),
    }[engine]
    return size * (world_size - 1) / world_size
