"""The peak memory of a script in a process of its own.

    run_measured("print(21 * 2); print(int(peak_mb()))")      # "42\\n11\\n"

`getrusage` would not do: a process started by a large one (pytest, with torch loaded) inherits its
`ru_maxrss`. `VmHWM` belongs to the memory of the program that runs.
"""

import subprocess
import sys
import textwrap

PEAK_MB = '''
def peak_mb():
    """Most resident memory this process has had, in MiB."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024
'''


def run_measured(script: str, *arguments: object) -> str:
    """What a Python script prints that may call `peak_mb()`; `arguments` are its `sys.argv[1:]`."""
    code = PEAK_MB + textwrap.dedent(script)
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout
