"""The masters: pure state, planning, storage, Raft, services."""
