"""The root of every error that a user can mend.

The command line prints such an error as one clear line and exits with a non-zero code; anything
else that is raised is a bug of ours and keeps its traceback.
"""


class UserError(Exception):
    """Something the user gave is wrong; the message states the fact, the values, the remedy."""
