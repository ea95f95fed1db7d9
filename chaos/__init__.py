"""Stories of failure. They touch the product only by command line, HTTP, signals and the mount."""
