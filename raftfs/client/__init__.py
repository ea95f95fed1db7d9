"""The client's side of the protocol: find the leader, be answered exactly once, move chunk data."""
