"""What a caller may want to catch, each derived from the builtin torch or PEFT would raise there."""


class AdapterNotSelectedError(RuntimeError):
    """An adapter without a support was asked to train: ``select_parameters`` has not run yet."""


class AlreadyTrainedError(ValueError):
    """Selecting again would throw trained values away."""


class NonFiniteScoreError(ValueError):
    """A loss or a score is NaN or infinite."""


class LossyMergeError(ValueError):
    """Requantizing the merged weights would lose part of the delta."""


class AdapterFileError(ValueError):
    """An adapter file does not describe a valid sparse delta of this model."""


class BaseMismatchError(AdapterFileError):
    """An adapter is being loaded onto another base model than it was made on."""


class ScoreFileError(ValueError):
    """A file of saved scores is damaged, or was made for another model or another kind of unit."""
