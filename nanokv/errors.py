"""The errors that nanokv raises on purpose. Each message says what was given, what was expected, and what to do."""


class NanokvError(Exception):
    """Any error that nanokv raises on purpose; catch this one to catch them all."""


class ConfigError(NanokvError):
    """A model's shape that contradicts itself, or that nanokv does not implement."""


class WeightsError(NanokvError):
    """A tensor that is missing, that nobody asked for, or that has the wrong shape."""


class TokenError(NanokvError):
    """A token id outside the vocabulary, or a prompt that is no list of ids."""


class EmptyPromptError(TokenError):
    """A forward pass over no token at all."""


class ContextFullError(NanokvError):
    """More positions than the model's context has."""


class CacheError(NanokvError):
    """A use of the key/value cache that its rules forbid."""


class UnwrittenSlotError(CacheError):
    """A slot of the cache was read before anything was written to it."""


class EditError(NanokvError):
    """An intervention on something that the model does not have."""


class FileFormatError(NanokvError):
    """A file that is not what it claims to be: truncated, damaged, foreign, or lying in its header."""


class ModelNotFoundError(NanokvError):
    """A model's name or path that leads nowhere."""


class TokenizerError(NanokvError):
    """A text given to a model that has no tokenizer, or a tokenizer that cannot be built."""


class ChatError(NanokvError):
    """A conversation that cannot be read, or that the model's chat template cannot write."""


class TraceError(NanokvError):
    """A trace that does not hold what was asked of it."""


class DrawError(NanokvError):
    """A picture that cannot be drawn: an unknown format, or no program to draw it."""


class MissingExtraError(NanokvError):
    """An optional package is needed; the message names the extra that brings it."""
