"""The ways in which a run ends early that are no defect."""


class Refused(ValueError):
    """Input that cannot run. The message says what was wrong, what was there, and what to write instead.

    `run.py` prints it without a traceback and exits with status 2. An exception that is not foreseen here is a defect
    and keeps its traceback.
    """


def refuse_below(group: str, options: object, **least: float) -> None:
    """Refuse the options of a group that lie below the least they may be; null is no number."""
    for key, smallest in least.items():
        value = getattr(options, key)
        if value is not None and value < smallest:
            raise Refused(f"{group}.{key}={value} is too small. Write {smallest} or more.")


class Interrupted(BaseException):
    """A signal told the run to stop. Its checkpoint is written, and the same command goes on from it.

    Like KeyboardInterrupt it is no `Exception`: a sweep that is told to stop does not go on with its next cell.
    """

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


class Lost(RuntimeError):
    """A job that ended without a word of its own: killed by its scheduler, or with its machine."""
