"""Sizes and numbers as people and the classic tools write them. Ground floor."""

_BINARY = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")
_DECIMAL = ("", "k", "M", "G", "T", "P", "E")


def format_size(size: int, *, binary: bool = True) -> str:
    """Bytes with a prefix and three digits or so: 1536 -> `1.5 KiB`."""
    step, prefixes = (1024, _BINARY) if binary else (1000, _DECIMAL)
    value, at = float(size), 0
    while value >= step and at < len(prefixes) - 1:
        value /= step
        at += 1
    if at == 0:
        return f"{size} B"
    return f"{value:.1f} {prefixes[at]}B" if value < 100 else f"{value:.0f} {prefixes[at]}B"
