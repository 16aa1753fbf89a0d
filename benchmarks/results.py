"""What a benchmark prints and writes: the machine, a table, and the same as JSON.

show_results({"python": "3.12"}, table(results), results, Path("results.json"))

python 3.12

case   ratio
page   1.21 (1.18-1.25)
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

json_option = click.option(
    "--json", "json_file", type=click.Path(path_type=Path), help="Also write results here."
)


def show_results(
    about: Mapping[str, Any], lines: Iterable[str], results: Sequence[Any], json_file: Path | None
) -> None:
    """Print a table with what its numbers depend on.

    Args:
        about: versions, processors, settings.
        lines: of the table.
        results: dataclasses, for the file.
        json_file: where all of it goes, if anywhere.
    """
    click.echo(", ".join(f"{name} {value}" for name, value in about.items()) + "\n")
    click.echo("\n".join(lines))
    if json_file is not None:
        content = {**about, "results": [asdict(result) for result in results]}
        json_file.write_text(json.dumps(content, indent=2) + "\n")
