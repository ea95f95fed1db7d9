"""Bytes to messages and back: frames, message definitions, RPC with deadlines, authentication."""
