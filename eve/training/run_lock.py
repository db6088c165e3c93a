"""One run at a time in a run directory: two would write the same metrics and checkpoints."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from typing import IO

from eve.errors import UserError

LOCK = ".lock"


def lock_run(run_dir: Path) -> IO[str] | None:
    """Holds the directory until the file that it returns is closed, or this process ends in any way.

    None where the file system knows no locks. Raises UserError where another process holds it.
    """
    file = open(run_dir / LOCK, "a+")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(f"{run_dir} is in use by {file.read().strip() or 'another run'}") from None
    except OSError:
        file.close()
        return None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
