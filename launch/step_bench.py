"""A whole training step beside that of transformers: the same model with the same weights, the same optimizer and tokens.

Forward, loss, backward, clipping to norm 1, AdamW; in turn, in one process, so that whatever else the machine does meets both.
Both models are made from one config.json; that they are the same is checked first, by their losses. transformers computes as it
does by default on the device at hand, its attention by torch's scaled_dot_product_attention; models of theirs whose fast path
is a package of GPU kernels run their own torch code on a CPU.

    python -m launch.step_bench                                    # three models, fp32 and bf16
    python -m launch.step_bench --models gdn --precision bf16 --batch 4 --length 2048 --threads 1
"""

from __future__ import annotations

import argparse
import gc
import importlib
import inspect
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

ATTENTION = {"kind": "attention", "heads": 8, "kv_heads": 4, "head_dim": 64}
SWIGLU = {"kind": "swiglu", "hidden": 1408}
COMMON = {"vocabulary": 8192, "width": 512, "tie_embeddings": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "llama",
        {"mixers": {"a": {**ATTENTION, "qk_norm": False}}, "ffns": {"f": SWIGLU}, "layers": ["a + f x8"]},
    ),
    "gdn": (
        "qwen3_next",
        {
            "mixers": {
                "a": {**ATTENTION, "zero_centered_norm": True, "output_gate": True, "rope_fraction": 0.25},
                "g": {"kind": "gated_delta_net", "heads": 4, "value_heads": 8, "head_dim": 64, "value_dim": 64},
            },
            "ffns": {"f": SWIGLU},
            "layers": ["g + f x3", "a + f"],
            "repeat": 2,
            "block": {"zero_centered_norms": True},
        },
    ),
    "moe": (
        "qwen3_moe",
        {
            "mixers": {"a": ATTENTION},
            "ffns": {
                "m": {
                    "kind": "moe", "experts": 16, "top_k": 4, "hidden": 352, "gate": "softmax", "bias_rate": 0.0,
                }
            },
            "layers": ["a + m x8"],
        },
    ),
}  # fmt: skip
PEERS = {"llama": "Llama", "gdn": "Qwen3-Next", "moe": "Qwen3-MoE"}
Step = Callable[[], float]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.step_bench",
        description="Time whole training steps beside transformers' (pip install transformers==5.23.0).",
        epilog="Three models of 30 million active parameters: llama, gdn (Qwen3-Next's hybrid), moe (Qwen3-MoE).",
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="NAME")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--batch", type=int, default=2, metavar="B", help="sequences (default 2)")
    parser.add_argument("--length", type=int, default=1024, metavar="T", help="tokens each (default 1024)")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each, in turn; medians count (default 7)")
    parser.add_argument("--threads", type=int, default=None, help="of torch (default: as many as torch takes)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, help="also write all numbers there")
    return parser.parse_args(argv)


def torch_forms(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """A modeling module's functions in whose place transformers calls GPU kernels of packages that happen to be installed, in
    their own torch code: by name, to be set instead on a CPU."""
    return {
        name: inspect.unwrap(value)
        for name, value in vars(module).items()
        if inspect.isfunction(value) and hasattr(value, "__wrapped__") and value.__module__ == module.__name__
    }


def pair(name: str, device: str, length: int) -> tuple[nn.Module, nn.Module]:
    """(ours, theirs): one model twice, fp32."""
    import transformers

    from pretrain import placement
    from pretrain.checkpoint.interop.form import find
    from pretrain.checkpoint.interop.intake import intake
    from pretrain.model.decoder import DecoderConfig

    kind, layers = MODELS[name]
    section = DecoderConfig.model_validate({**COMMON, **layers})
    if device == "cpu":
        modeling = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
        for function, plain in torch_forms(modeling).items():
            setattr(modeling, function, plain)
    content = find(kind).write(section)
    content |= {"max_position_embeddings": length, "use_cache": False}
    config = transformers.AutoConfig.for_model(kind, **content)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(Path(folder, "theirs"))
        imported = intake(Path(folder, "theirs"), Path(folder, "ours"))
        ours = placement.empty_decoder(section)
        placement.fill(ours, imported.checkpoint, torch.device("cpu"))
    return ours.to(device).train(), theirs.to(device).train()


def steps(
    ours: nn.Module, theirs: nn.Module, ids: Tensor, precision: str
) -> tuple[dict[str, Step], dict[str, Callable[[], Tensor]]]:
    """Whole steps of both, and their losses alone."""
    from pretrain.optim.adamw import AdamWConfig
    from pretrain.train.step import autocast

    batch, length = ids.shape
    inputs, labels = ids[:, :-1].reshape(1, -1), ids[:, 1:].reshape(1, -1)
    borders = torch.arange(0, batch * (length - 1) + 1, length - 1, dtype=torch.int32, device=ids.device)

    shifted = ids[:, 1:].contiguous()

    def our_loss() -> Tensor:
        return ours(inputs, targets=labels, cu_seqlens=borders) / labels.numel()

    def their_loss() -> Tensor:
        # The next token is the label: what their model shifts by itself is shifted here already.
        return theirs(input_ids=ids[:, :-1], shift_labels=shifted, labels=shifted).loss

    optimizers = {
        "ours": AdamWConfig().build(ours),
        "theirs": torch.optim.AdamW(theirs.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1),
    }
    models, losses = {"ours": ours, "theirs": theirs}, {"ours": our_loss, "theirs": their_loss}

    def step(who: str) -> float:
        with autocast(ids.device, precision):
            loss = losses[who]()
        loss.backward()
        nn.utils.clip_grad_norm_(models[who].parameters(), 1.0)
        optimizers[who].step()
        optimizers[who].zero_grad(set_to_none=True)
        return loss.item()  # waits for a GPU

    return {who: lambda who=who: step(who) for who in models}, losses  # type: ignore[misc]


def compare(name: str, precision: str, arguments: argparse.Namespace) -> dict[str, Any]:
    from kernels.benching.memory import peak_bytes

    device = torch.device(arguments.device)
    ours, theirs = pair(name, arguments.device, arguments.length)
    chance = torch.Generator().manual_seed(1)
    ids = torch.randint(0, int(COMMON["vocabulary"]), (arguments.batch, arguments.length + 1), generator=chance).to(
        device
    )
    step, losses = steps(ours, theirs, ids, precision)
    with torch.no_grad():
        apart = abs(losses["ours"]().item() / losses["theirs"]().item() - 1)
    if apart > 1e-4:
        raise SystemExit(f"error: {name}: the two models differ by {apart:.1e} in their loss: nothing to compare")
    for who in step:
        step[who]()  # optimizer state, compiled code
    memory = {who: peak_bytes(step[who], device) for who in step}
    seconds: dict[str, list[float]] = {who: [] for who in step}
    for turn in range(arguments.rounds + 1):
        for who in ("ours", "theirs") if turn % 2 else ("theirs", "ours"):
            gc.collect()
            start = time.perf_counter()
            step[who]()
            if turn:
                seconds[who].append(time.perf_counter() - start)
    ratio = statistics.median(a / b for a, b in zip(seconds["theirs"], seconds["ours"]))
    return {
        "model": name, "peer": PEERS[name], "precision": precision, "ratio": ratio, "seconds": seconds, "memory": memory,
        "loss_difference": apart, "parameters": sum(p.numel() for p in ours.parameters()),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        import transformers
    except ImportError:
        print("error: transformers is not installed: pip install transformers==5.23.0", file=sys.stderr)
        return 2
    transformers.logging.set_verbosity_error()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(
        f"{arguments.batch} x {arguments.length} tokens on {arguments.device}, {torch.get_num_threads()} thread(s), torch "
        f"{torch.__version__}, transformers {transformers.__version__}, load {os.getloadavg()[0]:.1f}; medians of "
        f"{arguments.rounds} steps each; memory above weights and optimizer state"
    )
    print(f"{'model':7}{'precision':11}{'ours ms':>10}{'peer ms':>10}{'times':>8}{'ours MB':>10}{'peer MB':>10}  peer")
    rows = []
    for name in arguments.models:
        for precision in arguments.precision:
            row = compare(name, precision, arguments)
            rows.append(row)
            times = {who: 1e3 * statistics.median(taken) for who, taken in row["seconds"].items()}
            megabytes = {who: float("nan") if size is None else size / 1e6 for who, size in row["memory"].items()}
            print(
                f"{name:7}{precision:11}{times['ours']:10.1f}{times['theirs']:10.1f}{row['ratio']:8.2f}"
                f"{megabytes['ours']:10.0f}{megabytes['theirs']:10.0f}  {row['peer']}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
