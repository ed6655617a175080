"""Peak host memory of this process."""

from pathlib import Path


def peak_resident() -> int:
    """Peak resident set size in bytes; 0 without /proc. Not ru_maxrss, which starts at the parent's size."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)
