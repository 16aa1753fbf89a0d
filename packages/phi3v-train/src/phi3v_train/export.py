"""A trained model as a folder that others load: official names, and the base's own side files."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from phi3v_data.atomic import TEMPORARY_MARK
from safetensors import safe_open
from torch import nn

from phi3v_train.lora import load_adapter, save_adapter
from phi3v_train.methods import load_model
from phi3v_train.model_files import write_model_files
from phi3v_train.modeling_phi3_v import Phi3VForCausalLM
from phi3v_train.probe import largest_difference, probe

SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
    # What `auto_map` of config.json and others names. Nothing here runs it; vLLM and older
    # transformers do, and so an export loads wherever its base does.
    "configuration_phi3_v.py",
    "modeling_phi3_v.py",
    "image_embedding_phi3_v.py",
    "image_processing_phi3_v.py",
    "processing_phi3_v.py",
)
"""Of the base folder, taken over as they are where they exist."""


def export_model(
    model: Phi3VForCausalLM, base: Path, out_dir: Path, dtype: torch.dtype | None
) -> Path:
    """Write a Hugging Face folder, whole or not at all; one that exists is replaced.

    Args:
        model: converted to `dtype` in place, so that what is evaluated next is what was saved.
        base: the folder it was loaded from, for tokenizer and processor files.
        out_dir: the folder to write.
        dtype: of the saved weights; None: as they are.
    """
    if dtype is not None:
        nn.Module.to(model, dtype)
    with _new_folder(out_dir) as folder:
        write_model_files(model, folder)
        _copy_side_files(base, folder)
    return out_dir


def export_adapter(adapters: Any, base: Path, out_dir: Path) -> Path:
    """Write a PEFT adapter folder with the tokenizer beside it, whole or not at all."""
    with _new_folder(out_dir) as folder:
        save_adapter(adapters, folder)
        _copy_side_files(base, folder)
    return out_dir


def check_export(folder: Path, model: Phi3VForCausalLM, base: Path) -> None:
    """Read a written model folder again: same names as the base, same weights, same answers.

    Args:
        folder: of `export_model`.
        model: that was written.
        base: the folder that it started from.

    Raises:
        ValueError: names the first thing that differs.
    """
    _check_side_files(folder, base)
    expected, found = tensor_names(base), tensor_names(folder)
    if expected != found:
        odd = sorted(expected ^ found)
        raise ValueError(
            f"{folder} has other tensors than {base}: {odd[0]} and {len(odd) - 1} more are in one "
            "of them only"
        )
    again = load_model(folder, dtype=None)
    _check_weights(folder, dict(model.named_parameters()), dict(again.named_parameters()))
    _check_logits(folder, model, again)


def check_adapter_export(folder: Path, model: Phi3VForCausalLM, base: Path) -> None:
    """Read a written adapter folder again, on its base: same weights, same answers.

    Args:
        folder: of `export_adapter`.
        model: with the adapters that were written, float32.
        base: the folder that it started from.

    Raises:
        ValueError: names the first thing that differs.
    """
    _check_side_files(folder, base)
    again = load_adapter(load_model(base), folder)
    _check_weights(folder, dict(model.named_parameters()), dict(again.named_parameters()))
    _check_logits(folder, model, again)


def tensor_names(folder: Path) -> set[str]:
    """Names in the weight files of a model folder."""
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    return names


def _check_side_files(folder: Path, base: Path) -> None:
    for name in SIDE_FILES:
        if (base / name).is_file() and (base / name).read_bytes() != (folder / name).read_bytes():
            raise ValueError(f"{folder / name} differs from {base / name}")


def _check_weights(folder: Path, expected: dict[str, Any], found: dict[str, Any]) -> None:
    for name, weight in expected.items():
        if name not in found or not torch.equal(weight, found[name]):
            raise ValueError(f"{folder}: {name} is not what was written")


def _check_logits(folder: Path, model: Phi3VForCausalLM, again: Phi3VForCausalLM) -> None:
    difference = largest_difference(probe(model), probe(again))
    if difference != 0:
        raise ValueError(
            f"{folder}: read again, its logits of a random row differ by {difference:.1e} of the "
            "largest, expected none"
        )


def _copy_side_files(base: Path, folder: Path) -> None:
    for name in SIDE_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that takes the target's place when the block ends well."""
    folder = target.with_name(f".{target.name}{TEMPORARY_MARK}{os.getpid()}")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        # safetensors writes for its owner alone; the folder's other files follow the umask.
        allowed = folder.stat().st_mode & 0o666
        for path in folder.iterdir():
            path.chmod(allowed)
        if target.exists():
            shutil.rmtree(target)
        folder.replace(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
