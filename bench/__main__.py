"""Runs one benchmark: ``python -m bench NAME [options]``; without a name it lists them."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

NOT_BENCHES = {
    *("__init__", "__main__"),
    *("drift", "hot_set", "options", "peers", "prompts", "rows", "synthetic", "timing", "traces"),
    "ways",
}


def main() -> int:
    """Dispatch to ``bench.NAME.main``."""
    folder = Path(__file__).parent
    names = sorted(p.stem for p in folder.glob("*.py") if p.stem not in NOT_BENCHES)
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        print("usage: python -m bench NAME [options]\n")
        for name in names:
            question = (import_module(f"bench.{name}").__doc__ or "").strip().splitlines()[0]
            print(f"  {name:16} {question}")
        return 0 if sys.argv[1:] in ([], ["--help"], ["-h"]) else 2
    import_module(f"bench.{sys.argv[1]}").main(sys.argv[2:])
    return 0


if __name__ == "__main__":
    sys.exit(main())
