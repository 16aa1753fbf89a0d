"""A model as the files that transformers loads: settings and weights.

    write_model_files(model, Path("merged"))

    merged/config.json  generation_config.json
           model.safetensors        above 5 GB: model-00001-of-00002.safetensors …, and their index

The same files as `model.save_pretrained` writes, which on its way imports DeepSpeed wherever that
is installed, to see that the model is not wrapped by it: seconds, and a warning that there is no
GPU.
"""

from pathlib import Path

from huggingface_hub import save_torch_state_dict
from transformers import PreTrainedModel


def write_model_files(model: PreTrainedModel, folder: Path) -> None:
    """Write settings and weights into a folder that exists.

    Args:
        model: that nothing wraps, with whole weights of one dtype.
        folder: other files in it stay.
    """
    config = model.config
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    save_torch_state_dict(model.state_dict(), folder)
