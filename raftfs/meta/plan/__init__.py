"""Pure decisions about copies: which server takes a new one, which repair a chunk needs."""
