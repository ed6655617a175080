"""What this process has had in memory at most."""

from pathlib import Path


def peak_resident() -> int:
    """Bytes; 0 where there is no /proc. Not ru_maxrss: that begins with the size of the process that started it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)
