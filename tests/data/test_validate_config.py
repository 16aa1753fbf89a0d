from pathlib import Path

import pytest
from phi3v_data.rules import RULES
from phi3v_data.validate_config import ValidateConfig, load_config


def write(folder: Path, table: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text(f"[tool.phi3v-data.validate]\n{table}\n")
    return folder


def levels(config: ValidateConfig, file: str = "x.jsonl") -> dict[str, str]:
    return {rule.code: rule.severity for rule in config.rules_for(file)}


def test_without_a_file_all_default_rules_run_with_their_own_severity(tmp_path: Path):
    config = load_config(tmp_path)

    assert levels(config) == {rule.code: rule.severity for rule in RULES if rule.is_default}
    assert (config.num_crops, config.max_errors, config.format) == (16, None, "text")


def test_the_nearest_file_that_has_the_table_is_read(tmp_path: Path):
    write(tmp_path, "num_crops = 4")
    inner = tmp_path / "a/b/c"
    inner.mkdir(parents=True)
    (tmp_path / "a/pyproject.toml").write_text("[project]\nname = 'x'\n")

    assert load_config(inner).num_crops == 4
    write(tmp_path / "a/b", "num_crops = 8")
    assert load_config(inner).num_crops == 8
    assert load_config(inner).max_errors is None


def test_keys_are_written_with_either_dash(tmp_path: Path):
    write(tmp_path, "max-errors = 3\nnum-crops = 4\nper_file_ignores = {'x*' = ['T']}")
    config = load_config(tmp_path)

    assert (config.max_errors, config.num_crops) == (3, 4)
    assert config.per_file_ignores == {"x*": ("T",)}


def test_the_command_line_wins_setting_by_setting_and_code_by_code(tmp_path: Path):
    write(tmp_path, "select = ['T']\nignore = ['T102']\nseverity = {T101 = 'off', T103 = 'off'}")
    config = load_config(
        tmp_path, {"ignore": ["T104"], "select": None, "severity": {"T101": "warning"}}
    )

    assert config.select == ("T",)
    assert config.ignore == ("T104",)
    assert config.severity == {"T101": "warning", "T103": "off"}
    assert levels(config)["T101"] == "warning"
    assert "T103" not in levels(config)
    assert "T104" not in levels(config)
    assert "T102" in levels(config)


def test_the_longest_beginning_of_a_code_decides_its_severity():
    config = ValidateConfig(severity={"T": "warning", "T10": "off", "T102": "error"})
    chosen = levels(config)

    assert chosen["T102"] == "error"
    assert "T101" not in chosen
    assert chosen["P101"] == "error"


def test_a_rule_that_is_off_by_default_runs_where_it_is_named(monkeypatch: pytest.MonkeyPatch):
    from dataclasses import replace

    from phi3v_data import rules

    quiet = replace(RULES[0], code="Z101", is_default=False)
    monkeypatch.setattr(rules, "RULES", (*RULES, quiet))

    assert "Z101" not in levels(ValidateConfig())
    assert "Z101" not in levels(ValidateConfig(select=("Z", "P")))  # its cost is for who wants it
    assert "Z101" in levels(ValidateConfig(select=("Z101",)))
    assert levels(ValidateConfig(severity={"Z101": "warning"}))["Z101"] == "warning"
    assert "Z101" not in levels(ValidateConfig(severity={"Z": "warning"}))


def test_unused_switches_one_rule_on_whatever_else_is_selected():
    assert levels(ValidateConfig(unused=True))["I110"] == "warning"
    assert levels(ValidateConfig(unused=True, select=("P101",))).keys() == {"P101", "I110"}
    assert levels(ValidateConfig(unused=True, severity={"I": "error"}))["I110"] == "error"
    assert "I110" not in levels(ValidateConfig(unused=True, ignore=("I",)))


def test_rules_are_ignored_by_file_from_the_folder_of_the_settings(tmp_path: Path):
    write(tmp_path, "[tool.phi3v-data.validate.per-file-ignores]\n'sub/*.jsonl' = ['T101']\n"
          "'test*' = ['T104', 'I']")  # fmt: skip
    config = load_config(tmp_path / "sub")

    assert "T101" not in levels(config, str(tmp_path / "sub/x.jsonl"))
    assert "T101" in levels(config, str(tmp_path / "x.jsonl"))
    assert "T101" in levels(config, "/elsewhere/sub/x.jsonl")
    ignored = levels(config, "/elsewhere/test_1.jsonl")
    assert "T104" not in ignored
    assert not any(code.startswith("I") for code in ignored)


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ("selct = ['T']", "unknown key 'selct'; did you mean select?"),
        ("colour = 1", "unknown key 'colour'; expected one of select, ignore, severity"),
        ("root = '/'", "unknown key 'root'"),
        ("max-errors = 0", "max_errors: Input should be greater than or equal to 1, got 0"),
        ("max-errors = 1\nmax_errors = 2", "max_errors is given twice, with - and with _"),
        ("severity = {T101 = 'loud'}", "severity.T101: Input should be 'error', 'warning' or"),
        ("select = 'T'", "select: Input should be a valid tuple, got 'T'"),
        ("format = 'html'", "format: Input should be 'text', 'concise', 'json', 'sarif' or"),
    ],
)
def test_a_wrong_setting_is_an_error_that_names_the_file(tmp_path: Path, table: str, problem: str):
    write(tmp_path, table)
    with pytest.raises(ValueError, match=r"pyproject\.toml") as caught:
        load_config(tmp_path)

    assert str(caught.value).startswith(f"{tmp_path}/pyproject.toml: [tool.phi3v-data.validate]: ")
    assert problem in str(caught.value)


def test_a_file_that_is_not_toml_is_named(tmp_path: Path):
    (tmp_path / "pyproject.toml").write_text("[tool")

    with pytest.raises(ValueError, match=r"pyproject\.toml: not TOML: "):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"select": ("T1O1",)},
        {"ignore": ("T1O1",)},
        {"severity": {"T1O1": "off"}},
        {"per_file_ignores": {"*": ("T1O1",)}},
    ],
)
def test_a_code_that_no_rule_has_is_an_error_with_the_nearest(settings: dict[str, object]):
    with pytest.raises(ValueError, match=r"'T1O1'; did you mean T101\?"):
        ValidateConfig(**settings).rules()  # type: ignore[arg-type]
