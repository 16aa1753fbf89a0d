import json
import shutil
import subprocess
import sys
from pathlib import Path

import phi3v_train
import pytest
import torch
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tests.train.parity import PARITY, needs_parity, read_json, run_lengths

LLAMA_FILES = {
    # What the published folder says and transformers 5 would follow into remote code, flash
    # attention, or another tokenizer.
    "config.json": {
        "_attn_implementation": "flash_attention_2",
        "auto_map": {
            "AutoConfig": "configuration_phi3_v.Phi3VConfig",
            "AutoModelForCausalLM": "modeling_phi3_v.Phi3VForCausalLM",
        },
    },
    "tokenizer_config.json": {
        "auto_map": {"AutoProcessor": "processing_phi3_v.Phi3VProcessor"},
        "tokenizer_class": "LlamaTokenizer",
    },
    "preprocessor_config.json": {
        "auto_map": {
            "AutoProcessor": "processing_phi3_v.Phi3VProcessor",
            "AutoImageProcessor": "processing_phi3_v.Phi3VImageProcessor",
        }
    },
    "processor_config.json": {"auto_map": {"AutoProcessor": "processing_phi3_v.Phi3VProcessor"}},
}


@pytest.fixture(scope="module")
def published(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with side files that say what the published ones say."""
    folder = tmp_path_factory.mktemp("published") / "model"
    shutil.copytree(tiny, folder)
    for name, fields in LLAMA_FILES.items():
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    assert json.loads((folder / "config.json").read_text())["rope_scaling"]["type"] == "su"
    return folder


def test_the_auto_classes_load_a_published_folder_without_remote_code(published: Path) -> None:
    assert type(AutoConfig.from_pretrained(published)) is phi3v_train.Phi3VConfig
    model = AutoModelForCausalLM.from_pretrained(published)
    assert type(model) is phi3v_train.Phi3VForCausalLM
    assert model.config._attn_implementation == "sdpa"
    assert type(AutoModelForImageTextToText.from_pretrained(published)) is type(model)
    assert type(AutoProcessor.from_pretrained(published)) is phi3v_train.Phi3VProcessor
    assert AutoImageProcessor.from_pretrained(published).num_crops == 4


def test_the_tokenizer_is_the_pipeline_of_its_file_whatever_class_is_named(published: Path) -> None:
    text = "<|user|>\nWhat is in the image?<|end|>\n<|assistant|>\nA red square.<|end|>\n"
    expected = Tokenizer.from_file(str(published / "tokenizer.json")).encode(text).ids
    assert AutoTokenizer.from_pretrained(published)(text).input_ids == expected
    assert AutoProcessor.from_pretrained(published).tokenizer(text).input_ids == expected


def test_num_crops_given_on_loading_takes_the_place_of_the_files(published: Path) -> None:
    assert AutoProcessor.from_pretrained(published, num_crops=9).image_processor.num_crops == 9


@pytest.mark.parametrize(
    "imports",
    [
        "import phi3v_train; from transformers import AutoProcessor, AutoModelForCausalLM",
        pytest.param(
            "from transformers import AutoModelForCausalLM, AutoProcessor; import phi3v_train",
            marks=[pytest.mark.slow, pytest.mark.long],
        ),
        pytest.param(
            "import phi3v_train.modeling_phi3_v, peft", marks=[pytest.mark.slow, pytest.mark.long]
        ),
        pytest.param(
            "import phi3v_train.processing_phi3_v", marks=[pytest.mark.slow, pytest.mark.long]
        ),
    ],
)
def test_the_order_of_imports_does_not_matter(imports: str, published: Path) -> None:
    code = f"""
{imports}
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer
folder = {str(published)!r}
print(type(AutoConfig.from_pretrained(folder)).__module__)
print(type(AutoModelForCausalLM.from_pretrained(folder)).__module__)
print(type(AutoProcessor.from_pretrained(folder)).__module__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "phi3v_train.configuration_phi3_v",
        "phi3v_train.modeling_phi3_v",
        "phi3v_train.processing_phi3_v",
    ]


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, phi3v_train.cli; print({'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@needs_parity
@pytest.mark.parametrize("name", ["phi-3.5-vision", "phi-3-vision"])
def test_the_published_side_files_load_as_they_are(name: str) -> None:
    folder = PARITY / name
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is phi3v_train.Phi3VConfig
    assert (config.hidden_size, config.image_token_id, config.pad_token_id) == (3072, 32044, 32000)
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is phi3v_train.Phi3VProcessor
    assert processor.image_processor.num_crops == {"phi-3.5-vision": 4, "phi-3-vision": 16}[name]
    assert processor.tokenizer.convert_tokens_to_ids("<|image|>") == config.image_token_id


@needs_parity
def test_the_auto_tokenizer_gives_the_recorded_ids() -> None:
    tokenizer = AutoTokenizer.from_pretrained(PARITY / "phi-3.5-vision")
    checked = 0
    for case in read_json("chat/conversations.json")["conversations"]:
        rendered = tokenizer.apply_chat_template(
            case["messages"], tokenize=False, add_generation_prompt=case["add_generation_prompt"]
        )
        assert rendered == case["text"]
        if not case["images"]:
            assert tokenizer(case["text"]).input_ids == run_lengths(case["input_ids_rle"])
            checked += 1
    assert checked > 5


@needs_parity
def test_the_reference_model_loads_with_the_published_fields(tmp_path: Path) -> None:
    fields = read_json("model/config.json") | LLAMA_FILES["config.json"]
    fields["vision_config"] = read_json("model/vision_config.json")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    shutil.copy(PARITY / "model/weights.safetensors", tmp_path / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert type(model) is phi3v_train.Phi3VForCausalLM
    assert model.dtype == torch.bfloat16
