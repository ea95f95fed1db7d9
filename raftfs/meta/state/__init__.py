"""The pure state machine: rows, operations, results, changelog lines. No clock, chance or I/O."""
