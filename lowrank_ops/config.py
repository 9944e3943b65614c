"""What the user chose: frozen dataclasses whose fields are named as PEFT names them."""

import math
import numbers
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NoReturn

__all__ = ["FrozenDict", "LoRAConfig", "MethodConfig", "selects"]

_MAX_RANK = 512


class FrozenDict(dict):
    """A dict that is hashable and refuses changes, so that a frozen dataclass can hold one."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("a config's pattern is frozen; make a new config with dataclasses.replace")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple:
        return FrozenDict, (dict(self),)


@dataclass(frozen=True)
class MethodConfig:
    """What the options of every method have in common. A method's config adds fields of its own.

    Args:
        r: rank, 1 ≤ r ≤ 512; need not be a power of two.
        lora_alpha: positive number; ``scale`` is lora_alpha / r, dimensionless.
        lora_dropout: probability in [0, 1) of dropping an element of the adapter's input while training.
        target_modules: "all-linear" (every ``nn.Linear`` but the output embedding); any other string is a
            regular expression for the whole module name; a list, tuple or set holds names or the ends of
            names after a dot, as "q_proj".

    Raises:
        ValueError: a value is out of range. TypeError: a value has the wrong type.
    """

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    target_modules: str | Collection[str] = "all-linear"

    method: ClassVar[str]
    # which biases of the base model train; a field where a method offers the choice. Not annotated here: a
    # dataclass would give that field this place, before those that LoRAConfig has ahead of it
    bias = "none"
    # whether a weight can hold the update
    mergeable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        op = type(self).__name__
        _check_rank(op, "r", self.r)
        _check_alpha(op, "lora_alpha", self.lora_alpha)
        _check_number(op, "lora_dropout", self.lora_dropout)
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"{op}: lora_dropout must be in [0, 1), got {self.lora_dropout}")
        # the dataclass is frozen for its users; here the fields take their canonical, hashable form
        for name in ("r", "lora_alpha", "lora_dropout"):
            object.__setattr__(self, name, _canonical_number(getattr(self, name)))
        object.__setattr__(self, "target_modules", _canonical_targets(op, self.target_modules))

    @property
    def scale(self) -> float:
        """Factor on the update, dimensionless: lora_alpha / r."""
        return self.lora_alpha / self.r

    def for_layer(self, name: str) -> "MethodConfig":
        """Return the config of the layer called ``name``: this one, unless a method has patterns."""
        return self


@dataclass(frozen=True)
class LoRAConfig(MethodConfig):
    """Options of a LoRA adapter, ΔW = scale · B A, with PEFT's names, defaults of meaning and matching rules.

    Args:
        r: rank, 1 ≤ r ≤ 512; need not be a power of two.
        lora_alpha: positive number; ``scale`` is lora_alpha / r, dimensionless.
        lora_dropout: probability in [0, 1) of dropping an element of the adapter's input while training.
        target_modules: "all-linear" (every ``nn.Linear`` but the output embedding); any other string is a
            regular expression for the whole module name; a list, tuple or set holds names or the ends of
            names after a dot, as "q_proj".
        use_rslora: scale is lora_alpha / √r instead.
        rank_pattern: name or regular expression -> rank, for layers that differ from ``r``. The expression
            must match the end of the module name; the first entry that matches wins.
        alpha_pattern: the same for ``lora_alpha``.
        bias: which biases of the base model train: "none", "all", or "lora_only" (those of adapted layers).

    Raises:
        ValueError: a value is out of range. TypeError: a value has the wrong type.

    Source: Hu et al. 2021 (arXiv:2106.09685); rank-stabilised scale: Kalajdzievski 2023 (arXiv:2312.03732).
    """

    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=FrozenDict)
    alpha_pattern: Mapping[str, float] = field(default_factory=FrozenDict)
    bias: str = "none"

    method: ClassVar[str] = "lora"

    def __post_init__(self) -> None:
        super().__post_init__()
        op = type(self).__name__
        if not isinstance(self.use_rslora, bool):
            raise TypeError(f"{op}: use_rslora must be a bool, got {type(self.use_rslora).__name__}")
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f'{op}: bias must be "none", "all" or "lora_only", got {self.bias!r}')
        for name, check in (("rank_pattern", _check_rank), ("alpha_pattern", _check_alpha)):
            object.__setattr__(self, name, _canonical_pattern(op, name, getattr(self, name), check))

    @property
    def scale(self) -> float:
        """Factor on the update, dimensionless: lora_alpha / r, or lora_alpha / √r with ``use_rslora``."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def for_layer(self, name: str) -> "LoRAConfig":
        """Return the config of one layer: its patterns resolved for the module called ``name``."""
        if not (self.rank_pattern or self.alpha_pattern):
            return self
        return replace(
            self,
            r=_lookup(self.rank_pattern, name, self.r),
            lora_alpha=_lookup(self.alpha_pattern, name, self.lora_alpha),
            rank_pattern=FrozenDict(),
            alpha_pattern=FrozenDict(),
        )


def selects(targets: str | Collection[str], name: str) -> bool:
    """Return whether ``targets``, a regular expression or a collection of endings, names ``name``."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def pattern_key(pattern: Mapping[str, Any], name: str) -> str | None:
    """Return the first key of ``pattern`` that matches the end of ``name``, by PEFT's rule, or None."""
    return next((key for key in pattern if re.match(rf"(.*\.)?({key})$", name)), None)


def _lookup(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    key = pattern_key(pattern, name)
    return default if key is None else pattern[key]


def _check_number(op: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")


def _check_rank(op: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if not 1 <= value <= _MAX_RANK:
        raise ValueError(f"{op}: {name} must be in 1..{_MAX_RANK}, got {value}")


def _check_alpha(op: str, name: str, value: object) -> None:
    _check_number(op, name, value)
    try:
        is_valid, shown = 0 < float(value) < math.inf, value
    except OverflowError:
        is_valid, shown = False, "a number that no float holds"
    if not is_valid:
        raise ValueError(f"{op}: {name} must be positive and finite, got {shown}")


def _canonical_number(value: numbers.Real) -> int | float:
    # numpy's numbers compare as Python's, but json and torch.compile do not take them
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _check_regex(op: str, name: str, expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        message = f"{op}: {name} must be a regular expression, got {expression!r} ({error})"
        raise ValueError(message) from error


def _canonical_targets(op: str, targets: object) -> str | tuple[str, ...]:
    if isinstance(targets, str):
        if not targets:
            raise ValueError(f"{op}: target_modules must name a module, got ''")
        if targets.lower() == "all-linear":
            return "all-linear"
        _check_regex(op, "target_modules", targets)
        return targets
    if not isinstance(targets, (list, tuple, set, frozenset)):
        kind = type(targets).__name__
        raise TypeError(f"{op}: target_modules must be a string or a list of strings, got {kind}")
    if not targets:
        raise ValueError(f"{op}: target_modules must name a module, got an empty {type(targets).__name__}")
    for target in targets:
        if not isinstance(target, str):
            raise TypeError(f"{op}: target_modules must hold strings, got {type(target).__name__}")
        if not target:
            raise ValueError(f"{op}: target_modules must hold module names, got ''")
    return tuple(sorted(targets)) if isinstance(targets, (set, frozenset)) else tuple(dict.fromkeys(targets))


def _canonical_pattern(op: str, name: str, pattern: object, check: Any) -> FrozenDict:
    if not isinstance(pattern, Mapping):
        raise TypeError(f"{op}: {name} must be a dict, got {type(pattern).__name__}")
    for key, value in pattern.items():
        if not isinstance(key, str):
            raise TypeError(f"{op}: {name} must have strings as keys, got {type(key).__name__}")
        _check_regex(op, name, key)
        check(op, f"{name}[{key!r}]", value)
    return FrozenDict({key: _canonical_number(value) for key, value in pattern.items()})
