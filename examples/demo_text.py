"""The demo's text: whole files on one side or the other of the split, then windows of tokens."""

import random
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["read_text", "split_texts", "stdlib_files", "tokenise", "windows"]


def stdlib_files() -> list[Path]:
    """Return the top-level modules of the standard library of this Python, in alphabetical order."""
    return sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))


def read_text(path: Path) -> str:
    """Return a file's text, or end the program with a sentence that names the file."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"finetune: --text must name readable UTF-8 files, got {path}: {error}") from error


def split_texts(files: Sequence[Path], seed: int, share: float = 0.1) -> tuple[list[str], list[str]]:
    """Read the files and return (train, held-out) texts, with no file on both sides.

    A share of the files, at least one, is held out; they are drawn by ``seed`` from the files' sorted
    names. A single file is cut instead, and its last part held out.
    """
    files = sorted(dict.fromkeys(path.resolve() for path in files))
    if len(files) == 1:
        text = read_text(files[0])
        cut = int(len(text) * (1 - share))
        return [text[:cut]], [text[cut:]]
    random.Random(seed).shuffle(files)
    held_out = max(1, round(share * len(files)))
    texts = [read_text(path) for path in files]
    return texts[held_out:], texts[:held_out]


def tokenise(texts: Sequence[str], encode: Callable[[str], list[int]], end: int, at_least: int) -> Tensor:
    """Return the tokens of all texts, each followed by ``end``, as one int64 vector."""
    tokens = [token for text in texts for token in (*encode(text), end)]
    if len(tokens) < at_least:
        raise SystemExit(
            f"finetune: --text must hold at least {at_least} tokens on each side of the split, "
            f"got {len(tokens)}; give more or longer files"
        )
    return torch.tensor(tokens)


def windows(tokens: Tensor, length: int, count: int, seed: int | None = None) -> Tensor:
    """Return (count, length) windows of a token vector: spread evenly, or at places drawn by ``seed``."""
    last = len(tokens) - length
    if seed is None:
        starts = torch.linspace(0, last, count).long()
    else:
        starts = torch.randint(last + 1, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([tokens[start : start + length] for start in starts.tolist()])
