"""Where an image path of a sample leads: to a file inside the image root, or to a problem.

    place = ImagePlaces("images")
    place.find("val/a.jpg")     # "/real/images/val/a.jpg"
    place.find("../a.jpg")      # raises MisplacedImage: "leaves the image root by .."

Whoever opens an image that a data set names asks here first, so that nothing in the data can make
it read outside the root, nor wait for a pipe.
"""

import os
from typing import Literal

from phi3v_data.image_check import path_problem


class MisplacedImage(ValueError):
    """The path leads to no file inside the image root; the message says why."""

    def __init__(self, kind: Literal["outside", "missing"], problem: str) -> None:
        super().__init__(problem)
        self.kind = kind


class ImagePlaces:
    """The image root of a file, its links resolved once."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = os.path.realpath(root)

    def find(self, path: str) -> str:
        """The file that `path` names, its links resolved.

        Raises:
            MisplacedImage: outside the root, missing, or not a regular file.
        """
        problem = path_problem(path)
        if problem:
            raise MisplacedImage("outside", problem)
        try:
            real = os.path.realpath(os.path.join(self._root, path))
            is_inside = os.path.commonpath([self._root, real]) == self._root
            is_file = os.path.isfile(real)
        except (OSError, ValueError) as error:  # a name too long, one that cannot be encoded
            raise MisplacedImage("missing", "cannot be a file name") from error
        if not is_inside:
            raise MisplacedImage("outside", "is a link that leads out of the image root")
        if not is_file:
            exists = os.path.exists(real)
            raise MisplacedImage("missing", "is not a file" if exists else "does not exist")
        return real
