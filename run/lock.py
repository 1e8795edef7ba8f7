"""A second run in the same folder is kept out. No torch here: preprocess.py needs none."""

import fcntl
import os
import socket
from pathlib import Path

from config import InputError, reading


def lock(folder: Path, flag: str = "--save_dir"):
    """Keep a second run out of a folder until the file that is returned is closed.

    The kernel ends the lock with its process. Raises InputError if another run has it.
    """
    with reading(f"{flag} {folder}"):
        file = open(folder / ".lock", "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        advice = "choose another, or wait for its end"
        raise InputError(f"{flag} {folder} is in use by {holder}; {advice}") from None
    except OSError:  # a file system without locks: better to run than to refuse
        return file
    # for the line above
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
