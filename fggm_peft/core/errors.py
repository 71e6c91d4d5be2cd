"""Errors that a caller may want to catch, each derived from the builtin that torch or PEFT would raise."""


class AdapterNotSelectedError(RuntimeError):
    """An adapter without a support was used for training: ``select_parameters`` has not run yet."""


class AlreadyTrainedError(ValueError):
    """Another selection would discard trained values."""


class NonFiniteScoreError(ValueError):
    """A loss or a score is NaN or infinite."""


class LossyMergeError(ValueError):
    """Requantizing the merged weights would lose part of the delta."""


class AdapterFileError(ValueError):
    """An adapter file does not describe a valid sparse delta of this model."""


class BaseMismatchError(AdapterFileError):
    """An adapter is being loaded onto another base model than it was made for."""


class ScoreFileError(ValueError):
    """A file of saved scores is damaged, or was made for another model or another granularity."""
