"""A job's first process, before it becomes torchrun: `python -I -S lead.py PARENT CORES COMMAND...`.

It needs the standard library alone, so that it costs milliseconds. PARENT is the process that the job must not outlive,
or 0; CORES are those that it may use, separated by commas, or nothing.
"""

import ctypes
import os
import signal
import sys

LEAD = "TRIAL_LEAD"
"""Environment variable: process id of the job's first process. Its descendants inherit it, and have other ids."""
_PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""


def die_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send `number` to this process when `parent` is gone; if it is gone already, end at once.

    The kernel watches the *thread* that started this process: it must live as long as the parent.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:  # it died before it could be watched
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Become the job."""
    parent, cores, *command = sys.argv[1:]
    if cores and sys.platform == "linux":
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    if int(parent):
        die_with_parent(int(parent), signal.SIGTERM)
    os.environ[LEAD] = str(os.getpid())
    os.execv(command[0], command)  # noqa: S606  our own command


if __name__ == "__main__":
    main()
