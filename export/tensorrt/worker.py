"""The builder in a process of its own: it may end the process that it runs in, and holds its memory until then."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from zreward.child import Message, child_process, serve
from zreward.errors import ExportError
from zreward.export.tensorrt.builder import build
from zreward.export.tensorrt.job import EngineFacts, EngineJob
from zreward.jsonfile import dataclass_from_json
from zreward.progress import Progress
from zreward.tensorrt_library import load_tensorrt


def build_in_child(job: EngineJob, report: Progress) -> EngineFacts:
    """Build an engine in a child process.

    Raises:
        ZrewardError: what the child raised, as the same class.
        ExportError: the child died; the message has its last words.
    """
    what = f"builds {job.engine}"
    with child_process(
        "zreward.export.tensorrt.worker", dataclasses.asdict(job), what=what, error=ExportError
    ) as messages:
        for message in messages:
            if "result" in message:
                return dataclass_from_json(EngineFacts, message["result"], "engine", ExportError)
            report(*message["progress"])
    raise ExportError(f"the process that {what} ended without a result")


def _build(data: Message, say: Callable[[Message], None]) -> None:
    job = dataclass_from_json(EngineJob, data, "job", ExportError)
    try:
        facts = build(load_tensorrt(job.flavour), job, lambda *progress: say({"progress": progress}))
    except OSError as error:
        raise ExportError(f"{job.engine}: a file that its builder needs cannot be used ({error})") from None
    say({"result": dataclasses.asdict(facts)})


if __name__ == "__main__":
    serve(_build)
