"""Training on transformers' Trainer: `Trainer`, the training file, text data."""

from ..report import count_parameters
from .config import BaseConfig, DataConfig, RunConfig, TrainingConfig
from .data import TokenBlocks, cut_blocks, load_blocks
from .loading import attention_for, default_device, load_base, resolve_precision
from .loss import causal_loss, lean_loss
from .memory import keep_freed_memory
from .progress import show_progress
from .reallocation import RankAllocationCallback
from .run import run_training
from .throughput import tokens_per_second
from .trainer import Trainer

__all__ = [
    "BaseConfig",
    "DataConfig",
    "RankAllocationCallback",
    "RunConfig",
    "TokenBlocks",
    "Trainer",
    "TrainingConfig",
    "attention_for",
    "causal_loss",
    "count_parameters",
    "cut_blocks",
    "default_device",
    "keep_freed_memory",
    "lean_loss",
    "load_base",
    "load_blocks",
    "resolve_precision",
    "run_training",
    "show_progress",
    "tokens_per_second",
]
