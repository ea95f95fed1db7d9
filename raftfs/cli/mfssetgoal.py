"""mfssetgoal: change goals."""

import os

from raftfs.cli import goal


def main(argv: list[str] | None = None) -> int:
    """Run the tool. Returns the exit status."""
    return goal.set_main("mfssetgoal", argv, os.getuid())


if __name__ == "__main__":
    raise SystemExit(main())
