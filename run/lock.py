"""A second run in the same folder is kept out. No torch here: preprocess.py needs none."""

import fcntl
import os
import socket
from pathlib import Path

from config import InputError


class Lock:
    """Keeps a second run out of a folder. The kernel ends the lock with its process."""

    def __init__(self, folder: Path, flag: str = "--save_dir"):
        self.file = open(folder / ".lock", "a+")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.seek(0)
            holder = self.file.read().strip() or "another process"
            self.file.close()
            advice = "choose another, or wait for its end"
            raise InputError(f"{flag} {folder} is in use by {holder}; {advice}") from None
        except OSError:  # a file system without locks: better to run than to refuse
            return
        # for the line above
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.file.flush()

    def release(self):
        self.file.close()
