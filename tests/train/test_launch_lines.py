"""Every `phi3v-train launch` line of the documentation is a configuration that loads."""

import re
import shlex
from pathlib import Path

import pytest
from phi3v_train.cli import launch_command, main
from phi3v_train.config import load_config
from phi3v_train.recipe_flags import RecipeFlags, translate

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("packages/*/README.md")])
FENCE = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TRAINING = (ROOT / "docs" / "training.md").read_text()


def launch_lines() -> list[str]:
    blocks = (block for page in PAGES for block in FENCE.findall(page.read_text()))
    lines = (line for block in blocks for line in block.replace("\\\n", " ").splitlines())
    return sorted({line for line in lines if line.startswith("phi3v-train launch ")})


@pytest.mark.parametrize("line", launch_lines())
def test_a_documented_run_is_configured(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"^```yaml\n(# ucf101\.yaml\n.*?)^```$", TRAINING, re.M | re.S)
    words = shlex.split(line, comments=True)
    context = launch_command.make_context(
        "launch", words[2:], parent=main.make_context("phi3v-train", words[1:2])
    )
    arguments: tuple[str, ...] = context.params["arguments"]
    config_path = next((word for word in arguments[:1] if "=" not in word), None)
    overrides = list(arguments[1:] if config_path else arguments)
    if config_path is not None:
        Path(config_path).write_text(example)
    flags = {name: context.params[name] for name in RecipeFlags.__dataclass_fields__}
    recipe = RecipeFlags(**flags)
    if recipe.data_dir is not None:
        flagged = translate(recipe, has_gpu=True).overrides
        overrides = [*flagged, "model=m", "data.train=t", "data.eval=e", *overrides]
    config = load_config(config_path, overrides)
    for setting in overrides:
        section, _, name = setting.partition("=")[0].rpartition(".")
        place = config
        for part in filter(None, section.split(".")):
            place = getattr(place, part)
        assert name in place.model_fields_set
