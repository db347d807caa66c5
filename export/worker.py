"""The lowering in a process of its own.

Building graphs imports torch, which alone keeps 0.3 GB resident; in a child, that memory is gone before
the engine loads the weights for the proof.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from zreward.child import Message, child_process, serve
from zreward.errors import ExportError
from zreward.export.job import Lowered, LoweringJob
from zreward.jsonfile import dataclass_from_json
from zreward.progress import Progress


def lower_in_child(job: LoweringJob, report: Progress) -> Lowered:
    """Run `lower_checkpoint(job, report)` in a child process.

    Raises:
        ZrewardError: what the child raised, as the same class.
        ExportError: the child died; the message has its last words.
    """
    what = "builds the graphs"
    with child_process(
        "zreward.export.worker", dataclasses.asdict(job), what=what, error=ExportError
    ) as messages:
        for message in messages:
            if "result" in message:
                return dataclass_from_json(Lowered, message["result"], "lowering", ExportError)
            report(*message["progress"])
    raise ExportError(f"the process that {what} ended without a result")


def _lower(data: Message, say: Callable[[Message], None]) -> None:
    job = dataclass_from_json(LoweringJob, data, "job", ExportError)
    try:
        from zreward.export.lowering import lower_checkpoint

        lowered = lower_checkpoint(job, lambda *progress: say({"progress": progress}))
    except OSError as error:
        raise ExportError(f"{job.output}: cannot write the graphs ({error})") from None
    except ImportError as error:
        missing = error.name or error
        raise ExportError(f"{missing} is not installed; `pip install 'zreward[export]'` brings it") from None
    say({"result": dataclasses.asdict(lowered)})


if __name__ == "__main__":
    serve(_lower)
