r"""Prompt and pictures to model inputs, as the published processor makes them.

    processor = AutoProcessor.from_pretrained(folder)                  # after `import phi3v_train`
    messages = [{"role": "user", "content": [{"type": "image", "path": "a.jpg"},
                                             {"type": "text", "text": "What is it?"}]}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    model.generate(**inputs)

    input_ids     (B, T)                           image n of a prompt stands as `-n`, repeated
    pixel_values  (I, num_crops + 1, 3, 336, 336)  global view, local crops, zeros
    image_sizes   (I, 2)                           (height, width) of the padded images

or with the published strings, `processor("<|user|>\n<|image_1|>\nWhat is it?<|end|>\n...", image)`.

Departures from the published processor: image tags must be 1..n in order (it takes repeated and
exchanged ones, and the model then puts the wrong picture in the place); pictures are turned upright
by their EXIF orientation, as in training; a batch of prompts is taken, padded in front.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoProcessor, AutoTokenizer, BatchFeature, ProcessorMixin

from phi3v_train.chat import IMAGE_TAG
from phi3v_train.configuration_phi3_v import Phi3VConfig
from phi3v_train.image_processing_phi3_v import Phi3VImageProcessor
from phi3v_train.messages import render_messages
from phi3v_train.picture import Picture


class Phi3VProcessor(ProcessorMixin):
    """Tokenizer and image processor in one, with the published processor's call.

    Args:
        image_processor: for the pictures.
        tokenizer: the pipeline of the published `tokenizer.json`.
        chat_template: instead of the tokenizer's.

    Raises:
        ValueError: a tokenizer that splits the published prompt in another way.
    """

    def __init__(
        self, image_processor: Phi3VImageProcessor, tokenizer: Any, chat_template: Any = None
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        _check_pipeline(tokenizer)

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]: by name
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        num_crops: int | None = None,
        **kwargs: Any,
    ) -> "Phi3VProcessor":
        """Load the tokenizer and the image processor of a model folder.

        Args:
            pretrained_model_name_or_path: the folder, or a name on the hub.
            num_crops: instead of the number in `preprocessor_config.json`.
            kwargs: as in transformers, for both: `revision`, `token`, `local_files_only` ...

        Raises:
            OSError: a file is missing.
            ValueError: a file says what does not fit the model.
        """
        folder = str(pretrained_model_name_or_path)
        image_processor = Phi3VImageProcessor.from_pretrained(folder, num_crops=num_crops, **kwargs)
        return cls(image_processor, AutoTokenizer.from_pretrained(folder, **kwargs))

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]: the published order
        self,
        text: str | Sequence[str],
        images: Any = None,
        padding: bool | str = False,
        truncation: Any = None,
        max_length: int | None = None,
        return_tensors: Any = "pt",
        *,
        num_crops: int | None = None,
        padding_side: str = "left",
    ) -> BatchFeature:
        """Encode prompts.

        Args:
            text: a prompt as the chat template renders it, with `<|image_1|>` ... `<|image_n|>`, or
                several.
            images: the pictures of the prompt, in order; for several prompts one list each, or
                one flat list. See `picture.read_picture` for what a picture can be.
            padding: True pads several prompts to the longest, with `<|endoftext|>`.
            truncation: not possible; a prompt that is cut has lost its question.
            max_length: most tokens of a prompt; by default what the model was trained for.
            return_tensors: `pt`, `np` or None for lists.
            num_crops: instead of the image processor's own.
            padding_side: `left`, so that answers continue the prompts, or `right`.

        Returns:
            `input_ids` and `attention_mask` (B, T); with images also `pixel_values` and
            `image_sizes`; see the module docstring.

        Raises:
            ValueError: tags that are not 1..n in order, or not as many as images; a picture that
                cannot be read; a prompt with too many tokens; unequal lengths without padding.
        """
        if truncation:
            raise ValueError(
                "truncation would cut the question or an image's tokens; shorten the text, or use "
                "fewer images or a smaller num_crops"
            )
        if padding not in (False, True, "longest", "do_not_pad"):
            raise ValueError(f"padding: expected False, True or 'longest', got {padding!r}")
        texts = [text] if isinstance(text, str) else list(text or ())
        if not texts or not all(isinstance(one, str) for one in texts):
            raise ValueError("text: expected a prompt or a list of prompts")
        tags = [_image_tags(one) for one in texts]
        pictures = _pictures_of_prompts(images, [len(numbers) for numbers in tags])
        flat = [picture for own in pictures for picture in own]
        vision: Mapping[str, Any] = {}
        if flat:
            vision = self.image_processor(flat, num_crops=num_crops)
        num_tokens = iter(vision["num_img_tokens"].tolist() if flat else [])
        rows = [
            self._encode(one, [next(num_tokens) for _ in own])
            for one, own in zip(texts, pictures, strict=True)
        ]
        self._check_lengths(rows, max_length)
        data: dict[str, Any] = self._pad(rows, padding in (True, "longest"), padding_side)
        if return_tensors is not None:
            data = {name: np.array(value) for name, value in data.items()}
        if flat:
            data["pixel_values"] = vision["pixel_values"]
            data["image_sizes"] = vision["image_sizes"]
            if return_tensors is None:
                data = {k: v if isinstance(v, list) else v.tolist() for k, v in data.items()}
        return BatchFeature(data, tensor_type=return_tensors)

    def apply_chat_template(  # pyright: ignore[reportIncompatibleMethodOverride]: by name
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: Any = "pt",
        images: Any = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render a conversation, and encode it if asked to.

        Args:
            conversation: messages, or a batch of conversations; see `messages.render_messages`.
            chat_template: instead of the model's own.
            add_generation_prompt: end with `<|assistant|>`.
            continue_final_message: leave the last message open.
            tokenize: encode text and pictures instead of returning the text.
            return_dict: all inputs of the model instead of the token ids alone.
            return_tensors: `pt`, `np` or None for lists.
            images: the pictures, where the messages don't hold them.
            processor_kwargs: for the encoding, as in `__call__`: `padding`, `num_crops` ...
            kwargs: the same, or variables of the template.

        Returns:
            The text (a list for a batch), or token ids, or all inputs.

        Raises:
            ValueError: as `render_messages` and `__call__`.
        """
        if isinstance(conversation, Mapping):
            raise ValueError("expected a list of messages, got one message; put it in a list")
        is_batch = bool(conversation) and isinstance(conversation[0], list | tuple)
        rendered = [render_messages(one) for one in (conversation if is_batch else [conversation])]
        options = {**(processor_kwargs or {})}
        for name in ("padding", "max_length", "truncation", "num_crops", "padding_side", "images"):
            if name in kwargs:
                options[name] = kwargs.pop(name)
        template = chat_template or self.chat_template or self.tokenizer.chat_template
        for name in kwargs:
            if name not in ("tools", "documents") and not re.search(rf"\b{name}\b", str(template)):
                raise ValueError(
                    f"no option and no variable of the chat template is called {name!r}; options "
                    "are padding, max_length, num_crops, padding_side and images"
                )
        texts = [
            self.tokenizer.apply_chat_template(
                one.messages,
                chat_template=chat_template or self.chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **kwargs,
            )
            for one in rendered
        ]
        text = texts if is_batch else texts[0]
        if not tokenize:
            return text
        held = [one.images for one in rendered]
        given = options.pop("images", None) if images is None else images
        if given is not None and any(held):
            raise ValueError("images are in the messages and given apart; use one of the two")
        if given is None:
            given = held if is_batch else held[0]
        inputs = self(text, given, return_tensors=return_tensors, **options)
        return inputs if return_dict else inputs["input_ids"]

    def save_pretrained(
        self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Write the published layout: tokenizer, `preprocessor_config.json` and the rest.

        Raises:
            ValueError: `push_to_hub`; upload the folder with the `hf` command.
        """
        if push_to_hub:
            raise ValueError("push_to_hub is not supported here; save, then `hf upload` the folder")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        for name in _NOT_THE_TOKENIZERS:
            settings.pop(name, None)
        # Names that older releases and vLLM know too; both mean the same in transformers 5, and
        # the class is the one that takes tokenizer.json as it stands.
        if special := settings.pop("extra_special_tokens", None):
            settings["additional_special_tokens"] = special
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "processor_class": _CLASS_NAME}
        _write_json(folder / "tokenizer_config.json", settings)
        _write_json(folder / "preprocessor_config.json", self.image_processor.to_dict())
        _write_json(folder / "processor_config.json", {"processor_class": _CLASS_NAME})
        if isinstance(self.chat_template, str):
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
        return [str(path) for path in sorted(folder.iterdir())]

    def decode(self, token_ids: Any, **kwargs: Any) -> Any:
        """Token ids to text, as the tokenizer's; the prompt's image slots are left out."""
        ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        if isinstance(ids, int):
            ids = [ids]
        if ids and isinstance(ids[0], list | tuple):
            return self.batch_decode(ids, **kwargs)
        return self.tokenizer.decode([token for token in ids if token >= 0], **kwargs)

    def batch_decode(self, sequences: Any, **kwargs: Any) -> list[str]:
        """`decode` of several."""
        return [self.decode(ids, **kwargs) for ids in sequences]

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """What transformers' image-text-to-text pipeline asks for: the texts of a batch."""
        return self.batch_decode(
            generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs
        )

    @property
    def model_input_names(self) -> list[str]:
        """What the processor makes."""
        return ["input_ids", "attention_mask", "pixel_values", "image_sizes"]

    def _encode(self, text: str, num_image_tokens: Sequence[int]) -> list[int]:
        ids: list[int] = []
        for number, piece in enumerate(IMAGE_TAG.split(text)[::2]):  # each second part is a number
            if number:
                ids += [-number] * num_image_tokens[number - 1]
            ids += self.tokenizer(piece)["input_ids"]
        return ids

    def _check_lengths(self, rows: Sequence[Sequence[int]], max_length: int | None) -> None:
        limit = self.tokenizer.model_max_length if max_length is None else max_length
        for row, ids in enumerate(rows):
            if len(ids) > limit:
                num_image = sum(token < 0 for token in ids)
                raise ValueError(
                    f"prompt {row} has {len(ids):,} tokens, {num_image:,} of them for images; the "
                    f"limit is {limit:,}; use fewer images, a smaller num_crops, or less text"
                )

    def _pad(
        self, rows: Sequence[list[int]], pad: bool, padding_side: str
    ) -> dict[str, list[list[int]]]:
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side: expected left or right, got {padding_side!r}")
        longest = max(len(row) for row in rows)
        if not pad and any(len(row) != longest for row in rows):
            raise ValueError(
                f"the prompts have {sorted({len(row) for row in rows})} tokens; one tensor needs "
                "equal lengths: use padding=True"
            )
        padding = [[self.tokenizer.pad_token_id] * (longest - len(row)) for row in rows]
        ones = [[1] * len(row) for row in rows]
        zeros = [[0] * len(row) for row in padding]
        if padding_side == "right":
            ids = [row + end for row, end in zip(rows, padding, strict=True)]
            mask = [one + end for one, end in zip(ones, zeros, strict=True)]
        else:
            ids = [end + row for row, end in zip(rows, padding, strict=True)]
            mask = [end + one for one, end in zip(ones, zeros, strict=True)]
        return {"input_ids": ids, "attention_mask": mask}


_CLASS_NAME = "Phi3VProcessor"

_NOT_THE_TOKENIZERS = ("auto_map", "backend", "is_local", "local_files_only")
"""What transformers adds to the tokenizer's settings, and the code file that is not beside it."""

_PROBE = ("<|user|>\n", ["<s>", "<|user|>", "▁", "<0x0A>"])
"""A text and its tokens in the published pipeline: a `▁` after each special token."""


def _check_pipeline(tokenizer: Any) -> None:
    text, expected = _PROBE
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    if tokens != expected:
        raise ValueError(
            f"the tokenizer splits {text!r} into {tokens}, the published one into {expected}: "
            f"{type(tokenizer).__name__} rebuilds the pipeline instead of reading tokenizer.json; "
            "load it with AutoTokenizer, or with PreTrainedTokenizerFast"
        )


def _image_tags(text: str) -> list[int]:
    """The numbers of a prompt's image tags, which must be 1..n in order."""
    tags = [int(number) for number in IMAGE_TAG.findall(text)]
    if tags != list(range(1, len(tags) + 1)):
        raise ValueError(
            f"expected the image tags <|image_1|>, <|image_2|> ... once each and in order, got "
            f"{tags}"
        )
    return tags


def _pictures_of_prompts(images: Any, counts: Sequence[int]) -> list[list[Picture]]:
    """Deal pictures to prompts, which have `counts` image tags."""
    if images is None:
        pictures: list[Any] = []
    else:
        pictures = list(images) if isinstance(images, list | tuple) else [images]
    if not any(isinstance(own, list | tuple) or own is None for own in pictures):
        if len(pictures) != sum(counts):
            raise ValueError(
                f"expected as many image tags as images, got {sum(counts)} image tags and "
                f"{len(pictures)} images"
            )
        rest = iter(pictures)
        return [[next(rest) for _ in range(count)] for count in counts]
    if len(pictures) != len(counts):
        raise ValueError(f"{len(counts)} prompts need as many lists of images, got {len(pictures)}")
    for row, (own, count) in enumerate(zip(pictures, counts, strict=True)):
        if len(own or ()) != count:
            raise ValueError(
                f"prompt {row}: expected as many image tags as images, got {count} image tags and "
                f"{len(own or ())} images"
            )
    return [list(own or ()) for own in pictures]


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


AutoProcessor.register(Phi3VConfig, Phi3VProcessor, exist_ok=True)
