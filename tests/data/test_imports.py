import importlib
import subprocess
import sys

import phi3v_data
import pytest


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.strip()


def test_importing_phi3v_data_loads_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "cv2", "pyarrow", "PIL", "numpy", "rich"]
    code = f"import sys, phi3v_data; print([m for m in {heavy} if m in sys.modules])"
    assert run_python(code) == "[]"


def test_the_command_line_loads_nothing_heavy_until_a_command_runs() -> None:
    heavy = ["torch", "transformers", "cv2", "pyarrow", "PIL", "numpy", "rich", "pydantic"]
    code = f"import sys, phi3v_data.cli; print([m for m in {heavy} if m in sys.modules])"
    assert run_python(code) == "[]"


def test_help_of_every_command_loads_nothing_heavy() -> None:
    heavy = ["torch", "cv2", "pyarrow", "PIL", "numpy", "rich", "pydantic", "msgspec", "fsspec"]
    code = f"""
import sys
from click.testing import CliRunner
from phi3v_data.cli import main
for command in ("", *sorted(set(main.commands) - {{"convert"}})):  # that one loads the converters
    done = CliRunner().invoke(main, [*command.split(), "--help"])
    assert done.exit_code == 0 and "Usage: " in done.output, done.output
print([m for m in {heavy} if m in sys.modules])
"""
    assert run_python(code) == "[]"


def test_the_converters_load_no_decoder_until_they_convert() -> None:
    code = (
        "import sys, phi3v_data.convert, phi3v_data.converters.ucf101; print('cv2' in sys.modules)"
    )
    assert run_python(code) == "False"


@pytest.mark.parametrize("name", phi3v_data.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(phi3v_data, name) is not None
    assert name in dir(phi3v_data)


def test_functions_keep_their_names_when_modules_of_the_same_name_are_imported() -> None:
    importlib.import_module("phi3v_data.convert")
    assert callable(phi3v_data.convert)
    code = "import phi3v_data.convert; from phi3v_data import convert; print(convert.__name__)"
    assert run_python(code) == "convert"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'convrt'"):
        _ = phi3v_data.convrt  # pyright: ignore[reportAttributeAccessIssue]
