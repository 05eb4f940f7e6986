"""The processes of this machine: whether one runs, and is still the one that had that number."""

import os
from pathlib import Path

import psutil


def process_mark(pid: int) -> str | None:
    """This boot of this machine, and at which tick of it the process began: what no other process of that number has.
    None where there is no such process, where we may not look, and elsewhere than on Linux.

    Seconds since 1970 would not do: those of a process move with the clock when that is set.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # proc_pid_stat(5): the name, field 2, may hold spaces and brackets; starttime is field 22.
        return f"{boot} {Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"
    except OSError:
        return None


def pid_namespace() -> str | None:
    """What the numbers of our processes count in: containers of one machine, which may share its host name, count
    theirs apart (pid_namespaces(7)). None elsewhere than on Linux.
    """
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def is_running(pid: int, started_before: float = float("inf")) -> bool:
    """Whether the process runs on this machine and, if asked for, had started by then (seconds since 1970).

    One that has ended, but whose parent has not asked for its exit code yet, does not run.
    """
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and bool(process.create_time() <= started_before)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def is_same(pid: int, mark: str | None) -> bool:
    """Whether the process that had this number when `process_mark` gave `mark` still runs."""
    # Who may not look at another user's process is told no mark.
    return is_running(pid) and (mark is None or process_mark(pid) in {None, mark})
