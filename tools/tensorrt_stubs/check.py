"""Type-check the TensorRT engine against stubs that make_stubs.py has made.

python tools/tensorrt_stubs/check.py .stubs/11.4 [.stubs/10.13 …]
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CHECKED = "core/porttool/engines/tensorrt"


def main(folders: list[str]) -> int:
    """Run mypy once for each folder of stubs; return how many found something."""
    if not folders:
        raise SystemExit(__doc__)
    return sum(check(Path(folder).resolve()) for folder in folders)


def check(stubs: Path) -> bool:
    """Return whether mypy finds something with one version's stubs."""
    if not (stubs / "tensorrt" / "__init__.pyi").is_file():
        raise SystemExit(f"{stubs}: there are no stubs here; make them with make_stubs.py")
    sys.stdout.write(f"{stubs.name}: ")
    sys.stdout.flush()
    command = [sys.executable, "-m", "mypy", "--config-file", str(HERE / "mypy.ini"), CHECKED]
    cache = ["--cache-dir", str(stubs / ".mypy_cache")]
    environment = {**os.environ, "MYPYPATH": str(stubs)}
    found = subprocess.run([*command, *cache], cwd=ROOT, env=environment, check=False)
    return found.returncode != 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
