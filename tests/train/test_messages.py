import pytest
from phi3v_data.schema import Sample, Turn
from phi3v_train.chat import ChatEncoder
from phi3v_train.messages import render_messages


def user(*content: object) -> dict:
    return {"role": "user", "content": list(content)}


def image(**picture: object) -> dict:
    return {"type": "image", **picture}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def test_leading_images_stand_in_one_line_before_the_text() -> None:
    rendered = render_messages([user(image(path="a.jpg"), image(url="b.jpg"), text("Why?"))])
    assert rendered.messages == [{"role": "user", "content": "<|image_1|><|image_2|>\nWhy?"}]
    assert rendered.images == ["a.jpg", "b.jpg"]


def test_images_within_and_behind_the_text_stand_where_they_are() -> None:
    rendered = render_messages([user(text("From "), image(), text(" to "), image())])
    assert rendered.messages[0]["content"] == "From <|image_1|> to <|image_2|>"
    assert rendered.images == []


def test_numbers_run_on_over_the_conversation() -> None:
    rendered = render_messages(
        [
            user(image(image="first"), text("And this?")),
            {"role": "assistant", "content": "A hat."},
            user(image(image="second"), text("This?")),
        ]
    )
    assert [m["content"] for m in rendered.messages] == [
        "<|image_1|>\nAnd this?",
        "A hat.",
        "<|image_2|>\nThis?",
    ]
    assert rendered.images == ["first", "second"]


def test_openai_entries_and_base64_become_addresses() -> None:
    rendered = render_messages(
        [
            user(
                {"type": "image_url", "image_url": {"url": "https://example.org/a.jpg"}},
                {"type": "image_url", "image_url": "data:image/png;base64,QUJD"},
                image(base64="QUJD"),
                image(base64="data:image/png;base64,QUJD"),
            )
        ]
    )
    assert rendered.images == [
        "https://example.org/a.jpg",
        "data:image/png;base64,QUJD",
        "data:;base64,QUJD",
        "data:;base64,QUJD",
    ]


def test_string_content_is_left_alone_and_the_callers_messages_too() -> None:
    messages = [{"role": "user", "content": "<|image_1|>\nWhy?", "name": "Ann"}]
    rendered = render_messages(messages)
    assert rendered.messages == messages
    assert rendered.messages[0] is not messages[0]


def test_the_prompt_is_the_one_that_training_sees(tiny: object) -> None:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(tiny)
    sample = Sample(
        id="1",
        source="test",
        conversations=(
            Turn(images=("a.png", "b.png"), user="Which?", assistant="The first."),
            Turn(images=("c.png",), user="And now?", assistant=None),
        ),
    )
    messages = [
        user(image(), image(), text("Which?")),
        {"role": "assistant", "content": "The first."},
        user(image(), text("And now?")),
    ]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    pieces = ChatEncoder(str(tiny)).encode_text(sample, for_generation=True).pieces
    expected = [list(piece) for piece in pieces]
    texts = prompt.replace("<|image_2|>", "<|image_1|>").replace("<|image_3|>", "<|image_1|>")
    assert [processor.tokenizer(p).input_ids for p in texts.split("<|image_1|>")] == expected


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([user({"type": "video"})], "message 0: expected entries of type text or image"),
        ([user("What?")], "message 0: expected entries of type text or image, got 'What\\?'"),
        ([{"role": "user", "content": None}], "message 0: expected content to be a string or a l"),
        ([user({"type": "text"})], "message 0: expected entries of type text or image"),
        ([user({"type": "image_url", "image_url": {}})], "message 0: expected .image_url.:"),
        ([user({"type": "image_url"})], "message 0: expected .image_url.:"),
        ([user(image(base64=b"abc"))], "message 0: expected base64 to be a string, got bytes"),
        ([{"content": "What?"}], "message 0: expected the keys role and content"),
        ([user(image(path="a"), image())], "1 of 2 image entries hold a picture"),
        ([user(image(path="a", url="b"))], "message 0: an image entry holds one picture"),
        ([user(image(), text("<|image_1|> What?"))], "image entries and written tags"),
        (
            [user(image()), {"role": "user", "content": "<|image_2|>"}],
            "image entries and written tags",
        ),
    ],
)
def test_what_cannot_be_numbered_for_sure_is_refused(messages: list, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        render_messages(messages)
