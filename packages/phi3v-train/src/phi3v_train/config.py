"""The configuration of a run: one frozen tree that a YAML file fills.

    # ucf101.yaml
    model: models/phi-3.5-vision
    output_dir: runs/ucf101
    data: {train: shards/train, eval: shards/val, num_crops: 4}
    optim: {learning_rate: 1e-5}

    >>> config = load_config("ucf101.yaml", ["optim.learning_rate=2e-5", "method.name=lora"])
    >>> config.optim.learning_rate
    2e-05

A file is YAML 1.2: `4e-5` is a number, `no` is a string, a key may stand once. An override is
`dotted.key=value`, its value written as in the file; the later one wins. A relative path is
relative to the current directory, wherever the file lies. What isn't set keeps the default shown
below, which is the cookbook recipe's where the recipe has one.
"""

import difflib
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from phi3v_data.addresses import is_address
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    Strict,
    ValidationError,
)
from pydantic import model_validator as _model_validator
from pydantic_core import PydanticCustomError


class ConfigError(ValueError):
    """A configuration can't be used. One line: key and file, expected, got."""


# --- the tree ------------------------------------------------------------------------------------

Part = Literal["vision", "projector", "llm"]
"""A part of the model: CLIP, the image projector with its separators, the language model."""


def _place(value: object) -> Path | str:
    if isinstance(value, str) and is_address(value):
        return value
    if isinstance(value, str | Path):
        return Path(value).expanduser()
    raise PydanticCustomError("path_type", "Input should be a path")


PathField = Annotated[Path, Strict(False), AfterValidator(Path.expanduser)]
Place = Annotated[Path | str, PlainValidator(_place)]
"""A path, or an address such as s3://bucket/shards/train."""

Parts = Annotated[tuple[Part, ...], Strict(False)]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )


class LoraConfig(_Section):
    """Low-rank adapters; read where `method.name` is `lora` or `qlora`."""

    rank: Count = 64
    """Rank of every adapter."""

    alpha: Count | None = None
    """Scale of the adapters, divided by the rank; none: `alpha_ratio` says it."""

    alpha_ratio: Positive = 2.0
    """Where `alpha` isn't set, it is round(rank x alpha_ratio)."""

    dropout: Fraction = 0.0
    """Dropout in front of every adapter."""

    targets: Annotated[Parts, Field(min_length=1)] = ("llm", "vision", "projector")
    """Parts whose linear layers get an adapter; not those in `method.freeze` or `full`."""

    full: Parts = ()
    """Parts whose own weights train beside the adapters. They are saved with the adapter."""

    extra: dict[str, Any] = {}
    """More fields of PEFT's LoraConfig by name, for example `{use_rslora: true}`."""

    @property
    def lora_alpha(self) -> int:
        """PEFT's `lora_alpha`."""
        return self.alpha or round(self.rank * self.alpha_ratio)


class MethodConfig(_Section):
    """What trains."""

    name: Literal["full", "lora", "qlora"] = "full"
    """`full` trains the weights themselves, `lora` adapters beside them; `qlora` does that over
    decoder layers kept in 4 bits."""

    freeze: Parts = ()
    """Parts that stay as they are."""

    lora: LoraConfig = LoraConfig()
    """Rank, scale and place of the adapters."""

    gradient_checkpointing: bool = False
    """Compute activations a second time in the backward pass: less memory, a third more time."""

    @_model_validator(mode="after")
    def _something_trains(self) -> "MethodConfig":
        if not self.trained_parts:
            raise ValueError("nothing is left to train; freeze fewer parts")
        if self.has_adapters:
            self._check_adapters()
        return self

    def _check_adapters(self) -> None:
        both = [part for part in self.lora.full if part in self.freeze]
        if both:
            raise ValueError(f"{both[0]} is in freeze and in lora.full; take it out of one of them")
        if self.name == "qlora" and "llm" in self.lora.full:
            raise ValueError(
                "qlora keeps the language model in 4 bits, so lora.full can't name llm; "
                "use method.name=lora"
            )
        if not self.adapter_parts:
            raise ValueError(
                "no part is left that gets an adapter; use method.name=full with method.freeze, or "
                "add a part to lora.targets"
            )
        if not self.lora.lora_alpha:
            raise ValueError(
                f"lora.rank {self.lora.rank} x lora.alpha_ratio {self.lora.alpha_ratio} rounds to "
                "alpha 0, and such adapters do nothing; set lora.alpha"
            )

    @property
    def has_adapters(self) -> bool:
        """Whether adapters train, not only the model's own weights."""
        return self.name != "full"

    @property
    def adapter_parts(self) -> tuple[Part, ...]:
        """The parts that get adapters, in a fixed order."""
        others = (*self.freeze, *self.lora.full)
        wanted = self.lora.targets if self.has_adapters else ()
        return tuple(p for p in typing.get_args(Part) if p in wanted and p not in others)

    @property
    def full_parts(self) -> tuple[Part, ...]:
        """The parts whose own weights train, in a fixed order."""
        wanted = self.lora.full if self.has_adapters else typing.get_args(Part)
        return tuple(p for p in typing.get_args(Part) if p in wanted and p not in self.freeze)

    @property
    def trained_parts(self) -> tuple[Part, ...]:
        """The parts that train, one way or the other, in a fixed order."""
        trained = {*self.adapter_parts, *self.full_parts}
        return tuple(p for p in typing.get_args(Part) if p in trained)


class SourceConfig(_Section):
    """One of several shard directories to train on."""

    path: Place
    """Shard directory, made by `phi3v-data shard`."""

    weight: Positive | None = None
    """Its share of an epoch, relative to the others'; none for all: every sample once."""


def _listed(value: object) -> object:
    """One source, or a list of names and sections, as a list of sections."""
    sources = value if isinstance(value, list | tuple) else [value]
    return tuple({"path": s} if isinstance(s, str | Path) else s for s in sources)


def _as_written(sources: tuple[SourceConfig, ...]) -> object:
    """The other way: a lone source is its name."""
    written = [
        str(s.path) if s.weight is None else {"path": str(s.path), "weight": s.weight}
        for s in sources
    ]
    return written[0] if len(written) == 1 and sources[0].weight is None else written


TrainSources = Annotated[
    tuple[SourceConfig, ...],
    Field(min_length=1),
    BeforeValidator(_listed),
    PlainSerializer(_as_written),
]


class DataConfig(_Section):
    """Which samples, and how they become rows."""

    train: TrainSources
    """Shard directory to train on, made by `phi3v-data shard`; or a list of them."""

    temperature: Positive = 1.0
    """Of several sources: shares are weights (or sizes) to the power of 1 / temperature."""

    epoch_size: Count | None = None
    """Samples in an epoch of several sources; none: as many as there are."""

    shuffle_window_mib: Count | None = None
    """Mix samples only with those of shards so near in the epoch's order; none: all with all on
    this disk, within 128 shards where data lies in an object store."""

    eval: Place | None = None
    """Shard directory to evaluate on; none: no evaluation."""

    num_crops: Count = 16
    """Most crops of 336 x 336 an image is cut into; 4 suits video frames, 16 documents."""

    resize: Literal["exact", "fast"] = "exact"
    """`exact`: the published processor's pixels, bit for bit; `fast`: at most 2 of 255 off."""

    max_tokens_per_row: Count = 8192
    """Capacity of a packed row, in tokens. The first setting to lower when memory runs out."""

    overlong: Literal["error", "drop"] = "error"
    """A sample longer than a row stops the run before step 1, or is dropped and counted."""

    damaged: Literal["error", "skip"] = "error"
    """A sample whose bytes in its shard are damaged stops the run, or is left out and named."""

    num_workers: Annotated[int, Field(ge=0)] = 2
    """Processes per rank that decode and encode; 0 does it in the training process."""

    prefetch_mib: Count = 512
    """Memory per rank, in MiB, for rows that workers make ahead of the step that needs them."""


class OptimConfig(_Section):
    """AdamW and its learning rates."""

    name: Literal["adamw", "adamw8bit"] = "adamw"
    """`adamw8bit` keeps the moments in 8 bits: a quarter of their memory."""

    learning_rate: Positive = 4e-5
    """The rate after warm-up."""

    vision_lr: Positive | None = None
    """Of the vision part, with the same schedule; none: `learning_rate`."""

    projector_lr: Positive | None = None
    """Of the projector, with the same schedule; none: `learning_rate`."""

    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    """Decoupled weight decay."""

    decay_on: Literal["all", "matrices"] = "all"
    """What decays: everything, as in the recipe, or not norms, biases and other vectors."""

    betas: Annotated[tuple[Fraction, Fraction], Strict(False)] = (0.9, 0.95)
    """Decay of the first and the second moment."""

    eps: Positive = 1e-7
    """Added to the denominator."""

    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this global norm."""

    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """After warm-up: down to zero in a line or half a cosine, or level."""

    warmup_steps: Annotated[int, Field(ge=0)] = 50
    """Steps over which the rate rises from zero."""

    def peak_rate(self, part: Part) -> float:
        """The rate of a part of the model after warm-up."""
        own = {"vision": self.vision_lr, "projector": self.projector_lr, "llm": None}[part]
        return self.learning_rate if own is None else own


class RunConfig(_Section):
    """How long, in what batches."""

    num_epochs: Count = 1
    """Times every sample is seen."""

    max_steps: Count | None = None
    """Stop after so many optimizer steps, however many epochs that is; none: run all epochs."""

    global_batch_size: Count = 16
    """Samples per optimizer step, over all devices together."""

    global_batch_unit: Literal["samples", "label_tokens"] = "samples"
    """What `global_batch_size` counts; with label tokens a step ends where it reaches them."""

    log_every: Count = 10
    """Steps between two log lines."""


class ParallelConfig(_Section):
    """How the devices share the work. The result doesn't depend on it."""

    engine: Literal["auto", "single", "ddp", "fsdp2", "zero1", "zero2", "zero3"] = "auto"
    """`auto`: adapters train under `ddp`, full weights under the first engine that they fit."""

    offload_optimizer: bool = False
    """Keep the optimizer's state in host memory: zero1, zero2, zero3; fsdp2 with the parameters."""

    offload_parameters: bool = False
    """Keep the parameters in host memory too, but for those at work: zero3 and fsdp2."""

    @_model_validator(mode="after")
    def _engine_can_offload(self) -> "ParallelConfig":
        if self.offload_parameters and self.engine not in ("auto", "fsdp2", "zero3"):
            raise ValueError(
                f"engine {self.engine} has every parameter on every device; offload_parameters "
                "needs engine zero3 or fsdp2"
            )
        if self.offload_optimizer and self.engine in ("single", "ddp"):
            raise ValueError(
                f"engine {self.engine} cannot offload_optimizer; use engine zero1, zero2 or zero3"
            )
        if self.engine == "fsdp2" and self.offload_optimizer != self.offload_parameters:
            raise ValueError(
                "engine fsdp2 keeps parameters and optimizer in host memory together; set both "
                "offload_parameters and offload_optimizer, or use engine zero2 or zero3"
            )
        return self


class LogConfig(_Section):
    """What is kept of the numbers, beside `log.jsonl`."""

    tensorboard: bool = True
    """Write event files for TensorBoard, into `tensorboard/` of the run's folder."""

    wandb: str | None = None
    """Project at Weights & Biases to log to as well; needs the extra `phi3v-train[wandb]`."""

    report: bool = True
    """Write `report.html` when the run ends, or is stopped by a signal."""


class CheckpointConfig(_Section):
    """When the run's state is saved. It is saved at the end and on an interrupt in any case."""

    every_steps: Count | None = None
    """Steps between two checkpoints; none: `every_minutes` or the end says when."""

    every_minutes: Positive | None = None
    """Minutes between two checkpoints, at the end of a step; counts beside `every_steps`."""

    keep: Count = 2
    """Newest checkpoints that stay on disk."""

    keep_best: Annotated[int, Field(ge=0)] = 1
    """Best checkpoints that stay too, by `eval.best_by`; one that is best is saved when it is."""

    keep_every_steps: Count | None = None
    """Checkpoints of steps that are a multiple of this stay too; none: no others do."""

    def is_due(self, done: int, seconds: float) -> bool:
        """Whether to save after `done` steps, `seconds` after the last checkpoint or start."""
        by_step = self.every_steps is not None and done % self.every_steps == 0
        return by_step or (self.every_minutes is not None and seconds >= 60 * self.every_minutes)


class EvalConfig(_Section):
    """How the model is judged on `data.eval`: by the loss of its answers, and by what it says."""

    before: bool = False
    """Evaluate before the first step too, into `eval_before.json`."""

    after: bool = True
    """Evaluate after the last step, into `eval_after.json` (where `data.eval` is set)."""

    every_steps: Count | None = None
    """Steps between two measurements of the loss on `data.eval`; none: it is not measured."""

    generate_every_steps: Count | None = None
    """Steps between two rounds of generated answers; none: only before and after the run."""

    metric: Literal["accuracy", "anls"] = "accuracy"
    """What is computed from answers and predictions; `anls` is DocVQA's."""

    anls: Literal["official", "recipe"] = "official"
    """`official`: upper and lower case are equal; `recipe`: the cookbook's, where they are not."""

    best_by: Literal["loss", "metric"] = "loss"
    """What is best: the lowest loss (of `every_steps`), or the highest metric."""

    patience: Count | None = None
    """End the run after so many evaluations in a row without a new best; none: never."""

    batch_size: Count = 8
    """Samples of like length generated together, per device."""

    max_new_tokens: Count = 64
    """Longest answer generated, in tokens."""

    limit: Count | None = None
    """Evaluate only the first so many samples."""

    @property
    def is_wanted(self) -> bool:
        """Whether a run evaluates at all."""
        during = self.every_steps is not None or self.generate_every_steps is not None
        return self.before or self.after or during

    @property
    def best_every_steps(self) -> int | None:
        """Steps between two of the values that `best_by` names."""
        return self.every_steps if self.best_by == "loss" else self.generate_every_steps

    @_model_validator(mode="after")
    def _patience_has_something_to_wait_for(self) -> "EvalConfig":
        if self.patience is not None and self.best_every_steps is None:
            key = "every_steps" if self.best_by == "loss" else "generate_every_steps"
            raise ValueError(
                f"eval.patience counts evaluations by {self.best_by}, but none is made during the "
                f"run; set eval.{key}"
            )
        return self


class TrainConfig(_Section):
    """All settings of a run."""

    model: PathField
    """Hugging Face folder of the model to start from."""

    output_dir: PathField
    """Where checkpoints, logs, evaluations and the trained model go."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Fixes the order of the data, dropout and the adapters' first weights."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA where there is a device."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto`: bf16 on a GPU that has it, fp16 on an older one, fp32 on a CPU."""

    method: MethodConfig = MethodConfig()
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    train: RunConfig = RunConfig()
    log: LogConfig = LogConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()

    @_model_validator(mode="after")
    def _evaluation_has_data(self) -> "TrainConfig":
        for key in ("before", "every_steps", "generate_every_steps"):
            if getattr(self.eval, key) and self.data.eval is None:
                raise ValueError(f"eval.{key} is set, but data.eval is not; name a shard directory")
        return self

    @_model_validator(mode="after")
    def _rates_have_parts(self) -> "TrainConfig":
        rates = {"vision": self.optim.vision_lr, "projector": self.optim.projector_lr}
        for part, rate in rates.items():
            if rate is not None and part not in self.method.trained_parts:
                raise ValueError(
                    f"optim.{part}_lr is set, but the method trains no {part}; leave it out, or "
                    f"train {part}"
                )
        return self


# --- loading -------------------------------------------------------------------------------------


def load_config(
    path: str | os.PathLike[str] | None = None, overrides: Sequence[str] = ()
) -> TrainConfig:
    """Read a YAML file, put the overrides on top, check everything.

    Args:
        path: the YAML file; none: the overrides alone.
        overrides: `dotted.key=value` each, for example `optim.betas=[0.9, 0.99]`; an empty value
            means null.

    Raises:
        ConfigError: the first thing wrong, in one line.
    """
    tree, places = _read_file(Path(path)) if path is not None else ({}, {})
    for override in overrides:
        key, value = _parse_override(override)
        place = f"in override {override!r}"
        _insert(tree, key, value, place)
        parts = key.split(".")
        for length in range(1, len(parts)):
            places.setdefault(".".join(parts[:length]), place)
        for inner in (key, *(f"{key}.{k}" for k in _dotted_keys(value))):
            places[inner] = place
    source = f"in {path}" if path is not None else "in the overrides"
    _refuse_unknown_keys(TrainConfig, tree, places)
    try:
        return TrainConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, places, source)) from None


def dump_config(config: TrainConfig) -> str:
    """The whole configuration, defaults included, as YAML that `load_config` reads back equal."""
    return yaml.dump(
        config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True
    )


_WITHOUT_EFFECT_ON_THE_RESULT = (
    "model",  # the weights and the data have hashes of their own
    "output_dir",
    "device",
    "data.train",
    "data.eval",
    "data.num_workers",
    "data.prefetch_mib",
    "method.gradient_checkpointing",
    "train.log_every",
    "log",
    "parallel",
    "checkpoint",
    "eval",
)
"""Everything else counts as training maths: a new setting does until it is listed here."""


def training_maths(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide what the weights become, as one flat `{dotted key: value}`."""
    flat = dict(_flatten(config.model_dump(mode="json")))
    if not config.method.has_adapters:
        flat = {key: value for key, value in flat.items() if not key.startswith("method.lora.")}
    hidden = _WITHOUT_EFFECT_ON_THE_RESULT
    return {
        key: value
        for key, value in flat.items()
        if not any(key == h or key.startswith(f"{h}.") for h in hidden)
    }


def maths_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, ...]:
    """What differs between two `training_maths`, as `key: old -> new`, by key."""
    absent = "absent"
    return tuple(
        f"{key}: {then.get(key, absent)} -> {now.get(key, absent)}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key, absent) != now.get(key, absent)
    )


# --- YAML 1.2 ------------------------------------------------------------------------------------

# PyYAML implements YAML 1.1, where `4e-5` is a string, `no` is false and `010` is eight. These are
# the scalars of YAML 1.2's core schema (https://yaml.org/spec/1.2.2/#1032-tag-resolution).
_SCALARS = (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
)


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for kind, pattern, first_letters in _SCALARS:
        entry = (f"tag:yaml.org,2002:{kind}", re.compile(rf"^(?:{pattern})$"))
        for letter in [*first_letters, ""] if kind == "null" else first_letters:
            table.setdefault(letter, []).append(entry)
    return table


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _resolvers()

    def construct_core_int(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_core_int)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _resolvers()


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The file's mapping, and for every dotted key in it `in FILE, line N`."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no configuration file at {path}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a UTF-8 text file: {error.reason}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        places = dict(_places(node, path)) if node is not None else {}
        tree = loader.construct_document(node) if node is not None else {}
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:  # a character that YAML doesn't allow
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, got {_show(tree)}")
    return typing.cast("dict[str, Any]", tree), places


def _places(node: yaml.Node, path: Path, above: str = "") -> Iterator[tuple[str, str]]:
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{path}, line {line}: a key must be a name, not a collection")
        key = f"{above}.{key_node.value}" if above else str(key_node.value)
        if key in seen:
            raise ConfigError(
                f"duplicate key {key!r} in {path}, line {line} (first in line {seen[key]}); "
                "keep one of them"
            )
        seen[key] = line
        yield key, f"in {path}, line {line}"
        yield from _places(value_node, path, key)


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key or not all(key.split(".")):
        raise ConfigError(f"expected KEY=VALUE, for example optim.eps=1e-8, got {override!r}")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return key, None
        for _ in _places(node, Path(f"override {key}")):  # refuses duplicate keys
            pass
        return key, loader.construct_document(node)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "unreadable"
        raise ConfigError(
            f"the value of override {override!r} is not valid YAML: {problem}; quote it"
        ) from None


def _insert(tree: dict[str, Any], key: str, value: Any, place: str) -> None:
    *sections, name = key.split(".")
    for depth, section in enumerate(sections, start=1):
        below = tree.get(section)
        if below is None:
            below = tree[section] = {}
        if not isinstance(below, dict):
            above = ".".join(sections[:depth])
            raise ConfigError(f"{above!r} {place}: expected a section, got {_show(below)}")
        tree = below
    tree[name] = value


# --- errors --------------------------------------------------------------------------------------


def _section_of(annotation: Any) -> type[_Section] | None:
    """The section class behind a field's type, if it is one."""
    if isinstance(annotation, type) and issubclass(annotation, _Section):
        return annotation
    return None


def _known_keys(section: type[_Section], above: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield f"{above}{name}"
        below = _section_of(field.annotation)
        if below is not None:
            yield from _known_keys(below, f"{above}{name}.")


def _refuse_unknown_keys(
    section: type[_Section], tree: Mapping[Any, Any], places: Mapping[str, str], above: str = ""
) -> None:
    for name, value in tree.items():
        key = f"{above}{name}"
        if name not in section.model_fields:
            raise ConfigError(f"unknown key {key!r} {places[key]}; {_suggest(key, section, above)}")
        below = _section_of(section.model_fields[name].annotation)
        if below is not None and isinstance(value, Mapping):
            _refuse_unknown_keys(below, value, places, f"{key}.")


def _suggest(key: str, section: type[_Section], above: str) -> str:
    known = list(_known_keys(TrainConfig))
    name = key.rpartition(".")[2]
    elsewhere = [k for k in known if k.rpartition(".")[2] == name]
    here = [above + n for n in difflib.get_close_matches(name, section.model_fields, n=1)]
    names = {k.rpartition(".")[2]: k for k in known}
    close_elsewhere = [names[n] for n in difflib.get_close_matches(name, names, n=1, cutoff=0.7)]
    for candidates in (elsewhere, here, close_elsewhere):
        if candidates:
            return f"did you mean {candidates[0]!r}?"
    return f"expected one of {', '.join(above + n for n in section.model_fields)}"


def _explain(error: ValidationError, places: Mapping[str, str], source: str) -> str:
    """The first finding of pydantic in one line, in the words of the file."""
    first = error.errors(include_url=False)[0]
    # Below a tuple the location ends in an item's number; the key is what stands before it.
    key = ".".join(str(part) for part in first["loc"] if isinstance(part, str))
    where = places.get(key, source)
    if first["type"] == "missing" and not isinstance(first["loc"][-1], int):
        field = _field(key)
        hint = f": {field.description.split(chr(10))[0]}" if field and field.description else ""
        return f"missing key {key!r} {source}{hint}"
    if first["type"] == "value_error":
        problem = first["msg"].removeprefix("Value error, ")
        return f"{key} {where}: {problem}" if key else f"{problem} ({source.removeprefix('in ')})"
    got = _show(first["input"])
    return f"{key} {where}: expected {_expected(first['type'], first['msg'])}, got {got}"


_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a text",
    "path_type": "a path",
    "tuple_type": "a list",
    "model_type": "a section with keys",
    "model_attributes_type": "a section with keys",
    "finite_number": "a finite number",
    "missing": "a longer list",
}


def _expected(kind: str, message: str) -> str:
    if kind in _EXPECTED:
        return _EXPECTED[kind]
    expected = message.removeprefix("Input should be ")
    if kind.startswith(("greater_than", "less_than")):
        return f"a number {expected}"
    if expected == message:  # pydantic's words for lengths: "Tuple should have at least 1 item …"
        expected = message.removeprefix("Tuple should have ").partition(" after validation")[0]
        return f"a list of {expected}" if expected != message else message
    return expected


def _field(key: str) -> Any:
    section: type[_Section] | None = TrainConfig
    field = None
    for name in key.split("."):
        if section is None or name not in section.model_fields:
            return None
        field = section.model_fields[name]
        section = _section_of(field.annotation)
    return field


def _show(value: Any) -> str:
    kind = {dict: "a section", list: "a list", str: "a text", types.NoneType: "null"}.get(
        type(value)
    )
    if value is None:
        return "null"
    text = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
    return f"{text} ({kind})" if kind else text


def _flatten(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _dotted_keys(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, below in value.items():
            yield str(name)
            yield from (f"{name}.{key}" for key in _dotted_keys(below))
