"""What the commands say of wrong input: one line, exit status 2."""

import click


class InputError(click.ClickException):
    """What was given is not what the command takes; one line says what to do."""

    exit_code = 2
