"""Errors a user can act on: each is also the builtin a caller would expect.

Every message says what went wrong, where (path, shard, sample_id), what was expected and found,
and what to do about it.
"""


class DistillError(Exception):
    """Base of all errors this project raises on purpose; the command line prints it without a traceback."""


class ConfigError(DistillError, ValueError):
    """A configuration value or command-line option that cannot be used."""


class LaunchError(ConfigError):
    """What a launcher asks of all its processes cannot be done; all of them find this, and process 0 says it."""


class SampleError(DistillError, ValueError):
    """One sample cannot be read or encoded; stage one records it with this reason and goes on."""


class TooLongError(SampleError):
    """A conversation has more tokens than the model has positions."""


class DataError(DistillError, ValueError):
    """A whole data set cannot be opened."""


class CacheFormatError(DistillError, ValueError):
    """A cache file is damaged, incomplete or from an unknown format version."""


class NewerFormatError(CacheFormatError):
    """A cache file that is sound, but written by a newer version of this software; nothing to repair or delete."""


class CacheMismatchError(DistillError, ValueError):
    """A cache does not fit the data, tokenizer, template, teacher or student it is used with."""


class SampleNotCachedError(CacheMismatchError, KeyError):
    """The cache holds no record of the sample asked for."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""  # a KeyError would show its repr


class TransferError(DistillError, OSError):
    """A cache could not be copied from or to another place, after all retries."""


class NoRoomError(TransferError):
    """The disk is full, or a quota or the largest size of a file is reached."""


class TemperatureNotCachedError(DistillError, KeyError):
    """The cache holds no tail mass at the temperature asked for."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class ProcessFailedError(DistillError, RuntimeError):
    """One of several processes of a command failed; the message holds what it said."""


class ModelError(DistillError, ValueError):
    """A checkpoint or model family that cannot be used as asked."""
