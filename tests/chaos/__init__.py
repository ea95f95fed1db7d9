"""Short runs of the stories in `chaos/`, and what their tools promise."""
