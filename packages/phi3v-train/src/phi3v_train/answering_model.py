"""What to answer with, by whatever folder someone has at hand.

find_answering_model("runs/full")            # its model/, cut as its config.yaml says
find_answering_model("runs/lora")            # its adapter/ on the base that this names
find_answering_model("runs/lora/adapter")    # the same, but for the crops
find_answering_model("models/phi-3.5-vision", "runs/lora")
"""

from dataclasses import dataclass
from pathlib import Path

from phi3v_train.lora import base_of_adapter
from phi3v_train.run_folder import read_run

NUM_CROPS = 16
"""Crops an image is cut into where nothing says how many; as in the recipe."""


@dataclass(frozen=True, slots=True)
class AnsweringModel:
    """A model folder, and perhaps adapters to put on."""

    folder: Path
    adapter: Path | None = None
    num_crops: int | None = None
    """That it was trained with; None: not known."""


def find_answering_model(model: str | Path, adapter: str | Path | None = None) -> AnsweringModel:
    """Find the model that a folder stands for.

    Args:
        model: a model folder; a run, finished; or an adapter folder, whose base is where it says.
        adapter: an adapter folder, or a run that wrote one, to put on `model`.

    Raises:
        ValueError: a run that has no result yet, or adapters twice, or whose base is elsewhere.
    """
    model = Path(model)
    if adapter is not None:
        if _is_run(model) or _is_adapter(model):
            raise ValueError(
                f"{model} is not a model folder; with an adapter name the base that it goes on"
            )
        adapter = Path(adapter)
        if _is_run(adapter):
            return AnsweringModel(model, _result_of(adapter), _crops_of(adapter))
        return AnsweringModel(model, adapter)
    if _is_adapter(model):
        return AnsweringModel(_base_of(model), model)
    if not _is_run(model):
        return AnsweringModel(model)
    result, num_crops = _result_of(model), _crops_of(model)
    if _is_adapter(result):
        return AnsweringModel(_base_of(result), result, num_crops)
    return AnsweringModel(result, None, num_crops)


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and not (folder / "config.json").is_file()


def _result_of(run: Path) -> Path:
    for name in ("adapter", "model"):
        if (run / name).is_dir():
            return run / name
    raise ValueError(
        f"{run} has no model/ or adapter/: it is not finished; run its `phi3v-train launch` again "
        f"to go on, or write its newest checkpoint with `phi3v-train export {run} --out_dir NEW`"
    )


def _crops_of(run: Path) -> int | None:
    data = read_run(run).config.get("data")
    num_crops = data.get("num_crops") if isinstance(data, dict) else None
    return num_crops if isinstance(num_crops, int) else None


def _base_of(adapter: Path) -> Path:
    name = base_of_adapter(adapter)
    if not name or not (Path(name) / "config.json").is_file():
        raise ValueError(
            f"{adapter} was trained on {name or 'a model that it does not name'}, which is no "
            f"model folder here; name both: --model BASE --adapter {adapter}"
        )
    return Path(name)
