"""How long a user waits before anything happens: ``python -m bench.startup``.

Each command runs in a fresh process, a few times in turn; the median is printed, in seconds.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

RUNS = 7
COMMANDS = {
    "python": ["-c", "pass"],
    "import truetune": ["-c", "import truetune"],
    "truetune --help": ["-m", "truetune", "--help"],
    "truetune sft --help": ["-m", "truetune", "sft", "--help"],
    "a wrong flag": ["-m", "truetune", "sft", "--lern-rate", "1"],
}


def main() -> None:
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(RUNS):
        for name, arguments in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], capture_output=True, check=False)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: round(statistics.median(values), 3) for name, values in seconds.items()}
    for name, value in medians.items():
        print(f"{name:<22} {value:6.3f} s")
    print(json.dumps({"bench": "startup", "runs": RUNS, **medians}))


if __name__ == "__main__":
    main()
