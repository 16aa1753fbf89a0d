"""What a data set asks of a GPU: sums over its samples, and its heaviest row.

workload = measure_workload(config, world_size=8)     # from shards: no image is decoded
workload = default_workload(8192)                     # pages of documents, without any data

workload.total          # tokens, crops, label tokens of all samples: speed follows from them
workload.row            # the row that needs most memory
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from phi3v_train.config import TrainConfig
from phi3v_train.flops import Work

CROP_IN_TOKENS = 124
"""A crop's activations over a token's in full training (652 MB and 5.2 MB): what rows are compared
by where vision trains."""

MOST_STEPS = 2000
"""Of the plan, looked through for the heaviest row."""


@dataclass(frozen=True, slots=True)
class Workload:
    """A data set as far as memory and speed go."""

    num_samples: int
    num_images: int
    total: Work
    """Sums over all samples."""
    longest: int
    """Tokens of the longest sample: rows can't be shorter."""
    row: Work
    """The row that needs most memory."""
    source: str
    """Where the numbers are from, in words."""

    @property
    def tokens_per_sample(self) -> float:
        """The mean."""
        return self.total.num_tokens / self.num_samples

    def with_row(self, num_tokens: int) -> "Workload":
        """The same data in rows of `num_tokens`, the heaviest as dense as this one's."""
        factor = num_tokens / self.row.num_tokens
        row = Work(
            num_tokens=num_tokens,
            squared_lengths=round(self.row.squared_lengths * factor),
            num_image_tokens=round(self.row.num_image_tokens * factor),
            num_crops=math.ceil(self.row.num_crops * factor),
            num_label_tokens=math.ceil(self.row.num_label_tokens * factor),
        )
        return replace(self, row=row)


def default_workload(max_tokens_per_row: int) -> Workload:
    """Pages of documents: the cookbook's DocVQA samples, one image of 16.3 crops each.

    2,443 tokens a sample, 2,405 of them for the image, 10 with loss. Video frames at `num_crops` 4
    have as many tokens a crop (150), so the row is theirs too.
    """
    count = 1000
    total = Work(
        num_tokens=count * 2443,
        squared_lengths=count * 2443**2,
        num_image_tokens=count * 2405,
        num_crops=count * 163 // 10,
        num_label_tokens=count * 10,
    )
    one = Workload(
        num_samples=count,
        num_images=count,
        total=total,
        longest=2700,
        row=Work(2443, 2443**2, 2405, 17, 10),
        source="pages of documents: 2,443 tokens, 16.3 crops and 10 label tokens a sample",
    )
    return one.with_row(max_tokens_per_row)


def measure_workload(config: TrainConfig, world_size: int) -> Workload:
    """Measure the shards that a configuration names, from texts and image sizes in their index.

    Args:
        config: its data, model folder (for the tokenizer) and batch count.
        world_size: GPUs.

    Raises:
        ValueError: not shards, not a model folder, or no sample fits a row.
    """
    from phi3v_train.chat import ChatEncoder
    from phi3v_train.collator import SampleEncoder
    from phi3v_train.image_lengths import image_lengths
    from phi3v_train.sources import Source, open_sources
    from phi3v_train.stream import StreamSettings, TrainStream, measure_sources

    data = config.data
    sources = open_sources([Source(source.path, source.weight) for source in data.train])
    encoder = SampleEncoder(ChatEncoder(config.model), data.num_crops)
    measures = measure_sources(sources, encoder)
    image_tokens = np.concatenate(
        [image_lengths(reader, data.num_crops).num_tokens for reader in sources.readers]
    )
    settings = StreamSettings(
        num_crops=data.num_crops,
        max_tokens_per_row=data.max_tokens_per_row,
        global_batch_size=config.train.global_batch_size,
        num_epochs=1,
        seed=config.seed,
        overlong=data.overlong,
        global_batch_unit=config.train.global_batch_unit,
        world_size=world_size,
    )
    stream = TrainStream(sources, encoder, measures, settings)
    tokens, crops, labels = (
        measures.num_tokens,
        measures.num_crops,
        measures.num_label_tokens,
    )

    def work_of(samples: "np.ndarray | list[int]") -> Work:
        return Work(
            num_tokens=int(tokens[samples].sum()),
            squared_lengths=int((tokens[samples] ** 2).sum()),
            num_image_tokens=int(image_tokens[samples].sum()),
            num_crops=int(crops[samples].sum()),
            num_label_tokens=int(labels[samples].sum()),
        )

    weight = CROP_IN_TOKENS if "vision" in config.method.trained_parts else 0
    plan = stream.plan(0)
    rows = (
        list(row)
        for step in range(min(plan.num_steps, MOST_STEPS))
        for rank in plan.step_rows(step)
        for row in rank
        if row
    )
    heaviest = max(rows, key=lambda row: int((tokens[row] + weight * crops[row]).sum()))
    used = np.unique(plan.order)
    return Workload(
        num_samples=len(used),
        num_images=int(measures.num_images[used].sum()),
        total=work_of(used),
        longest=int(tokens[used].max()),
        row=work_of(heaviest),
        source=f"{sources.name}: {len(used):,} samples, {tokens[used].mean():,.0f} tokens and "
        f"{crops[used].mean():.1f} crops on average, num_crops {data.num_crops}",
    )
