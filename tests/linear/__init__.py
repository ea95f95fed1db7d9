"""Are the masters one tree that does one thing at a time? Histories, and the checker's own test."""
