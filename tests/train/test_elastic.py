from pathlib import Path

from phi3v_train.checkpoint import checkpoint_folder
from phi3v_train.elastic import describe_end
from phi3v_train.restarts import has_started, note_start


def test_the_end_of_a_process_is_told_in_words() -> None:
    assert describe_end(3) == "ended with status 3"
    assert describe_end(-9) == "was killed by signal 9 (SIGKILL)"


def test_an_attempt_after_the_first_does_not_overwrite_what_that_did(tmp_path: Path) -> None:
    checkpoint_folder(tmp_path).mkdir()
    first = {"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "0"}
    second = {**first, "TORCHELASTIC_RESTART_COUNT": "1"}
    assert not has_started(tmp_path, second)
    note_start(tmp_path, first)
    assert has_started(tmp_path, second)
    assert not has_started(tmp_path, first)
    assert not has_started(tmp_path, {**second, "TORCHELASTIC_RUN_ID": "b"})
    assert not has_started(tmp_path, {})
