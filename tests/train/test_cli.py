import subprocess
import sys

import pytest
from click.testing import CliRunner
from phi3v_train.cli import main


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("command", [(), ("init",), ("init", "tiny"), ("launch",), ("eval",)])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_command_has_help(command, flag):
    result = run(*command, flag)
    assert result.exit_code == 0
    assert "Usage:" in result.output


@pytest.mark.parametrize("command", [("init", "tiny"), ("launch",), ("eval",)])
def test_help_shows_how_to_call_the_command(command):
    output = run(*command, "--help").output
    assert f"\n    phi3v-train {' '.join(command)} " in output
    assert "\\b" not in output


def test_help_and_configuration_errors_load_neither_torch_nor_transformers():
    program = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from phi3v_train.cli import main\n"
        "for arguments in (['--help'], ['launch', '--help'], ['launch', 'modl=m']):\n"
        "    print(CliRunner().invoke(main, arguments).exit_code)\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'pydantic_core'} & sys.modules.keys()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["0", "0", "1", "['pydantic_core']"]


def test_a_mistake_in_the_configuration_is_one_line_and_status_1(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text("model: m\noutput_dir: o\ndata: {train: d}\noptim: {learning_rte: 1}\n")
    result = run("launch", path)
    assert result.exit_code == 1
    assert result.output == (
        f"Error: unknown key 'optim.learning_rte' in {path}, line 4; "
        "did you mean 'optim.learning_rate'?\n"
    )


def test_a_missing_file_and_a_missing_value_are_named(tmp_path):
    assert "no configuration file at" in run("launch", tmp_path / "x.yaml").output
    assert "missing key 'model' in the overrides" in run("launch", "output_dir=o").output


def test_a_file_may_have_an_equals_sign_in_its_name(tmp_path):
    path = tmp_path / "lr=1.yaml"
    path.write_text("nonsense: 1\n")
    assert "unknown key 'nonsense'" in run("launch", path).output


def test_evaluation_before_training_can_be_asked_for_by_flag():
    result = run("launch", "model=m", "output_dir=o", "data.train=d", "--eval-before")
    assert result.exit_code == 1
    assert "eval.before is set, but data.eval is not" in result.output


@pytest.mark.parametrize("spelling", ["--dry_run", "--dry-run"])
def test_both_spellings_of_an_option_work(spelling):
    result = run("launch", "modl=m", spelling)
    assert result.exit_code == 1
    assert "did you mean 'model'?" in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ("launch", "--no_such_option"),
        ("launch", "--nproc", "0"),
        ("eval", "--model", "m"),
        ("init", "tiny"),
        ("no_such_command",),
    ],
)
def test_a_wrong_command_line_is_status_2(arguments):
    assert run(*arguments).exit_code == 2


def test_a_traceback_is_shown_on_request():
    result = run("--traceback", "launch", "modl=m")
    assert isinstance(result.exception, ValueError)


def test_init_tiny_says_what_it_wrote_and_refuses_to_write_over_it(tmp_path):
    result = run("init", "tiny", tmp_path / "tiny", "--seed", 1)
    assert result.exit_code == 0
    assert "310,720 parameters, 512 tokens" in result.output
    again = run("init", "tiny", tmp_path / "tiny")
    assert again.exit_code == 1
    assert again.output.startswith("Error: ")
    assert "exists already; remove it, or name a new folder" in again.output
