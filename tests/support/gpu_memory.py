"""What GPUs have in use."""

import subprocess


def used_mib() -> list[int] | None:
    """MiB of each GPU of this machine, by whomever; None where nobody tells."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return [int(line) for line in text.split()]
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None
