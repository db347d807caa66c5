"""Four rubrics of one image: this runtime against other systems, interleaved in one run.

    python benchmarks/random_checkpoint.py --shape 0.8B --output build/random-0.8B
    zreward export build/random-0.8B -o build/bundle-0.8B-int8 --no-parity --quant int8
    python benchmarks/latency.py build/random-0.8B --systems transformers,zreward-int8=build/bundle-0.8B-int8 \\
        --systems openvino-int8,openvino-int8-passes,openvino-int4 --python openvino=build/openvino/bin/python \\
        --systems onnxruntime-int4,llamacpp-bf16,llamacpp-q8_0,llamacpp-q4_0 --python llamacpp=build/llamacpp/bin/python

Every system is a process of its own in an environment of its own (benchmarks/systems: each file says what it needs
and how its system is set) and gets the same tokens, positions and pixels. `NAME=BUNDLE` is a bundle of this project,
where NAME begins with `zreward`. A system whose name ends in `-kept` starts from the states after the system text,
which every prompt shares, one whose name ends in `-next` from those after the prompt, which every candidate shares; the
others read all of it each time. `--python` names the interpreter of a family of systems, the
part of a name before its first hyphen; the default is this one.

All systems stay loaded. A repetition runs each of them once, in turn, so that a change of the machine's speed meets
all of them; quoted are medians, and medians of the ratios within a repetition. Timed is the work from pixels and
tokens to probabilities; loading, decoding and resizing are not. A system that waits should leave the processor
alone: each gets a moment after its run to stop spinning, and the report has the processor time of those that wait.

What is compared with transformers' probabilities are those of the warm-up. A random checkpoint has close calls
everywhere, so a quantized system can differ much on it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from systems.worker import Job

from zreward.checkpoint import Checkpoint
from zreward.image import preprocess
from zreward.prompt import PromptEncoder, image_positions, load_tokenizer, text_positions
from zreward.runtime.bench import describe_machine

PROMPT = "a red fox in the snow under a full moon, watercolour"
REFERENCE = "transformers"
SETTLE_SECONDS = 0.3  # ONNX Runtime's threads spin for some 50 ms after a run
PARTS = ("vision", "prefix", "suffixes", "passes")
CONVERTED: dict[str, list[str]] = {
    "openvino-float": ["--weights", "float"],
    "openvino-int8": ["--weights", "int8"],
    "openvino-int8-passes": ["--weights", "int8", "--full-passes"],
    "openvino-int4": ["--weights", "int4"],
    "llamacpp-float": ["--weights", "float"],
    "llamacpp-bf16": ["--weights", "bf16"],
    "llamacpp-q8_0": ["--weights", "q8_0"],
    "llamacpp-q4_0": ["--weights", "q4_0"],
    "onnxruntime-float": ["--weights", "float"],
    "onnxruntime-int4": ["--weights", "int4"],
}
"""Systems that convert the checkpoint into the cache, and the options that say how."""

KEPT = {"-kept": ["--keep", "system"], "-next": ["--keep", "text"]}
FLAGS = ("avx", "amx", "fma", "f16c", "asimd", "i8mm", "sve")  # the reported ones begin so


@dataclass(frozen=True)
class Sample:
    """One run of one system.

    Attributes:
        seconds: wall clock, by the worker.
        cpu_seconds: processor time of the worker.
        waiting_cpu_seconds: processor time of all other workers meanwhile.
        parts: seconds of the parts that the system can tell apart.
    """

    seconds: float
    cpu_seconds: float
    waiting_cpu_seconds: float
    parts: dict[str, float]


@dataclass
class Result:
    """A system's probabilities [dimensions, bins], and its samples by repetition."""

    probabilities: NDArray[np.float64]
    samples: list[Sample] = field(default_factory=list)


class WorkerError(Exception):
    """A worker ended; the message says which, how, and where its words are."""


class Worker:
    """A system in its process, which ends with the `with` block."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.name, self._log = name, log
        self.about: dict[str, Any] = {}
        with log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **environment},
            )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        with suppress(BrokenPipeError):  # it ended first
            _open(self._process.stdin).close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        _open(self._process.stdout).close()

    def wait_until_ready(self) -> None:
        """Raises WorkerError."""
        self.about = self._answer()

    def run(self, job: Path) -> dict[str, Any]:
        """Seconds, parts and probabilities of one run. Raises WorkerError."""
        requests = _open(self._process.stdin)
        with suppress(BrokenPipeError):  # it ended, and there will be no answer
            requests.write(json.dumps({"job": str(job)}) + "\n")
            requests.flush()
        return self._answer()

    def cpu_seconds(self) -> float:
        """Processor time so far; 0 where the system does not tell, and after the end."""
        try:
            stat = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="utf-8")
        except OSError:
            return 0.0
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def _answer(self) -> dict[str, Any]:
        line = _open(self._process.stdout).readline()
        if not line:
            status = self._process.wait()
            said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            last = said[-1] if said else "without a word"
            raise WorkerError(f"{self.name} ended with status {status} ({last}); see {self._log}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def main() -> None:
    arguments = parse_arguments()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    machine = asdict(describe_machine()) | {
        "flags": cpu_flags()
    }  # before the work, so that the load is not our own
    jobs = {size: make_job(arguments.checkpoint, size) for size in arguments.image_size}
    failures: list[str] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers = start_workers(arguments, stack, failures)
        systems = {worker.name: worker.about for worker in workers}
        results = {}
        for size, job in jobs.items():
            path = folder / f"{size}.npz"
            job.save(path)
            results[size] = measure(workers, path, arguments.repetitions, failures)
    bins = np.array(Checkpoint.open(arguments.checkpoint).contract().bins)
    sizes = [size_report(size, jobs[size], results[size], arguments.baseline, bins) for size in jobs]
    report = {
        "schema": "zreward.latency",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine,
        "threads": arguments.threads,
        "baseline": arguments.baseline,
        "systems": systems,
        "failures": failures,
        "results": sizes,
    }
    print_report(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if failures else 0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    known = ", ".join([REFERENCE, *CONVERTED])
    parser.add_argument(
        "--systems", action="append", required=True, help=f"comma list of {known}, zreward-…=BUNDLE"
    )
    parser.add_argument("--python", action="append", default=[], metavar="FAMILY=PATH")
    parser.add_argument("--image-size", type=_sizes, default=[512, 1024], help="comma list, in pixels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--baseline", default="zreward-int8", help="the system that ratios are to")
    parser.add_argument(
        "--cache", type=Path, default=Path("build/latency-cache"), help="conversions and logs"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.systems = [name for group in arguments.systems for name in group.split(",")]
    for system in arguments.systems:
        name, _, bundle = system.partition("=")
        if not (name.startswith("zreward") if bundle else name == REFERENCE or plain(name)[0] in CONVERTED):
            parser.error(f"no system {system!r}; there are {known}, and zreward-…=BUNDLE")
    if arguments.repetitions < 1 or not all("=" in python for python in arguments.python):
        parser.error("--repetitions is at least 1, and --python is FAMILY=PATH")
    return arguments


def make_job(checkpoint: Path, side: int) -> Job:
    """A picture of noise and all questions about it, by the contract, tokenizer and image code of the runtime."""
    contract = Checkpoint.open(checkpoint).contract()
    encoder = PromptEncoder(contract, load_tokenizer(checkpoint))
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    patches = preprocess(Image.fromarray(noise), contract.image)
    text, span = encoder.text_prefix_ids(PROMPT), encoder.image_span_ids(patches.n_tokens)
    image, end = image_positions(len(text), *patches.token_grid)
    lengths = np.array([len(ids) for ids in encoder.question_ids])
    padded = [np.pad(ids, (0, lengths.max() - len(ids)), mode="edge") for ids in encoder.question_ids]
    return Job(
        prompt=PROMPT,
        n_system_ids=len(encoder.system_ids),
        n_text_ids=len(text),
        prefix_ids=np.concatenate([text, span]),
        prefix_positions=np.concatenate(
            [text_positions(0, len(text)), image, text_positions(end, 1)], axis=1
        ),
        suffix_ids=np.stack(padded),
        suffix_lengths=lengths,
        suffix_positions=text_positions(end + 1, lengths.max()),
        pixel_values=patches.pixel_values,
        image_grid_thw=np.array([patches.grid_thw]),
        merge_size=patches.merge_size,
        image_token_id=encoder.image_token_id,
        code_ids=np.array(encoder.code_ids),
        temperatures=np.array(contract.temperatures),
    )


def start_workers(arguments: argparse.Namespace, stack: ExitStack, failures: list[str]) -> list[Worker]:
    """One after the other, because conversions take memory and the cache is shared."""
    environment = {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
    workers = []
    for system in arguments.systems:
        name = system.partition("=")[0]
        command, log = command_of(system, arguments), arguments.cache / f"{name}.log"
        try:
            worker = stack.enter_context(Worker(name, command, environment, log))
            worker.wait_until_ready()
        except WorkerError as error:
            fail(failures, str(error))
            continue
        except OSError as error:
            fail(failures, f"{name} does not start ({error}); see --python")
            continue
        print(f"{name} is ready after {worker.about['load_seconds']:.0f} s", file=sys.stderr)
        workers.append(worker)
    return workers


def command_of(system: str, arguments: argparse.Namespace) -> list[str]:
    name, _, bundle = system.partition("=")
    family = name.partition("-")[0]
    pythons = dict(python.split("=", 1) for python in arguments.python)
    script = Path(__file__).parent / "systems" / f"{family}_worker.py"
    command = [pythons.get(family, sys.executable), str(script), "--threads", str(arguments.threads)]
    if bundle:
        return [*command, "--bundle", bundle, *plain(name)[1]]
    command += ["--checkpoint", str(arguments.checkpoint)]
    base, keep = plain(name)
    if base in CONVERTED:
        command += ["--cache", str(arguments.cache), *CONVERTED[base], *keep]
    return command


def plain(name: str) -> tuple[str, list[str]]:
    """A system's name without what it keeps, and the options that say so."""
    for ending, options in KEPT.items():
        if name.endswith(ending):
            return name.removesuffix(ending), options
    return name, []


def measure(workers: list[Worker], job: Path, repetitions: int, failures: list[str]) -> dict[str, Result]:
    """One warm-up of each system, then the repetitions in turn. A worker that ends leaves `workers`."""
    results: dict[str, Result] = {}
    for repetition in range(repetitions + 1):
        for worker in list(workers):
            try:
                sample, probabilities = run_one(worker, workers, job)
            except WorkerError as error:
                fail(failures, str(error))
                workers.remove(worker)
                results.pop(worker.name, None)
                continue
            if repetition:
                results[worker.name].samples.append(sample)
            else:
                results[worker.name] = Result(probabilities)
        print(f"{job.stem}: {repetition} of {repetitions} repetitions", file=sys.stderr)
    return results


def run_one(worker: Worker, workers: Sequence[Worker], job: Path) -> tuple[Sample, NDArray[np.float64]]:
    time.sleep(SETTLE_SECONDS)
    before = {w.name: w.cpu_seconds() for w in workers}
    answer = worker.run(job)
    used = {w.name: w.cpu_seconds() - before[w.name] for w in workers}
    own = used.pop(worker.name)
    sample = Sample(answer["seconds"], own, sum(used.values()), answer["parts"])
    return sample, np.array(answer["probabilities"])


def fail(failures: list[str], message: str) -> None:
    print(message, file=sys.stderr)
    failures.append(message)


def size_report(
    size: int, job: Job, results: Mapping[str, Result], baseline: str, bins: NDArray[np.float64]
) -> dict[str, Any]:
    reference, base = results.get(REFERENCE), results.get(baseline)
    systems = {}
    for name, result in results.items():
        seconds = [sample.seconds for sample in result.samples]
        systems[name] = {
            "median_seconds": statistics.median(seconds),
            "min_seconds": min(seconds),
            "max_seconds": max(seconds),
            "median_ratio": None if base is None else ratio(result, base),
            "median_parts": {
                part: statistics.median(sample.parts[part] for sample in result.samples)
                for part in PARTS
                if part in result.samples[0].parts
            },
            **({} if reference is None else drift(result.probabilities, reference.probabilities, bins)),
            "probabilities": result.probabilities.tolist(),
            "samples": [asdict(sample) for sample in result.samples],
        }
    tokens = {"image_tokens": int((job.prefix_ids == job.image_token_id).sum())}
    tokens |= {"prefix_tokens": len(job.prefix_ids), "suffix_tokens": job.suffix_lengths.tolist()}
    return {"image_size": size, **tokens, "systems": systems}


def ratio(result: Result, base: Result) -> float:
    """Median over the repetitions of the ratio within a repetition."""
    pairs = zip(result.samples, base.samples, strict=True)
    return statistics.median(a.seconds / b.seconds for a, b in pairs)


def drift(
    probabilities: NDArray[np.float64], reference: NDArray[np.float64], bins: NDArray[np.float64]
) -> dict[str, float]:
    return {
        "max_probability_difference": float(np.abs(probabilities - reference).max()),
        "mean_abs_score_difference": float(np.abs((probabilities - reference) @ bins).mean()),
    }


def print_report(report: Mapping[str, Any]) -> None:
    machine = report["machine"]
    print(
        f"{machine['processor']}, {machine['usable_cpus']} cores, {report['threads']} threads, {report['date']}"
    )
    for size in report["results"]:
        questions = ", ".join(map(str, size["suffix_tokens"]))
        print(
            f"\n{size['image_size']}×{size['image_size']}: prefix of {size['prefix_tokens']} tokens, "
            f"{size['image_tokens']} of them image; questions of {questions}"
        )
        print(f"{'seconds':<22} median     min … max    ratio  " + "".join(f"{part:>9}" for part in PARTS))
        for name, one in size["systems"].items():
            ratio_text = "" if one["median_ratio"] is None else f"{one['median_ratio']:.2f}"
            parts = [one["median_parts"].get(part) for part in PARTS]
            print(
                f"{name:<22} {one['median_seconds']:6.2f}  {one['min_seconds']:6.2f} … {one['max_seconds']:<6.2f}"
                f" {ratio_text:>6}  " + "".join(f"{'' if p is None else format(p, '.2f'):>9}" for p in parts)
            )
        print(f"ratio: to {report['baseline']}, median of the ratios within a repetition")
        for name, one in size["systems"].items():
            if name != REFERENCE and "max_probability_difference" in one:
                print(
                    f"{name} to {REFERENCE}: largest difference of a bin probability "
                    f"{one['max_probability_difference']:.1e}, mean |Δμ| {one['mean_abs_score_difference']:.1e}"
                )
        samples = [sample for one in size["systems"].values() for sample in one["samples"]]
        if waiting := [sample["waiting_cpu_seconds"] / sample["seconds"] for sample in samples]:
            print(f"those that wait use at most {max(waiting):.1%} of a core")
    for failure in report["failures"]:
        print(f"FAILED: {failure}")


def cpu_flags() -> list[str]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    flags = [line.partition(":")[2] for line in lines if line.lower().startswith(("flags", "features"))]
    return [flag for flag in " ".join(flags[:1]).split() if flag.startswith(FLAGS)]


def _open(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None, "the process was started with pipes"
    return pipe


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",")]


if __name__ == "__main__":
    main()
