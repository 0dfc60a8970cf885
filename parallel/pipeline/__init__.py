"""Pipeline parallelism: layers cut into stages, and micro-batches that go through them by a schedule."""

from parallel.pipeline.cut import cut
from parallel.pipeline.plan import Plan, ScheduleName
from parallel.pipeline.runner import PipelineRunner

__all__ = ["PipelineRunner", "Plan", "ScheduleName", "cut"]
