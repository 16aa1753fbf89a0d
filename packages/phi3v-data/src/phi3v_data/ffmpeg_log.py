"""Whether the FFmpeg inside OpenCV complained: the only sign of damage inside a picture.

    watch = find_watch(Path(cv2.__file__))       # None: no such sign here
    before = watch.count_complaints()
    …                                            # decode
    watch.count_complaints() > before            # something was damaged, and is concealed

OpenCV hands out concealed pictures like any others, and has no property that tells. FFmpeg does
tell, in its log; its library lies beside OpenCV in the Linux wheels, and takes a function to be
called with every line. What the log's level shows is still shown.
"""

import atexit
import ctypes
import os
from functools import cache
from pathlib import Path

_INFO = 32
"""FFmpeg's level of "concealing 120 DC errors"; more severe ones are lower, idle talk is higher."""

_Callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class Watch:
    """Counts complaints of one FFmpeg library, of all threads together."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._num_complaints = 0
        self._is_registered = False
        show = library.av_log_default_callback
        show.argtypes = ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p

        def note(source: int | None, level: int, text: int | None, values: int | None) -> None:
            if level <= _INFO:
                self._num_complaints += 1
            if level <= library.av_log_get_level():
                show(source, level, text, values)

        self._callback = _Callback(note)

    def count_complaints(self) -> int:
        """How many so far. What comes after this call is counted."""
        # Every time: OpenCV sets its own at its first file.
        self._library.av_log_set_callback(self._callback)
        if not self._is_registered:  # a line that is logged after Python has ended would crash
            self._is_registered = True
            show = ctypes.cast(self._library.av_log_default_callback, ctypes.c_void_p)
            atexit.register(self._library.av_log_set_callback, show)
        return self._num_complaints


@cache
def find_watch(cv2_file: Path) -> Watch | None:
    """Watch the FFmpeg that OpenCV, at `cv2_file`, has loaded; None where it is not beside it."""
    for folder in cv2_file.parent.parent.glob("opencv_*.libs"):
        for path in folder.glob("libavutil*.so*"):
            try:
                # Loaded already, or it is not the one that decodes.
                return Watch(ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_LAZY))
            except OSError:
                continue
    return None
