"""The exceptions that a command turns into a single line on stderr."""


class UserError(Exception):
    """Something outside the code is wrong: a file, a checkpoint, the disk. The message is one line that names it. Exit code 1."""


class UsageError(UserError):
    """Flags that contradict each other or are out of range. Exit code 2."""


class Stopped(Exception):
    """A signal asked to stop, and what was in hand is finished. Exit code 128 + its number."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number
