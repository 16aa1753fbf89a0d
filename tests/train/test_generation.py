"""`generate`, in the ways it is called: rows with images of different numbers are the hard part."""

from threading import Thread
from typing import Any

import pytest
import torch
from phi3v_train.modeling_phi3_v import Phi3VForCausalLM, repeat_images
from torch import Tensor
from transformers import TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from tests.train.small_models import IMAGE_TOKEN, ROPE_LIMIT, Prompt, call_inputs, small_model

PROMPTS = [
    Prompt(12, ((1, 1),), seed=1),
    Prompt(10, (), seed=2),
    Prompt(9, ((1, 1), (1, 2)), seed=3),  # beyond the short factors
]
FORMATS = pytest.mark.parametrize("uint8", [False, True], ids=["float views", "uint8 crops"])


@pytest.fixture(scope="module")
def model() -> Phi3VForCausalLM:
    return small_model()


def answers(model: Any, *prompts: Prompt, uint8: bool = False, **settings: Any) -> list[list[int]]:
    """New tokens of each row; greedy unless the settings say otherwise."""
    inputs = call_inputs(*prompts, uint8=uint8)
    settings = {"max_new_tokens": 6, "do_sample": False, **settings}
    return model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :].tolist()


@FORMATS
def test_a_batch_gives_every_row_the_answer_it_gets_alone(
    model: Phi3VForCausalLM, uint8: bool
) -> None:
    together = answers(model, *PROMPTS, uint8=uint8)
    assert together == [answers(model, prompt, uint8=uint8)[0] for prompt in PROMPTS]
    assert len({tuple(answer) for answer in together}) > 1


def test_both_formats_give_the_same_answer(model: Phi3VForCausalLM) -> None:
    assert answers(model, *PROMPTS) == answers(model, *PROMPTS, uint8=True)


def test_sampling_repeats_with_its_seed_and_differs_from_greedy(model: Phi3VForCausalLM) -> None:
    def sampled(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return answers(
            model,
            *PROMPTS,
            do_sample=True,
            top_p=0.95,
            top_k=40,
            temperature=1.5,
            max_new_tokens=12,
        )

    assert sampled(3) == sampled(3)
    assert sampled(3) != sampled(4)
    assert sampled(3) != answers(model, *PROMPTS, max_new_tokens=12)


@FORMATS
def test_several_answers_to_a_row_all_see_that_rows_images(
    model: Phi3VForCausalLM, uint8: bool
) -> None:
    def first_logits(*prompts: Prompt, **settings: Any) -> Tensor:
        output = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
            **call_inputs(*prompts, uint8=uint8),
            max_new_tokens=1,
            output_logits=True,
            return_dict_in_generate=True,
            **settings,
        )
        return output.logits[0]

    many = first_logits(*PROMPTS, do_sample=True, num_return_sequences=3)
    for row, prompt in enumerate(PROMPTS):
        alone = first_logits(prompt, do_sample=False)
        torch.testing.assert_close(
            many[3 * row : 3 * row + 3], alone.expand(3, -1), atol=1e-4, rtol=0
        )


@FORMATS
def test_beam_search_in_a_batch_gives_the_beams_of_each_row(
    model: Phi3VForCausalLM, uint8: bool
) -> None:
    beams = {"num_beams": 3, "num_return_sequences": 2, "uint8": uint8}
    together = answers(model, *PROMPTS, **beams)
    assert together == [beam for prompt in PROMPTS for beam in answers(model, prompt, **beams)]
    assert together[0] != together[1]


def test_images_that_end_in_the_middle_of_a_row_are_not_repeated() -> None:
    pictures = {"pixel_values": torch.zeros(2, 2, 3, 4, 4), "image_sizes": torch.full((2, 2), 336)}
    one, more = 313, 314
    assert repeat_images(pictures, [one, 0, one], 2)["image_sizes"].shape == (4, 2)
    for slots in ([more, one - 1], [one], [one, one, one]):
        with pytest.raises(ValueError, match=r"fill the rows one after another, got rows with \["):
            repeat_images(pictures, slots, 2)


def test_repeated_images_stay_in_the_order_of_their_row() -> None:
    grids = torch.tensor([[1, 1], [1, 2], [2, 1]])  # of rows [A, B] and [C]
    crops = torch.arange(5).view(5, 1)
    slots = [313 + 457, 469]
    repeated = repeat_images({"pixel_values": crops, "crop_grid": grids}, slots, 2)
    assert repeated["crop_grid"].tolist() == [[1, 1], [1, 2], [1, 1], [1, 2], [2, 1], [2, 1]]
    assert repeated["pixel_values"][:, 0].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 3, 4]
    views = {"pixel_values": torch.arange(3).view(3, 1), "image_sizes": grids * 336}
    repeated = repeat_images(views, slots, 2)
    assert repeated["pixel_values"][:, 0].tolist() == [0, 1, 0, 1, 2, 2]
    assert (repeated["image_sizes"] // 336).tolist()[:4] == [[1, 1], [1, 2], [1, 1], [1, 2]]


class Recorder(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.puts: list[list[Any]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.puts.append(value.tolist())

    def end(self) -> None:
        self.ended = True


def test_a_streamer_gets_the_prompt_and_then_token_by_token(model: Phi3VForCausalLM) -> None:
    recorder = Recorder()
    (answer,) = answers(model, PROMPTS[0], streamer=recorder)
    assert recorder.puts == [[PROMPTS[0].ids], *([token] for token in answer)]
    assert recorder.ended


def test_streamed_text_is_the_text_of_the_answer(tiny: Any) -> None:
    from transformers import PreTrainedTokenizerFast

    model = Phi3VForCausalLM.from_pretrained(tiny)
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(tiny)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    prompt = Prompt(8, ((1, 1),))
    found: list[list[int]] = []
    thread = Thread(
        target=lambda: found.extend(answers(model, prompt, streamer=streamer, eos_token_id=None))
    )
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == tokenizer.decode(found[0])
    assert len(pieces) > 1


def near_the_limit() -> list[Prompt]:
    """A row that outgrows the short factors on the way, one that never does, one that has."""
    return [Prompt(ROPE_LIMIT - 313 - 3, ((1, 1),), seed=4), PROMPTS[1], PROMPTS[2]]


def step_logits(model: Any, *prompts: Prompt, **settings: Any) -> Tensor:
    """(rows, steps, vocabulary), greedy."""
    output = model.generate(
        **call_inputs(*prompts, uint8=settings.pop("uint8", False)),
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **{"max_new_tokens": 10, **settings},
    )
    return torch.stack(output.logits, dim=1)


@FORMATS
def test_rows_that_cross_the_rope_limit_have_the_logits_they_have_without_a_cache(
    model: Phi3VForCausalLM, uint8: bool
) -> None:
    prompts = near_the_limit()
    together = step_logits(model, *prompts, uint8=uint8)
    for row, prompt in enumerate(prompts):
        alone = step_logits(model, prompt, uint8=uint8, use_cache=False)
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=0)


def test_the_long_factors_matter_where_the_row_crosses(model: Phi3VForCausalLM) -> None:
    # Or the test above would pass with a cache that was never begun again.
    patient = small_model(original_max_position_embeddings=ROPE_LIMIT + 100)
    prompt = near_the_limit()[0]
    crossing, short = step_logits(model, prompt), step_logits(patient, prompt)
    assert float((crossing - short)[:, -1].abs().max()) > 1e-2


def test_beams_cross_the_rope_limit_as_without_a_cache(model: Phi3VForCausalLM) -> None:
    settings: dict[str, Any] = {
        "max_new_tokens": 8,
        "num_beams": 2,
        "do_sample": False,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    together: Any = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
        **call_inputs(*near_the_limit()), **settings
    )
    for row, prompt in enumerate(near_the_limit()):
        alone: Any = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
            **call_inputs(prompt), **settings, use_cache=False
        )
        score = float(alone.sequences_scores[0])
        assert float(together.sequences_scores[row]) == pytest.approx(score, abs=1e-5)
        assert together.sequences[row, -8:].tolist() == alone.sequences[0, -8:].tolist()


def test_guessed_tokens_jump_over_the_rope_limit_without_harm(model: Phi3VForCausalLM) -> None:
    # Prompt lookup adds several tokens a step, so that no step need end right behind the limit.
    # (The step whose guesses pass it is computed as long as they are; from there on all is equal.)
    prompt = near_the_limit()[0]
    guessed = step_logits(model, prompt, prompt_lookup_num_tokens=3)
    plain = step_logits(model, prompt, use_cache=False)
    behind = ROPE_LIMIT - len(prompt.ids) + 1
    torch.testing.assert_close(guessed[:, behind:], plain[:, behind:], atol=1e-4, rtol=0)


def test_a_conversation_goes_on_in_its_cache_across_the_rope_limit(
    model: Phi3VForCausalLM,
) -> None:
    settings: dict[str, Any] = {
        "max_new_tokens": 4,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    generate: Any = model.generate  # pyright: ignore[reportAttributeAccessIssue]
    first = generate(torch.tensor([Prompt(ROPE_LIMIT - 10).ids]), **settings)
    longer = torch.cat([first.sequences, torch.tensor([Prompt(20, seed=9).ids])], dim=1)
    fresh = generate(longer, **settings)
    cached = generate(longer, past_key_values=first.past_key_values, **settings)
    torch.testing.assert_close(
        torch.stack(cached.logits), torch.stack(fresh.logits), atol=1e-4, rtol=0
    )


def test_a_repetition_penalty_takes_image_slots_for_the_image_token(
    model: Phi3VForCausalLM,
) -> None:
    penalised = answers(model, *PROMPTS, repetition_penalty=1.8)
    assert penalised != answers(model, *PROMPTS)
    inputs = call_inputs(*PROMPTS)
    ids = inputs["input_ids"]
    tokens = {**inputs, "input_ids": ids.masked_fill(ids < 0, IMAGE_TOKEN)}
    same = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
        **tokens, max_new_tokens=6, do_sample=False, repetition_penalty=1.8
    )
    assert same[:, ids.shape[1] :].tolist() == penalised


def test_a_cache_of_fixed_length_is_refused(model: Phi3VForCausalLM) -> None:
    with pytest.raises(ValueError, match="leave cache_implementation at its default"):
        answers(model, PROMPTS[1], cache_implementation="static")


def test_generate_returns_hidden_states_where_asked(model: Phi3VForCausalLM) -> None:
    output: Any = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
        **call_inputs(PROMPTS[0]),
        max_new_tokens=2,
        do_sample=False,
        output_hidden_states=True,
        return_dict_in_generate=True,
    )
    prompt_states, step_states = output.hidden_states
    assert [tuple(s.shape) for s in prompt_states] == [(1, len(PROMPTS[0].ids), 64)] * 3
    assert [tuple(s.shape) for s in step_states] == [(1, 1, 64)] * 3
