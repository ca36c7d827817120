"""minirlhf: reinforcement learning from human feedback, small enough to read in a day."""

from minirlhf.support import ctrl_c

__version__ = "0.1.0"


class UserError(Exception):
    """A mistake of the user's, told in one line with its remedy; scripts print it and exit with code 2."""


class Stopped(BaseException):
    """A signal asked the run to stop, and it did, at a safe point: nothing is lost, and --resume goes on."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = int(signum)


ctrl_c.ends_command()
