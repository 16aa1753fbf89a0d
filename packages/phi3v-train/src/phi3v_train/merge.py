"""Adapters added into the weights they stand beside: a model folder that needs no PEFT.

    merge(Path("runs/lora/adapter"), Path("merged"))

    adapter folder + its base  ->  float32 sums  ->  the base's dtype  ->  Hugging Face folder

Summed in float32, whatever the base is saved in: in bfloat16 most of a small change is rounded
away, once here and once more for every layer that reads it. Adapters of QLoRA are added to the base
as it was saved, not to its 4-bit copy. Before anything is written the logits of a random row must
agree: adapters beside the base, and merged.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from phi3v_train.export import check_export, export_model
from phi3v_train.lora import base_of_adapter, merge_adapters, open_adapter
from phi3v_train.methods import load_model, move, read_model_config
from phi3v_train.modeling_phi3_v import Phi3VForCausalLM
from phi3v_train.probe import largest_difference, probe

TOLERANCE = 1e-3
"""Of float32 logits, as a share of the largest: rounding is a hundredth of it, a wrong scale or a
missing layer ten times more."""


@dataclass(frozen=True, slots=True)
class Merged:
    """What was written, and how far it is from the model with adapters."""

    path: Path
    base: Path
    dtype: torch.dtype
    """Of the written weights."""
    difference: float
    """Largest difference of the logits in float32, as a share of the largest logit."""
    difference_as_saved: float
    """The same once the weights have the written dtype."""
    is_checked: bool
    """Whether the folder was read again and compared."""

    def __str__(self) -> str:
        checked = "; read again and found equal" * self.is_checked
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.path}: {self.base} with its adapters added; logits of a random row differ by "
            f"{self.difference:.1e} in float32 and {self.difference_as_saved:.1e} as saved "
            f"({dtype}), relative to the largest{checked}"
        )


def merge(
    adapter: Path, out_dir: Path, *, model: Path | None = None, check: bool = False
) -> Merged:
    """Write a model folder in which the adapters are part of the weights.

    Args:
        adapter: PEFT folder, or a run that wrote one.
        out_dir: the folder to make.
        model: the base; None: the one that the adapter names.
        check: read the written folder again and compare it.

    Raises:
        ValueError: no adapter, another base, a folder that is in use, or logits that differ.
    """
    folder = adapter / "adapter" if (adapter / "adapter").is_dir() else adapter
    base = model if model is not None else _base_of(folder)
    refuse_existing(out_dir)
    dtype = read_model_config(base).dtype or torch.float32
    assert isinstance(dtype, torch.dtype)
    adapted = open_adapter(load_model(base), folder)
    merged, difference, as_saved = merge_checked(adapted, dtype)
    export_model(merged, base, out_dir, dtype)
    if check:
        check_export(out_dir, merged, base)
    return Merged(out_dir, base, dtype, difference, as_saved, check)


def merge_checked(adapters: object, dtype: torch.dtype) -> tuple[Phi3VForCausalLM, float, float]:
    """Merge float32 adapters into their float32 base, in place, and cast.

    Args:
        adapters: PEFT model.
        dtype: of the result.

    Returns:
        The model, and the largest difference of its logits before and after the cast.

    Raises:
        ValueError: the float32 logits differ by more than rounding.
    """
    expected = probe(adapters.get_base_model())  # pyright: ignore[reportAttributeAccessIssue]
    merged = merge_adapters(adapters)
    difference = largest_difference(expected, probe(merged))
    if not difference <= TOLERANCE:  # NaN too
        raise ValueError(
            f"the merged model is another: its logits differ by {difference:.1e} of the largest, "
            f"expected at most {TOLERANCE:.0e}; nothing was written, please report this"
        )
    move(merged, dtype)
    return merged, difference, largest_difference(expected, probe(merged))


def refuse_existing(out_dir: Path) -> None:
    """A folder that holds something stays as it is.

    Raises:
        ValueError: it exists and is not an empty folder.
    """
    if out_dir.exists() and not (out_dir.is_dir() and not any(out_dir.iterdir())):
        raise ValueError(f"{out_dir} exists already; remove it, or name a new folder")


def _base_of(folder: Path) -> Path:
    name = base_of_adapter(folder)
    if not name or not (Path(name) / "config.json").is_file():
        raise ValueError(
            f"{folder} was trained on {name or 'a model that it does not name'}, which is no model "
            "folder here; say where it is with --model"
        )
    return Path(name)
