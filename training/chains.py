"""Written reasoning chains: JSONL with `id`, `dimension` and `chain` a line.

`id` is that of a line of the data set. A question may have several chains. A chain for a question without a label
teaches to reason, and nothing about the score.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from zreward.contract import END_THINK
from zreward.errors import UsageError
from zreward.pairs import LineError, parse_line, read_lines
from zreward.training.data import Question, TrainingSet, dimension_of_name, item_of_id, rows_by_id

CHAIN_KEYS = ("id", "dimension", "chain")


class Chain(NamedTuple):
    """A text about a question; it leads to the score where the question has a label."""

    question: Question
    text: str


def load_chains(path: Path, data: TrainingSet) -> list[Chain]:
    """Read the chains of a data set.

    Raises:
        UsageError: there is no such file, it is empty, or a line is malformed, names an unknown id or dimension, or
            holds the text that ends a trace.
    """
    if not path.is_file():
        raise UsageError(
            f"{path}: no such file of chains; expected JSONL with {', '.join(CHAIN_KEYS)} a line"
        )
    rows = rows_by_id(data)
    chains = []
    with path.open("rb") as stream:
        for line in read_lines(stream):
            where = f"{path}, line {line.number}"
            try:
                chains.append(_chain(parse_line(line), rows, data, where))
            except LineError as error:
                raise UsageError(f"{where}: {error}") from None
    if not chains:
        raise UsageError(f"{path}: no chains in it")
    return chains


def _chain(line: dict[str, Any], rows: dict[str | int, list[int]], data: TrainingSet, where: str) -> Chain:
    if sorted(line) != sorted(CHAIN_KEYS):
        raise UsageError(
            f"{where}: expected the keys {', '.join(CHAIN_KEYS)}; found {', '.join(line) or 'none'}"
        )
    item = item_of_id(line["id"], rows, data, f"{where}: id")
    dimension = dimension_of_name(line["dimension"], data.contract, where)
    text = line["chain"]
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f"{where}: 'chain' must be a text that is not empty")
    if END_THINK.strip() in text:
        raise UsageError(f"{where}: the chain holds {END_THINK.strip()!r}, which ends a trace; remove it")
    return Chain(Question(item, dimension), text.strip())
