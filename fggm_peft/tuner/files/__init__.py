"""Adapter files: reading, writing and checks. The names here serve the packages above."""

from .atomic import (
    digest_of_files,
    digest_of_folder,
    file_name,
    partial_file,
    require_writable,
    write_json,
    write_whole,
)
from .hub import may_be_hub_id, user_path
from .input_covariance import retained_by, set_retained
from .task_scores import HISTORY, TaskRecord, history_of

__all__ = ["HISTORY", "TaskRecord", "digest_of_files", "digest_of_folder", "history_of", "may_be_hub_id"]
__all__ += ["file_name", "partial_file", "require_writable", "retained_by", "set_retained", "user_path"]
__all__ += ["write_json", "write_whole"]
