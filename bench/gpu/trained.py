"""A few steps of Artemis' Trainer, replayed as CUDA graphs and as they are.

A small Llama in bf16 with the default hybrid, dropout, micro-batches that add up, and a last one of
another size. Attention is plain: the backward of torch's fused one adds up in any order.
"""

import tempfile

import torch
from transformers import PrinterCallback, ProgressCallback

from artemis import HybridAdapterConfig, add_hybrid_adapter_to_model
from artemis.benchmark.models import Architecture, build, random_tokens
from artemis.benchmark.operations import Sizes, Verdict
from artemis.training import TokenBlocks, Trainer, TrainingConfig

DROPOUT = 0.1
_EXAMPLES, _BATCH, _VOCABULARY = 13, 2, 512
_LIMIT = 0.02  # of what training changed; fewer bits than that are no rounding
State = dict[str, torch.Tensor]


def sizes(tiny: bool) -> Sizes:
    """Tokens of a micro-batch, hidden and intermediate size, rank."""
    return Sizes(_BATCH * 9, 64, 96, 4) if tiny else Sizes(_BATCH * 129, 256, 640, 16)


def judge(device: torch.device, tiny: bool) -> Verdict:
    """Without a GPU both runs are as they are."""
    start, expected, loss = _trained(device, tiny, graphs=False)
    _, got, replayed_loss = _trained(device, tiny, graphs=device.type == "cuda")
    losses = f"loss {loss:.6f}, replayed {replayed_loss:.6f}"
    differ = [name for name in expected if not torch.equal(got[name], expected[name])]
    if not differ:
        return Verdict(0.0, f"equal, {losses}")
    errors = {
        name: ((got[name] - expected[name]).norm() / (expected[name] - start[name]).norm()).item()
        for name in differ
    }
    worst = max(errors, key=errors.__getitem__)
    where = f"{len(differ)} of {len(expected)} differ, most {worst}; {losses}"
    return Verdict(errors[worst] / _LIMIT, where)


def _trained(device: torch.device, tiny: bool, graphs: bool) -> tuple[State, State, float]:
    """What trains before and after, and the mean loss."""
    m, hidden, intermediate, rank = sizes(tiny)
    length = m // _BATCH
    model_sizes = Architecture(hidden, intermediate, 2, _VOCABULARY)
    with device:
        model = build(model_sizes, torch.float32 if tiny else torch.bfloat16, length)
    model.set_attn_implementation("eager")
    config = HybridAdapterConfig(
        lora_rank=rank, adapter_size=rank, lora_dropout=DROPOUT, adapter_dropout=DROPOUT
    )
    add_hybrid_adapter_to_model(model, config)
    start = _state(model)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingConfig(
            output_dir=folder, batch_size=_BATCH, accumulation=2, epochs=3, learning_rate=5e-3
        )
        trainer = Trainer(
            model,
            settings.arguments(),
            train_dataset=TokenBlocks(random_tokens(_VOCABULARY, _EXAMPLES, length)),
            cuda_graphs=graphs,
        )
        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
        loss = trainer.train().training_loss
    return start, _state(model), loss


def _state(model: torch.nn.Module) -> State:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
