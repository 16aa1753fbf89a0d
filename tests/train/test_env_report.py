import json
from pathlib import Path

import pytest
from phi3v_train.env_report import add_attempt, environment, read_attempts


def test_the_record_names_versions_and_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("SOME_API_KEY", "secret")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "noise")
    record = environment()
    assert {"torch", "transformers", "phi3v-train"} <= record["packages"].keys()
    assert record["variables"]["NCCL_DEBUG"] == "WARN"
    assert "secret" not in json.dumps(record)
    assert "noise" not in json.dumps(record)
    assert record["processes"] == 1
    assert record["cores"] >= 1


def test_each_attempt_is_added_behind_the_others(tmp_path: Path) -> None:
    path = tmp_path / "env.json"
    add_attempt(path, {"host": "a"}, start_step=0)
    add_attempt(path, {"host": "b"}, start_step=30)
    found = [(a["host"], a["start_step"]) for a in read_attempts(path)]
    assert found == [("a", 0), ("b", 30)]


def test_a_file_that_is_something_else_is_named(tmp_path: Path) -> None:
    path = tmp_path / "env.json"
    assert read_attempts(path) == []
    for text in ("[]", "{}", "not json", '{"attempts": 3}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"env\.json is not the env\.json of a run"):
            read_attempts(path)
