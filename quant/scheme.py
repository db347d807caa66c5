"""Schemes: which layer is stored in which format, and why the others stay as they are.

A scheme is text. It begins with a format for everything that may be quantized, and exceptions follow:

    int4
    int4-g32
    int4,model.visual.*=int8-weight,*.down_proj=int8-weight

    format    int8             weights of 8 bits, a scale per output; inputs quantized per token
              int8-static      the same with one scale for all inputs, found in calibration (TensorRT)
              int8-weight      weights of 8 bits, dequantized in the product
              fp8              weights and inputs that are floats of 8 bits, a scale per output and one scale for
                               all inputs, found in calibration (TensorRT)
              int4             weights of 4 bits
    suffixes  -g16 … -g256     inputs that share a scale, where not 64 (int4) or 128 (int8-weight)
              -asym            a zero point per group
              none             not quantized

The rules below say what may be quantized. They are tried in order, and a tensor that none of them names is an
error: nothing is quantized, or left out, without a reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from zreward.errors import QuantizationError
from zreward.quant.tensor import WeightFormat

DEFAULT_GROUPS: Mapping[str, int] = {"int8": 0, "int8-static": 0, "int8-weight": 128, "int4": 64, "fp8": 0}
"""Inputs that share a scale where a name does not say it; 0: the whole row."""

_FORMAT = re.compile(r"(?P<base>int8-static|int8-weight|int8|int4|fp8)(-g(?P<group>\d+))?(?P<asym>-asym)?")
_BASES = {
    "int8": (8, "int8"),
    "int8-static": (8, "int8-static"),
    "int8-weight": (8, "float"),
    "int4": (4, "float"),
    "fp8": (8, "fp8-static"),
}


@dataclass(frozen=True)
class Rule:
    """What may happen to the tensors that `pattern` (fnmatch) names, and the reason."""

    pattern: str
    quantizable: bool
    reason: str


KEPT = (
    Rule("mtp.*", False, "multi-token prediction head: not part of a reward model, not exported"),
    Rule("*.bias", False, "a vector, added in float32"),
    Rule("*norm*.weight", False, "a vector that scales every channel"),
    Rule("*.embed_tokens.weight", False, "looked up, never multiplied; stays in the checkpoint's own type"),
    Rule("lm_head.weight", False, "only the score rows are kept, and they decide the answer"),
    Rule("*.visual.pos_embed.weight", False, "looked up and interpolated, never multiplied"),
    Rule("*.visual.patch_embed.*", False, "reads the pixels; a small share of the weights"),
    Rule("*.linear_attn.conv1d.weight", False, "four taps a channel, in front of the recurrent state"),
    Rule(
        "*.linear_attn.in_proj_a.weight", False, "sets the decay of the recurrent state, an exponential of it"
    ),
    Rule("*.linear_attn.in_proj_b.weight", False, "sets the write strength of the recurrent state"),
    Rule("*.linear_attn.A_log", False, "decay of the recurrent state"),
    Rule("*.linear_attn.dt_bias", False, "decay of the recurrent state"),
)
PRODUCTS = (
    Rule("*.visual.blocks.*.attn.qkv.weight", True, "vision: queries, keys and values"),
    Rule("*.visual.blocks.*.attn.proj.weight", True, "vision: attention output"),
    Rule("*.visual.blocks.*.mlp.linear_fc[12].weight", True, "vision: feed-forward"),
    Rule("*.visual.merger.linear_fc[12].weight", True, "merger of 2×2 patches"),
    Rule("*.linear_attn.in_proj_qkv.weight", True, "DeltaNet: queries, keys and values"),
    Rule("*.linear_attn.in_proj_z.weight", True, "DeltaNet: output gate"),
    Rule("*.linear_attn.out_proj.weight", True, "DeltaNet: output"),
    Rule("*.self_attn.[qkvo]_proj.weight", True, "full attention"),
    Rule("*.mlp.gate_proj.weight", True, "feed-forward"),
    Rule("*.mlp.up_proj.weight", True, "feed-forward"),
    Rule("*.mlp.down_proj.weight", True, "feed-forward"),
)
RULES = KEPT + PRODUCTS


@dataclass(frozen=True)
class Scheme:
    """A parsed scheme.

    Attributes:
        text: as it was written.
        default: name of the format of every product that no exception names.
        exceptions: (pattern, format name) in the order they are tried; patterns name layers, without ".weight".
        groups: what names without `-g` mean, see `DEFAULT_GROUPS`.
    """

    text: str
    default: str
    exceptions: tuple[tuple[str, str], ...] = ()
    groups: Mapping[str, int] = field(default_factory=lambda: DEFAULT_GROUPS)

    @staticmethod
    def parse(text: str, groups: Mapping[str, int] = DEFAULT_GROUPS) -> Scheme:
        """Read a scheme.

        Args:
            text: as above.
            groups: what names without `-g` mean, where a target multiplies other groups than `DEFAULT_GROUPS`.

        Raises:
            QuantizationError: an unknown format, or an exception that is not `pattern=format`.
        """
        first, *others = [part.strip() for part in text.split(",")]
        exceptions = []
        for part in others:
            pattern, separator, name = part.partition("=")
            if not separator or not pattern:
                raise QuantizationError(f"scheme {text!r}: {part!r} is not PATTERN=FORMAT")
            exceptions.append((pattern.strip(), name.strip()))
        for name in (first, *(name for _, name in exceptions)):
            parse_format(name)
        return Scheme(text, first, tuple(exceptions), groups)


def with_static_inputs(text: str) -> str:
    """The scheme with `int8-static` wherever it says `int8`, for runtimes that find no scales of their own."""
    parts = [part.rpartition("=") for part in text.split(",")]
    names = ["int8-static" if name.strip() == "int8" else name for _, _, name in parts]
    return ",".join(f"{pattern}{sign}{name}" for (pattern, sign, _), name in zip(parts, names, strict=True))


@dataclass(frozen=True)
class Table:
    """A scheme applied to one checkpoint.

    Attributes:
        scheme: the text it came from.
        formats: the format of each quantized tensor, by name in the checkpoint.
        kept: why each other tensor stays as it is.
    """

    scheme: str
    formats: Mapping[str, WeightFormat]
    kept: Mapping[str, str]


def parse_format(name: str, groups: Mapping[str, int] = DEFAULT_GROUPS) -> WeightFormat | None:
    """The format of a name such as `int4-g32-asym`; None for `none`.

    Without `-g`, it has the group that `groups` gives it.
    """
    if name == "none":
        return None
    match = _FORMAT.fullmatch(name)
    if match is None:
        raise QuantizationError(
            f"unknown format {name!r}; known are none, fp8, int8, int8-static, int8-weight and int4, the last two "
            "with -g16 to -g256 and -asym"
        )
    bits, activations = _BASES[match["base"]]
    group = int(match["group"] or groups[match["base"]])
    return WeightFormat(bits, group, not match["asym"], activations)


def format_name(chosen: WeightFormat) -> str:
    """The name that `parse_format` reads."""
    base = next(n for n, v in _BASES.items() if v == (chosen.bits, chosen.activations))
    group = "" if chosen.rounds_inputs else f"-g{chosen.group_size}"
    return f"{base}{group}{'' if chosen.symmetric else '-asym'}"


def rule_for(tensor: str) -> Rule:
    """The rule that covers a tensor.

    Raises:
        QuantizationError: no rule does.
    """
    for rule in RULES:
        if fnmatchcase(tensor, rule.pattern):
            return rule
    raise QuantizationError(
        f"no rule says whether {tensor!r} may be quantized; zreward knows the layers of Qwen3.5 "
        "(zreward/quant/scheme.py lists them)"
    )


def resolve(scheme: Scheme, shapes: Mapping[str, tuple[int, ...]]) -> Table:
    """Choose the format of every tensor of a checkpoint.

    A group size that the scheme leaves open is halved until it divides the inputs; one that it names must
    divide them.

    Args:
        scheme: the scheme.
        shapes: shape of each tensor by its name in the checkpoint.

    Raises:
        QuantizationError: a tensor without rule, an exception that names nothing, names what must stay or comes
            too late, or a group size that does not divide.
    """
    formats: dict[str, WeightFormat] = {}
    kept: dict[str, str] = {}
    unused, hidden = {pattern for pattern, _ in scheme.exceptions}, set[str]()
    for tensor, shape in shapes.items():
        rule, layer = rule_for(tensor), tensor.removesuffix(".weight")
        named = [(p, name) for p, name in scheme.exceptions if fnmatchcase(layer, p)]
        if not rule.quantizable:
            kept[tensor] = rule.reason
            _refuse_kept(named, layer, rule)
            continue
        unused -= {pattern for pattern, _ in named[:1]}
        hidden |= {pattern for pattern, _ in named[1:]}
        chosen = named[0][1] if named else scheme.default
        if chosen == "none":
            kept[tensor] = "the scheme leaves it as it is"
        else:
            formats[tensor] = _fitted(chosen, layer, shape[1], scheme.groups)
    for pattern in sorted(unused):
        problem = "names no layer of this checkpoint"
        if pattern in hidden:
            problem = "names only layers that an earlier exception names too; put it before that one"
        raise QuantizationError(f"scheme {scheme.text!r}: {pattern!r} {problem}")
    if not formats:
        raise QuantizationError(f"scheme {scheme.text!r} quantizes nothing")
    return Table(scheme.text, formats, kept)


def block_formats(table: Table, prefix: str) -> dict[str, WeightFormat]:
    """Formats of the quantized layers under `prefix`, by the rest of their names without ".weight"."""
    return {
        name.removeprefix(prefix).removesuffix(".weight"): chosen
        for name, chosen in table.formats.items()
        if name.startswith(prefix)
    }


def _refuse_kept(named: Iterable[tuple[str, str]], layer: str, rule: Rule) -> None:
    """An exception without wildcards that names a tensor which must stay is a mistake; `*` may pass over it."""
    for pattern, name in named:
        if pattern == layer and name != "none":
            raise QuantizationError(f"{layer} stays as it is: {rule.reason}")


def _fitted(name: str, layer: str, in_features: int, groups: Mapping[str, int]) -> WeightFormat:
    """The format `name` for one layer; a group size that the name leaves open is made to divide the inputs."""
    chosen = parse_format(name, groups)
    assert chosen is not None
    try:
        if "-g" not in name:
            return chosen.fitted(in_features)
        chosen.n_groups(in_features)
    except QuantizationError as error:
        raise QuantizationError(f"{layer}: {error}") from None
    return chosen
