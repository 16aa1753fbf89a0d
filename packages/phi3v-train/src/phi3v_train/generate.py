"""One question about some pictures to an answer, piece by piece as it comes.

    model, processor = load(folder)
    answer = generate(model, processor, "What changed?", ["a.jpg", "b.jpg"])
    print(answer.speed)      # 41 tokens in 1.9 s, 21.3 tokens/s (prompt 1,530 tokens, ...)

For a data set there is `evaluate`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from phi3v_train.answering_model import find_answering_model
from phi3v_train.chat import IMAGE_TAG
from phi3v_train.methods import load_for_inference
from phi3v_train.modeling_phi3_v import Phi3VForCausalLM
from phi3v_train.picture import Picture
from phi3v_train.processing_phi3_v import Phi3VProcessor


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said, and how fast."""

    text: str
    num_prompt_tokens: int
    """Image tokens among them."""
    num_image_tokens: int
    num_new_tokens: int
    """The end token among them."""
    first_token_s: float
    """From the encoded prompt to its first new token."""
    rest_s: float
    """From then to the last."""

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens after the first, whose time is the prompt's; of all where there is one."""
        if self.num_new_tokens > 1:
            return (self.num_new_tokens - 1) / self.rest_s
        return self.num_new_tokens / self.first_token_s

    @property
    def speed(self) -> str:
        """The figures in one line."""
        return (
            f"{self.num_new_tokens} tokens in {self.first_token_s + self.rest_s:.1f} s, "
            f"{self.tokens_per_second:.1f} tokens/s (prompt {self.num_prompt_tokens:,} tokens, "
            f"{self.num_image_tokens:,} of them images, first token after "
            f"{self.first_token_s:.1f} s)"
        )


def load(
    folder: str | Path,
    *,
    adapter: str | Path | None = None,
    num_crops: int | None = None,
    device: str = "auto",
) -> tuple[Phi3VForCausalLM, Phi3VProcessor]:
    """Load a model folder and its processor, ready to answer.

    Args:
        folder: Hugging Face folder; or a run or an adapter, see `find_answering_model`.
        adapter: PEFT folder (or a run) to put on the model.
        num_crops: crops an image is cut into; by default what the run or the folder says.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        ValueError: a folder that is not what it should be.
    """
    found = find_answering_model(folder, adapter)
    model = load_for_inference(found.folder, adapter=found.adapter, device=device)
    num_crops = num_crops or found.num_crops
    try:
        processor = Phi3VProcessor.from_pretrained(found.folder, num_crops=num_crops)
    except OSError as error:
        raise ValueError(f"{found.folder} lacks a processor's files: {error}") from error
    return model, processor


def encode(processor: Phi3VProcessor, prompt: str, images: Sequence[Picture]) -> Any:
    """The inputs of a question: pictures first, or where the prompt has `<|image_1|>` ...

    Raises:
        ValueError: as the processor.
    """
    if IMAGE_TAG.search(prompt):
        content: Any = prompt
    else:
        content = [*[{"type": "image"}] * len(images), {"type": "text", "text": prompt}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        images=list(images),
    )


@torch.inference_mode()
def generate(
    model: Phi3VForCausalLM,
    processor: Phi3VProcessor,
    prompt: str,
    images: Sequence[Picture] = (),
    *,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> Answer:
    """Answer one question.

    Args:
        model: in evaluation mode.
        processor: its own.
        prompt: the question, with or without places for the pictures.
        images: see `picture.read_picture`.
        max_new_tokens: longest answer.
        temperature: 0 takes the likeliest token each time; above, samples.
        top_p: sample among the likeliest tokens of this total probability.
        seed: of the sampling.
        on_text: called with each piece of the answer, as soon as its words are whole.

    Raises:
        ValueError: as the processor.
    """
    inputs = encode(processor, prompt, images)
    ids = inputs["input_ids"]
    tokenizer = processor.tokenizer
    streamer = _Streamer(tokenizer, on_text or (lambda _: None))
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        torch.manual_seed(seed)
    start = time.perf_counter()
    output = model.generate(  # pyright: ignore[reportAttributeAccessIssue]: its self type fits none
        **inputs.to(model.device),
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"]),
        pad_token_id=tokenizer.pad_token_id,
        streamer=streamer,
        **sampling,
    )
    stop = time.perf_counter()
    new = output[0, ids.shape[1] :].tolist()
    assert streamer.first_token_at is not None
    return Answer(
        text=tokenizer.decode(new, skip_special_tokens=True).strip(),
        num_prompt_tokens=ids.shape[1],
        num_image_tokens=int((ids < 0).sum()),
        num_new_tokens=len(new),
        first_token_s=streamer.first_token_at - start,
        rest_s=stop - streamer.first_token_at,
    )


class _Streamer(TextStreamer):
    """Passes whole words on, and notes when the first token came."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text
        self.first_token_at: float | None = None

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt and self.first_token_at is None:
            self.first_token_at = time.perf_counter()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.on_text(text)
