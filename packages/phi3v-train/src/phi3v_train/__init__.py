"""phi3v_train: fine-tune Phi-3.5-vision on multi-image and video data.

    import phi3v_train                       # light: torch is imported when a name is used
    model = phi3v_train.Phi3VForCausalLM.from_pretrained(folder)

Each name is imported from its module when first used: transformers alone takes seconds. After this
import, transformers' Auto classes know the model too (see `auto`).
"""

from importlib import import_module
from typing import TYPE_CHECKING

from phi3v_train.auto import register_on_import

if TYPE_CHECKING:
    from phi3v_train.chat import ChatEncoder as ChatEncoder
    from phi3v_train.collator import Batch as Batch
    from phi3v_train.collator import SampleEncoder as SampleEncoder
    from phi3v_train.collator import collate as collate
    from phi3v_train.config import TrainConfig as TrainConfig
    from phi3v_train.config import load_config as load_config
    from phi3v_train.configuration_phi3_v import Phi3VConfig as Phi3VConfig
    from phi3v_train.evaluate import evaluate_model as evaluate_model
    from phi3v_train.modeling_phi3_v import Phi3VForCausalLM as Phi3VForCausalLM
    from phi3v_train.processing_phi3_v import Phi3VProcessor as Phi3VProcessor
    from phi3v_train.trainer import train as train

_HOME = {
    "Batch": "collator",
    "ChatEncoder": "chat",
    "Phi3VConfig": "configuration_phi3_v",
    "Phi3VForCausalLM": "modeling_phi3_v",
    "Phi3VProcessor": "processing_phi3_v",
    "SampleEncoder": "collator",
    "TrainConfig": "config",
    "collate": "collator",
    "evaluate_model": "evaluate",
    "load_config": "config",
    "train": "trainer",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'phi3v_train' has no attribute {name!r}")
    value = getattr(import_module(f"phi3v_train.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)


register_on_import()
