"""raftfs: a distributed file system whose metadata master cannot be a single point of failure."""

__version__ = "0.1.0"
