"""`artemis generate`: text from a base model, with or without an adapter."""

import argparse
import json
import math
import time

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer, set_seed

from ..errors import AdapterError
from ..hybrid import load_hybrid_adapter, load_peft_adapter
from ..interchange import holds_lora
from ..schema import check_integer
from ..training import default_device, load_base, resolve_precision
from ..training.config import MAX_SEED
from ..training.loading import PRECISIONS
from ..training.positions import learned_positions

NAME = "generate"
SUMMARY = "continue a prompt with a base model and an adapter"
EXAMPLE = '  artemis generate artemis-demo/base --adapter artemis-demo/hybrid --prompt "The "'

#: Logits are divided by the temperature, and have to stay finite.
COLDEST = 1e-6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="folder or name of the base model, quantized or not"
    )
    parser.add_argument(
        "--adapter", metavar="PATH", help="folder of a saved adapter, ours or PEFT's"
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="default: 200")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 (the default) takes the likeliest token; higher samples more freely",
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="default: auto")
    parser.add_argument("--json", action="store_true", help="print the text and its rate as JSON")


def run(args: argparse.Namespace) -> None:
    check_integer("--max-new-tokens", args.max_new_tokens)
    if args.temperature != 0 and not COLDEST <= args.temperature < math.inf:
        raise AdapterError(
            f"--temperature: got {args.temperature}, allowed: 0, or a number from {COLDEST}"
        )
    if not 0 <= args.seed <= MAX_SEED:
        raise AdapterError(f"--seed: got {args.seed}, allowed: an integer from 0 to {MAX_SEED}")
    try:
        args.prompt.encode()
    except UnicodeEncodeError:
        raise AdapterError(f"--prompt: got {args.prompt!r}, allowed: UTF-8 text") from None
    model, tokenizer = load_base(args.model, resolve_precision(args.precision))
    if args.adapter is not None:
        load = load_peft_adapter if holds_lora(args.adapter) else load_hybrid_adapter
        load(model, args.adapter)
    model.to(default_device()).eval()
    set_seed(args.seed)
    started = time.perf_counter()
    streamer = None if args.json else TextStreamer(tokenizer, skip_special_tokens=True)
    text, count = continue_text(
        model, tokenizer, args.prompt, args.max_new_tokens, args.temperature, streamer
    )
    if args.json:
        rate = count / (time.perf_counter() - started)
        print(json.dumps({"text": text, "new_tokens": count, "tokens_per_second": rate}))


def continue_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    temperature: float = 0.0,
    streamer: TextStreamer | None = None,
) -> tuple[str, int]:
    """The prompt with its continuation, and the number of new tokens.

    Raises:
        AdapterError: the prompt holds no token, or it and what shall follow are more than the
            positions that the model has learned.
    """
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    if not inputs["input_ids"].numel():
        raise AdapterError("the prompt holds no token")
    _check_length(model, inputs["input_ids"].shape[1], max_new_tokens)
    sampling = {"temperature": temperature} if temperature else {}
    with torch.inference_mode():
        tokens = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            streamer=streamer,
            do_sample=bool(temperature),
            **sampling,
        )[0]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return text, len(tokens) - inputs["input_ids"].shape[1]


def _check_length(model: PreTrainedModel, prompt: int, new: int) -> None:
    most = learned_positions(model)
    if most is None:
        return
    if prompt > most:
        raise AdapterError(
            f"--prompt: got {prompt} tokens, allowed: up to {most}, the positions that the model"
            " has learned"
        )
    left = most + 1 - prompt  # the last token is not read again
    if new > left:
        raise AdapterError(
            f"--max-new-tokens: got {new} after a prompt of {prompt}, allowed: up to {left}, since"
            f" the model has learned {most} positions"
        )
