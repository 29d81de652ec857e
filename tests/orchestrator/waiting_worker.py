"""A rank that waits with a child of its own, watched over as the real worker is; `stubborn` ones ignore SIGTERM."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from orchestrator.lead import die_with_parent

if __name__ == "__main__":
    die_with_parent(os.getppid())
    if "stubborn" in sys.argv:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen(["sleep", "600"])
    (Path(sys.argv[1]) / f"pid{os.getpid()}").touch()
    time.sleep(600)
