"""Stop an installation that would download gigabytes of CUDA onto a machine that has no NVIDIA driver.

usage: python scripts/check_torch.py [pip options]     exit status 1, and what to do, if the torch that pip would
choose for this machine needs CUDA packages and there is no driver to run them.
"""

import json
import shutil
import subprocess
import sys


def needs_cuda(options: list[str]) -> bool:
    """Whether pip, asked with these options, would bring NVIDIA packages along; nothing is installed."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-", *options]
    report = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return any(item["metadata"]["name"].startswith("nvidia") for item in json.loads(report)["install"])


def main() -> int:
    if shutil.which("nvidia-smi") is not None or not needs_cuda(sys.argv[1:]):
        return 0
    print(
        "This machine has no NVIDIA driver, and the torch that pip finds here would download gigabytes of CUDA.\n"
        "Give the index of PyTorch's CPU builds (its install page shows the address):  make demo TORCH_INDEX=ADDRESS\n"
        "or take the CUDA build all the same:  make demo TORCH_CHECK=",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
