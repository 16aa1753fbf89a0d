"""A converter of your own: captions.txt beside images, "cat.jpg<TAB>A cat." per line."""

from pathlib import Path

from phi3v_data import Item, Sample, Turn, convert
from phi3v_data.converters import write_image


class Captions:
    name = "captions"

    def discover(self, source: Path):
        for index, line in enumerate((source / "captions.txt").read_text().splitlines()):
            file, _, caption = line.partition("\t")
            yield Item(index, key=file, path=str(source / file), payload=caption)

    def convert(self, item: Item, out_dir: Path):
        image = write_image(out_dir, item.key, Path(item.path).read_bytes())
        turn = Turn(images=(image,), user="Describe the image.", assistant=item.payload)
        yield Sample(id=item.key, source="captions", conversations=(turn,))


if __name__ == "__main__":
    print(convert(Captions(), "raw", "converted"))
