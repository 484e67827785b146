"""Errors that a user can cause or mend: one line that says what to do, exit status 2, no traceback."""

import atexit
import errno
import os
import signal
import sys
import warnings


class UserError(ValueError):
    """A mistake the user can mend. The message is one line: what is wrong, then what to do about it."""


def shown(text):
    """A name from a file or folder, safe to print: characters that are not printable are escaped, as they could be an
    order to the terminal (\\x1b…), a line break, or a byte that is not UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def counted(number, noun):
    """1, "image" → "1 image"; 2, "image" → "2 images"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def reason(problem):
    """An exception → its message in one line, or its type if it has none."""
    text = getattr(problem, "strerror", None) or str(problem) or type(problem).__name__
    return " ".join(str(text).split())[:300]


def advice(problem):
    """What to do about an OSError."""
    if problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free some space there, or choose another place"
    if problem.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "change its permissions, or choose another place"
    return "check that the path is right and that its disk has space"


def run_script(main):
    """Run a script's `main()`. A mistake, or a machine that is full, is printed as `error: …` and exits with 2; Ctrl-C
    and SIGTERM exit with 130. Any other exception is a bug of ours and keeps its traceback."""
    for stream in (sys.stdout, sys.stderr):  # a redirected output may be in a character set without our arrows
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="backslashreplace")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # KeyboardInterrupt, as Ctrl-C
    atexit.register(_ignore_signals)
    warnings.filterwarnings("ignore", module="PIL")  # of files that are damaged but readable
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` say, has seen enough; what is still buffered has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except UserError as mistake:
        _fail(str(mistake))
    except OSError as problem:
        place = f"{problem.filename}: " if problem.filename else ""
        _fail(f"{place}{reason(problem)}; {advice(problem)}")
    except MemoryError:
        _fail("out of memory; close other programs, or use a smaller --batch-size")
    except RuntimeError as problem:
        if "out of memory" not in str(problem) and "can't allocate memory" not in str(problem):
            raise
        _fail("out of memory; use a smaller --batch-size, or --device cpu")
    except KeyboardInterrupt as hint:
        print("interrupted" + (f"; {shown(hint)}" if hint.args else ""), file=sys.stderr)
        sys.exit(130)


def _ignore_signals():
    """At the end nothing is left to be interrupted, but for PyTorch's tidying up, which would complain."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _fail(message):
    print("error:", shown(" ".join(message.split())), file=sys.stderr)
    sys.exit(2)
