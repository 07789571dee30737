"""Batch jobs: a file of OpenAI batch requests in, a file of responses out, resumable at any moment."""

from jaxdual.offline.batch_file import BatchError, BatchLine, RejectedLine, read_batch
from jaxdual.offline.output_file import OutputFile
from jaxdual.offline.runner import BatchRunner

__all__ = ["BatchError", "BatchLine", "BatchRunner", "OutputFile", "RejectedLine", "read_batch"]
