"""Drawing digits with a flow, judged by a classifier."""

from stepwell.tasks.digits.task import digits_task

__all__ = ["digits_task"]
