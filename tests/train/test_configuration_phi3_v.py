import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from phi3v_train.configuration_phi3_v import Phi3VConfig
from phi3v_train.methods import load_model, read_model_config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
        ({"attention_dropout": 0.1}, r"attention_dropout: expected 0\.0, got 0\.1"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: expected False, got True"),
        ({"sliding_window": 2047}, r"sliding_window: expected null or at least .*131072.*got 2047"),
        (
            {"embd_layer": {"hd_transform_order": "glb_sub"}},
            "embd_layer.hd_transform_order: expected 'sub_glb', got 'glb_sub'",
        ),
        (
            {"vision_config": {"hidden_act": "gelu"}},
            "vision_config.hidden_act: expected 'quick_gelu', got 'gelu'",
        ),
    ],
)
def test_a_variant_that_is_not_computed_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Phi3VConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"sliding_window": None},
        {"sliding_window": 131072},  # Phi-3-vision
        {"sliding_window": 262144},  # Phi-3.5-vision
        {"attention_dropout": 0},
        {"embd_layer": {"hd_transform_order": "sub_glb"}},
    ],
)
def test_what_the_published_files_say_is_taken(fields: dict[str, Any]) -> None:
    config = Phi3VConfig(**fields)
    again = Phi3VConfig(**json.loads(config.to_json_string()))
    assert {name: getattr(again, name) for name in fields} == fields


def test_a_folder_of_such_a_variant_is_refused_before_its_weights_are_read(
    tiny: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"sliding_window": 1024}))
    (folder / "model.safetensors").write_bytes(b"not weights")
    for read in (read_model_config, load_model):
        with pytest.raises(ValueError, match=r"config\.json, sliding_window"):
            read(folder)
