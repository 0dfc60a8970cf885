"""Writes text with a trained model: `python -m pretrain.generate --checkpoint runs/quickstart --prompt "def "`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from pretrain.options import add_model_options, at_least, exit_code, share

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pretrain.model.decoder import Decoder

EXAMPLES = """examples:
  python -m pretrain.generate --checkpoint runs/quickstart --prompt 'def read_file(path):' --tokens 200
  python -m pretrain.generate --checkpoint runs/quickstart --temperature 0
  python -m pretrain.generate --checkpoint runs/quickstart/checkpoints/step_00000100 --top-p 0.9 --seed 7 --samples 3
  python -m pretrain.generate --checkpoint runs/big --memory-limit 16GiB,cpu=32GiB --offload /scratch/layers"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.generate", description="Write text with a trained model.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_model_options(parser)
    parser.add_argument("--prompt", default="", help="text to go on from; the beginning of a document when left out")
    parser.add_argument("--tokens", type=at_least(1), default=200, help="tokens to write at most (default 200)")
    parser.add_argument(
        "--temperature", type=at_least(0.0), default=0.8, help="0 always takes the likeliest token (default 0.8)"
    )
    parser.add_argument("--top-k", type=at_least(1), help="choose among the k likeliest tokens only")
    parser.add_argument(
        "--top-p", type=share, help="choose among the likeliest tokens that reach this probability together"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=at_least(1), default=1, help="texts to write (default 1)")
    parser.add_argument(
        "--fixed", action=argparse.BooleanOptionalAction, default=None,
        help="caches of fixed size, on a GPU replayed as a CUDA graph (default: on a GPU, if the model can)",
    )  # fmt: skip
    return parser.parse_args(argv)


def restrict(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """logits [B, V] with all but the allowed tokens at -inf. The likeliest token is always allowed."""
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if top_p is not None and top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        beyond = probabilities.cumsum(dim=-1) - probabilities >= top_p  # what came before already reached top_p
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), float("-inf"))
    return logits


def choose(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> Tensor:
    """One token for each row of logits [B, V] -> [B, 1]. Temperature is applied before top-k and top-p."""
    if temperature == 0.0:
        return logits.argmax(dim=-1, keepdim=True)
    probabilities = restrict(logits / temperature, top_k, top_p).softmax(dim=-1)
    return probabilities.cpu().multinomial(1, generator=generator).to(logits.device)


def generate(
    model: Decoder,
    prompt: list[int],
    *,
    tokens: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    samples: int = 1,
    end: int | None = None,
    vocabulary: int | None = None,
    stop: Callable[[list[int]], bool] | None = None,
    fixed: bool | None = None,
) -> list[list[int]]:
    """Token ids written after `prompt` (at least one id), one list a sample, each ending before the `end` token.

    vocabulary: how many ids the tokenizer knows; the model may have more, as padding. stop: asked after every token with what a
    sample has so far; True ends the sample, that token included. The prompt is read once in parallel; then
    every token costs one step: attention reads its key/value cache, linear mixers their state.
    fixed: in buffers of fixed size, on a GPU as one CUDA graph a token (see pretrain/model/fixed.py); None: on a GPU, if the
    model can. Raises ValueError for fixed=True and a model that cannot.
    """
    import torch

    from pretrain.model.fixed import FixedDecoding, objection

    if not prompt:
        raise ValueError("prompt is empty; give at least one token, such as the tokenizer's bos")
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    written: list[list[int]] = [[] for _ in range(samples)]
    training = model.training
    model.eval()
    cache = model.new_cache()
    step = torch.tensor([prompt] * samples, dtype=torch.int64, device=device)
    open_samples = set(range(samples))
    gpu = device.type == "cuda"
    if fixed is None:
        fixed = gpu and objection(model) is None
    decoding: FixedDecoding | None = None
    with torch.inference_mode():
        for number in range(tokens):
            if number == 0 or not fixed:
                logits = model(step, cache=cache, last_only=True)[:, -1]
            else:
                if decoding is None:
                    decoding = FixedDecoding(model, cache, samples, tokens, capture=gpu)
                logits = decoding(step)
            logits = logits[:, :vocabulary]
            step = choose(logits, temperature, top_k, top_p, generator)
            for sample, token in enumerate(step[:, 0].tolist()):
                if token == end:
                    open_samples.discard(sample)
                elif sample in open_samples:
                    written[sample].append(token)
                    if stop is not None and stop(written[sample]):
                        open_samples.discard(sample)
            if not open_samples:
                break
    model.train(training)
    return written


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    from pretrain.loading import load

    try:
        model, tokenizer = load(arguments.checkpoint, arguments.device, arguments.memory_limit, arguments.offload)
    except Exception as error:
        return exit_code(error)
    prompt = ([tokenizer.bos] if tokenizer.bos is not None else []) + tokenizer.encode(arguments.prompt)
    texts = generate(
        model, prompt, tokens=arguments.tokens, temperature=arguments.temperature, top_k=arguments.top_k,
        top_p=arguments.top_p, seed=arguments.seed, samples=arguments.samples, end=tokenizer.eos,
        vocabulary=tokenizer.vocabulary_size, fixed=arguments.fixed,
    )  # fmt: skip
    for number, ids in enumerate(texts, start=1):
        if arguments.samples > 1:
            print(f"--- sample {number}")
        print(arguments.prompt + tokenizer.decode(ids))
    return 0


if __name__ == "__main__":
    sys.exit(main())
