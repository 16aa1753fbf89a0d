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
    """Low-rank adapters; read where `method.name` is `lora`."""

    rank: Count = 64
    """Rank of every adapter."""

    alpha_ratio: Positive = 2.0
    """Scale of the adapters: alpha = round(rank x alpha_ratio)."""

    dropout: Fraction = 0.0
    """Dropout in front of every adapter."""

    targets: Annotated[Parts, Field(min_length=1)] = ("llm", "vision", "projector")
    """Parts whose linear layers get an adapter. A part in `method.freeze` gets none."""

    @property
    def alpha(self) -> int:
        """PEFT's `lora_alpha`."""
        return round(self.rank * self.alpha_ratio)


class MethodConfig(_Section):
    """What trains."""

    name: Literal["full", "lora"] = "full"
    """`full` trains the weights themselves, `lora` trains adapters beside them."""

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
        return self

    @property
    def trained_parts(self) -> tuple[Part, ...]:
        """The parts that train, or that get adapters, in a fixed order."""
        wanted = self.lora.targets if self.name == "lora" else typing.get_args(Part)
        return tuple(p for p in typing.get_args(Part) if p in wanted and p not in self.freeze)


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
    """Mix samples only with those of shards so near in the epoch's order; none: all with all."""

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

    num_workers: Annotated[int, Field(ge=0)] = 2
    """Processes per rank that decode and encode; 0 does it in the training process."""

    prefetch_mib: Count = 512
    """Memory per rank, in MiB, for rows that workers make ahead of the step that needs them."""


class OptimConfig(_Section):
    """AdamW and its learning rate."""

    learning_rate: Positive = 4e-5
    """The rate after warm-up."""

    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    """Decoupled weight decay."""

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


class CheckpointConfig(_Section):
    """When the run's state is saved. It is saved at the end and on an interrupt in any case."""

    every_steps: Count | None = None
    """Steps between two checkpoints; none: only at the end."""

    keep: Count = 2
    """Newest checkpoints that stay on disk."""


class EvalConfig(_Section):
    """Generation over `data.eval`, compared with the answers."""

    before: bool = False
    """Evaluate before the first step too, into `eval_before.json`."""

    after: bool = True
    """Evaluate after the last step, into `eval_after.json` (where `data.eval` is set)."""

    metric: Literal["accuracy"] = "accuracy"
    """What is computed from answers and predictions."""

    max_new_tokens: Count = 64
    """Longest answer generated, in tokens."""

    limit: Count | None = None
    """Evaluate only the first so many samples."""


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
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()

    @_model_validator(mode="after")
    def _evaluation_has_data(self) -> "TrainConfig":
        if self.eval.before and self.data.eval is None:
            raise ValueError("eval.before is set, but data.eval is not; name a shard directory")
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
    "checkpoint",
    "eval",
)
"""Everything else counts as training maths: a new setting does until it is listed here."""


def training_maths(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide what the weights become, as one flat `{dotted key: value}`."""
    flat = dict(_flatten(config.model_dump(mode="json")))
    if config.method.name != "lora":
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
