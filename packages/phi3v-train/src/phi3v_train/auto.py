"""The model in transformers' Auto classes, without importing transformers first.

    import phi3v_train
    from transformers import AutoModelForCausalLM, AutoProcessor

    model = AutoModelForCausalLM.from_pretrained(folder)      # no trust_remote_code
    processor = AutoProcessor.from_pretrained(folder)

transformers takes seconds to import, and `phi3v-train --help` needs none of it. So registration
waits for the Auto module in question: our module is imported right behind it, and registers its
classes at its own end.
"""

from collections.abc import Callable
from importlib import import_module

import wrapt

_REGISTERS_WITH = {
    "configuration_auto": "configuration_phi3_v",
    "modeling_auto": "modeling_phi3_v",
    "image_processing_auto": "image_processing_phi3_v",
    "processing_auto": "processing_phi3_v",
}
"""Module of `transformers.models.auto` -> the module of ours whose import registers its classes."""


def register_on_import() -> None:
    """Register the model's classes as soon as transformers' Auto classes are imported, or now."""
    for theirs, ours in _REGISTERS_WITH.items():
        wrapt.register_post_import_hook(_importer(ours), f"transformers.models.auto.{theirs}")


def _importer(name: str) -> Callable[[object], None]:
    def run(_: object) -> None:
        import_module(f"phi3v_train.{name}")

    return run
