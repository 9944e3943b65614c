"""How each method takes part in the demo: its options, its learning rate, and its way into the model."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

from demo_gelora import gelora_config
from demo_lori import calibrate_and_sparsify
from demo_salor import Pruning
from torch import Tensor, nn
from torch.optim import Optimizer

import lowrank_ops as lo
from lowrank_ops.config import MethodConfig

__all__ = ["METHODS", "Follow", "Method"]

Follow = Callable[[nn.Module, Optimizer, int, Namespace], Callable[[], None]]


@dataclass(frozen=True)
class Method:
    """One choice of ``--method``.

    Attributes:
        config: returns the options, from the command line alone: it is called before anything is loaded.
        lr: the largest learning rate, unless ``--lr`` gives one.
        rank: the rank, unless ``--rank`` gives one.
        inject: takes (model, config) and puts the adapters in.
        prepare: takes (model, training tokens, config, command line), does what comes before adapters are put
            into the plain model, and returns the config to inject.
        calibrate: takes (model, training tokens, command line), does what comes before the training proper
            with the adapters in place.
        follow: takes (model, optimizer, number of steps, command line), and returns what is called after each
            step of the optimizer, before the gradients are dropped.
    """

    config: Callable[[Namespace], MethodConfig]
    lr: float = 1e-3
    rank: int = 16
    inject: Callable[[nn.Module, MethodConfig], nn.Module] = lo.inject
    prepare: Callable[[nn.Module, Tensor, MethodConfig, Namespace], MethodConfig] | None = None
    calibrate: Callable[[nn.Module, Tensor, Namespace], None] | None = None
    follow: Follow | None = None

    def adapt(self, model: nn.Module, tokens: Tensor, config: MethodConfig, args: Namespace) -> None:
        """Put the adapters into ``model``, and say what they are."""
        if self.prepare is not None:
            config = self.prepare(model, tokens, config, args)
        self.inject(model, config)
        if self.calibrate is not None:
            self.calibrate(model, tokens, args)
        print(lo.report(model))


def lora(args: Namespace) -> lo.LoRAConfig:
    return lo.LoRAConfig(r=args.rank, lora_alpha=2 * args.rank, lora_dropout=args.dropout)


def lori(args: Namespace) -> lo.LoRIConfig:
    return lo.LoRIConfig(r=args.rank, lora_alpha=2 * args.rank, lora_dropout=args.dropout, seed=args.seed)


def denselora(args: Namespace) -> lo.DenseLoRAConfig:
    return lo.DenseLoRAConfig(r=args.rank, lora_alpha=2 * args.rank, lora_dropout=args.dropout)


def salor(args: Namespace) -> lo.SALORConfig:
    return lo.SALORConfig(r=args.rank, lora_alpha=2 * args.rank, lora_dropout=args.dropout, every=5)


def salr(args: Namespace) -> lo.SALRConfig:
    return lo.SALRConfig(r=args.rank, lora_alpha=2 * args.rank, lora_dropout=args.dropout)


def beside_lora(
    model: nn.Module, tokens: Tensor, config: lo.DenseLoRAConfig, args: Namespace
) -> lo.DenseLoRAConfig:
    head = model.get_output_embeddings()
    linears = [module for module in model.modules() if type(module) is nn.Linear and module is not head]
    count = config.r * sum(linear.in_features + linear.out_features for linear in linears)
    print(f"LoRA of rank {config.r} in every linear layer would have {count:,} parameters")
    return config


def ranks_from_geometry(
    model: nn.Module, tokens: Tensor, config: lo.LoRAConfig, args: Namespace
) -> lo.LoRAConfig:
    return gelora_config(model, tokens, config, args.seed, args.out)


METHODS = {
    "lora": Method(lora),
    "gelora": Method(lora, prepare=ranks_from_geometry),
    "denselora": Method(denselora, lr=1e-2, rank=8, prepare=beside_lora),
    "lori": Method(lori, lr=5e-3, calibrate=calibrate_and_sparsify),
    "salor": Method(salor, follow=Pruning),
    "salr": Method(salr, inject=lo.salr.prune),
}
