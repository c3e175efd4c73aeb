"""The sub-commands of the command line: each module named like one has ``run(arguments)``."""


class CannotRun(Exception):
    """The command cannot run as asked, for a reason that the message gives; the exit code is 2."""
