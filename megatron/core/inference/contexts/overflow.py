"""Why a context does not take a request."""


class ContextOverflowError(Exception):
    """There is no room for a request now; there will be when others have ended."""


class RequestOverflowError(ContextOverflowError):
    """Too many requests at once."""


class TokenOverflowError(ContextOverflowError):
    """Too many tokens in one step."""


class ChunkOverflowError(ContextOverflowError):
    """Too few free chunks of the cache."""


class MaxSequenceLengthOverflowError(ContextOverflowError):
    """The request is longer than any may be: there will never be room for it."""
