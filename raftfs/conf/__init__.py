"""Pure parsers of the configuration files; every error names its line."""
