"""How an observer ends a story."""


class Broken(BaseException):
    """A promise was not kept. No `except Exception` of a node may catch it."""


def must(holds: bool, what: str) -> None:
    """Broken unless it holds."""
    if not holds:
        raise Broken(what)
