"""Hidden states of a model's blocks, one vector an example, from hooks that are gone afterwards."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["pooled_states"]


class _Recorder:
    """Pools what passes the blocks: the input of the first, and the raw output of each."""

    def __init__(self, count: int, pooling: str) -> None:
        self.pooling = pooling
        self.mask: Tensor | None = None
        self.pooled: list[list[Tensor]] = [[] for _ in range(count + 1)]

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._keep(0, args[0] if args else kwargs.get("hidden_states"))

    def after(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            self._keep(index + 1, output if isinstance(output, Tensor) else output[0])

        return hook

    def _keep(self, index: int, states: object) -> None:
        if not isinstance(states, Tensor) or states.dim() != 3:
            got = tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__
            raise ValueError(f"select_ranks: hidden states must be (batch, tokens, K), got {got}")
        mask = states.new_ones(states.shape[:2]) if self.mask is None else self.mask.to(states.device)
        self.pooled[index].append(pool(states, mask, self.pooling).cpu())


def pool(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Return one float32 vector an example, (B, K): mean or last of states (B, T, K) where mask (B, T) is on.

    Raises:
        ValueError: the mask has another shape, or leaves an example without a token.
    """
    if mask.shape != states.shape[:2]:
        raise ValueError(
            f"select_ranks: attention_mask must be {tuple(states.shape[:2])}, got {tuple(mask.shape)}"
        )
    mask = mask != 0
    counts = mask.sum(1)
    if not counts.all():
        raise ValueError("select_ranks: attention_mask must keep a token of every example, got one of none")
    if pooling == "last":
        places = torch.arange(mask.shape[1], device=mask.device)
        last = torch.where(mask, places, -1).amax(1)
        return states[torch.arange(len(states), device=states.device), last].float()
    return torch.where(mask[..., None], states.float(), 0).sum(1) / counts[:, None]


@contextmanager
def _recording(model: nn.Module, blocks: Sequence[nn.Module], recorder: _Recorder) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    handles = []
    try:
        handles.append(blocks[0].register_forward_pre_hook(recorder.before, with_kwargs=True))
        handles += [block.register_forward_hook(recorder.after(i)) for i, block in enumerate(blocks)]
        model.eval()
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode


def _progress(batches: Iterable, total: int, show: bool) -> Any:
    if not show:
        return None
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise RuntimeError(
            "select_ranks: progress must be False where tqdm is not installed, got True; pip install tqdm"
        ) from error
    return tqdm(total=total, desc="hidden states", unit="example")


def _arguments(batch: object, device: torch.device) -> dict[str, Any]:
    if isinstance(batch, Tensor):
        return {"input_ids": batch.to(device)}
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"select_ranks: batches must hold tensors of token ids or dicts, got {type(batch).__name__}"
        )
    # the head is not run, so there is no loss
    arguments = {name: value for name, value in batch.items() if name != "labels"}
    return {name: v.to(device) if isinstance(v, Tensor) else v for name, v in arguments.items()}


def pooled_states(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    batches: Iterable[Tensor | Mapping[str, Any]],
    pooling: str,
    max_points: int,
    progress: bool,
) -> list[Tensor]:
    """Return the pooled states around ``blocks``, one more than blocks, each (M, K) float32 on the CPU.

    The model runs in evaluation mode without its head, no longer than until ``max_points`` examples are in,
    and is left as it was.
    """
    recorder = _Recorder(len(blocks), pooling)
    body = getattr(model, "base_model", None)
    body = body if isinstance(body, nn.Module) else model
    device = next(model.parameters()).device
    count, bar = 0, _progress(batches, max_points, progress)
    with torch.no_grad(), _recording(model, blocks, recorder):
        for batch in batches:
            arguments = _arguments(batch, device)
            recorder.mask = arguments.get("attention_mask")
            body(**arguments) if isinstance(batch, Mapping) else body(arguments["input_ids"])
            added = sum(map(len, recorder.pooled[-1])) - count
            count += added
            if bar is not None:
                bar.update(min(added, max_points - bar.n))
            if count >= max_points:
                break
    if bar is not None:
        bar.close()
    if not count:
        raise ValueError("select_ranks: batches must hold examples, got none")
    return [torch.cat(parts)[:max_points] for parts in recorder.pooled]
