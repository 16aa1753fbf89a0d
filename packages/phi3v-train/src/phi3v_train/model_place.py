"""A model by the name that the recipe gives it: a folder, or a repository on the Hugging Face hub.

    find_model("models/phi-3.5-vision")                     # that folder
    find_model("microsoft/Phi-3.5-vision-instruct")         # its snapshot in the hub's cache

A repository is downloaded into the hub's own cache (`HF_HOME`) the first time, and found there
later; with `HF_HUB_OFFLINE=1` it is only looked for.
"""

import re
from pathlib import Path

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")

PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.md", "*_phi3_v.py", "LICENSE*")
"""Files of a repository that are wanted. Its Python code is never run: exports hand it on."""


def find_model(name: str) -> Path:
    """The folder of a model.

    Raises:
        ValueError: no such folder, and no such repository that can be reached.
    """
    if Path(name).is_dir():
        return Path(name)
    if not _REPOSITORY.fullmatch(name):
        raise ValueError(f"no model folder at {name}; name a folder, or OWNER/NAME on the hub")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(PATTERNS)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{name} is no folder here, and not to be had from the hub: {type(error).__name__}; "
            f"download it elsewhere (`hf download {name} --local-dir FOLDER`) and name the folder"
        ) from error
