"""The errors that zreward raises on purpose.

Each message says what was found, where, what was expected and what to do. The command line prints the
message alone and exits with the class's ``exit_status``; anything else that escapes is a bug.
"""

from __future__ import annotations


class ZrewardError(Exception):
    """Base class of every error that zreward raises on purpose. A failed job: exit status 1."""

    exit_status = 1


class UsageError(ZrewardError):
    """The call itself cannot be carried out as written: exit status 2."""

    exit_status = 2


class ContractError(ZrewardError):
    """A score contract is malformed, or does not fit the tokenizer or model it is used with."""


class PromptError(ZrewardError):
    """A prompt cannot be turned into the model's input."""


class ImageError(ZrewardError):
    """An image is missing, damaged, or outside what the contract accepts."""


class CheckpointError(ZrewardError):
    """A checkpoint directory is incomplete, damaged, or of an architecture that is not supported."""


class BundleError(ZrewardError):
    """A bundle is incomplete, altered, or written by an incompatible version."""


class ExportError(ZrewardError):
    """A checkpoint could not be lowered to the chosen target."""


class BackendError(ZrewardError):
    """An inference backend is missing, refused the model, or returned non-finite values."""


class PluginError(ZrewardError):
    """A library of TensorRT plugins cannot be built, was altered, or does not fit the TensorRT that is installed."""


class MetricError(ZrewardError, ValueError):
    """A metric is undefined on the data it was given."""


class QuantizationError(ZrewardError):
    """A scheme, a calibration set or a quantized weight is not usable, or the drift of the scores is too large."""


class BenchError(ZrewardError):
    """A report of a benchmark cannot be read, or does not fit the one that it is compared with."""
