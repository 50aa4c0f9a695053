"""Errors that a user can mend. Only the command line turns them into one line and an exit code."""


class SdxlError(Exception):
    """What was asked, what is there, and the command to try next, in one line.

    Args:
        message: one sentence, no newline: what was asked and what was found.
        hint: what to do next, usually a command; printed after the message.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message} {hint}".strip())
        self.message = message
        self.hint = hint
