"""What a user's mistake looks like: one line that says what to do, exit status 2, never a traceback."""

import os
import sys


class UserError(ValueError):
    """A mistake the user can mend. The message is one line: what is wrong, then what to do about it."""


def run_script(main):
    """Run a script's `main()`. A UserError is printed as `error: …` and exits with 2; any other exception is a bug of
    ours and keeps its traceback."""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` say, has seen enough; what is still buffered has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except UserError as mistake:
        print("error:", " ".join(str(mistake).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
