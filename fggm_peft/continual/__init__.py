"""Sequences of tasks: streams, methods, measures and reports. They require the extra ``[continual]``."""

from importlib.util import find_spec

if find_spec("pydantic") is None:
    raise ImportError("sequences of tasks need pydantic: pip install 'fggm-peft[continual]'")
