"""The web monitor of a master (port P+7, by default 9425)."""
