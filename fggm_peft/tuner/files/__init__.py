"""Adapter files: reading, writing and checks. The names here serve the packages above."""

from .atomic import digest_of_files, digest_of_folder, partial_file, write_json, write_whole
from .hub import may_be_hub_id
from .input_covariance import retain, retained_by, set_retained
from .task_scores import HISTORY, TaskRecord, history_of

__all__ = ["HISTORY", "TaskRecord", "digest_of_files", "digest_of_folder", "history_of", "may_be_hub_id"]
__all__ += ["partial_file", "retain", "retained_by", "set_retained", "write_json", "write_whole"]
