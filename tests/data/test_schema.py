import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from phi3v_data import Sample, Turn, json_schema
from pydantic import ValidationError

LINE: dict[str, Any] = {
    "id": "val-0000000300",
    "source": "ucf101",
    "conversations": [
        {"images": ["val/a.0.jpg", "val/a.1.jpg"], "user": "Classify", "assistant": "BabyCrawling"},
        {"images": ["val/b.jpg"], "user": "And this?", "assistant": "yes", "answers": ["yes", "y"]},
    ],
    "metadata": {"fps": 29.97, "frames": 300, "clip": "a", "cut": None, "ok": True},
}

text = st.text(st.characters(exclude_categories=["Cs"]))
turns = st.builds(
    Turn, images=st.lists(text).map(tuple), user=text, assistant=text, answers=st.none()
)
values = (
    st.none()
    | text
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
)
samples = st.builds(
    Sample,
    id=text.filter(bool),
    source=text.filter(bool),
    conversations=st.lists(turns, min_size=1).map(tuple),
    metadata=st.none() | st.dictionaries(text, values),
)


@given(samples)
def test_a_sample_written_as_json_reads_back_equal(sample: Sample):
    line = sample.to_json()

    assert "\n" not in line
    assert Sample.from_json(line) == sample


def test_a_line_reads_as_a_sample_and_keeps_its_keys():
    sample = Sample.from_json(json.dumps(LINE))

    assert sample.images == ("val/a.0.jpg", "val/a.1.jpg", "val/b.jpg")
    assert json.loads(sample.to_json()) == LINE


def test_samples_cannot_be_changed():
    sample = Sample.from_json(json.dumps(LINE))
    with pytest.raises(ValidationError, match="frozen"):
        sample.id = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    "change",
    [
        {"id": ""},
        {"id": 3},
        {"source": ""},
        {"conversations": []},
        {"colour": "red"},
        {"metadata": {"a": []}},
        {"conversations": [{"user": "u", "assistant": 1}]},
        {"conversations": [{"assistant": "a"}]},
        {"conversations": [{"user": "u", "images": "a.jpg", "assistant": "a"}]},
    ],
)
def test_the_json_schema_and_the_reader_refuse_the_same(change: dict[str, Any]):
    line = {**LINE, **change}
    with pytest.raises(ValidationError):
        Sample.from_json(json.dumps(line))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(line, json_schema())


def test_the_json_schema_takes_a_good_line_and_describes_its_fields():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(LINE, schema)

    assert schema["$schema"].endswith("2020-12/schema")
    assert "Unique within a file" in schema["properties"]["id"]["description"]


def test_only_the_last_turn_may_lack_an_answer():
    Sample(id="a", source="s", conversations=(Turn(user="u"),))
    with pytest.raises(ValidationError, match=r"conversations\[0\] has no assistant"):
        Sample(id="a", source="s", conversations=(Turn(user="u"), Turn(user="u", assistant="a")))


def test_assistant_is_the_first_of_answers():
    Turn(user="u", assistant="a", answers=("a", "b"))
    with pytest.raises(ValidationError, match="assistant must be the first of answers"):
        Turn(user="u", assistant="b", answers=("a", "b"))
    with pytest.raises(ValidationError, match="answers is empty"):
        Turn(user="u", assistant="b", answers=())
