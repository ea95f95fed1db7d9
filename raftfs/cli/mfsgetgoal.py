"""mfsgetgoal: show goals."""

from raftfs.cli import goal


def main(argv: list[str] | None = None) -> int:
    """Run the tool. Returns the exit status."""
    return goal.get_main("mfsgetgoal", argv)


if __name__ == "__main__":
    raise SystemExit(main())
