"""Layers in memory, on disk, or visiting: the same model to the last bit, and never more weights in memory than allowed."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from parallel.state import model_tensors
from pretrain.checkpoint.storage import write
from pretrain.exit import Exit
from pretrain.generate import generate
from pretrain.loading import load
from pretrain.model.block import Block
from pretrain.model.decoder import Decoder, DecoderConfig
from pretrain.options import memory_limits
from pretrain.placement import Placement, empty_decoder, fill, fill_placed, place, readable, resident_bytes
from tests.pretrain.small import decoder, tokens
from tests.ranks import ROOT

CPU = torch.device("cpu")


def trained(seed: int, **changes: Any) -> Decoder:
    """Balancing has moved the routers' buffers."""
    model = decoder(seed=seed, **changes).eval()
    for router in model.routers().values():
        router.get_buffer("bias").normal_()
    return model


def saved(model: Decoder, folder: Path) -> Path:
    folder.mkdir()
    write(folder, model_tensors(model))
    return folder


def sizes(model: Decoder) -> tuple[int, list[int]]:
    """Bytes of what stays on the main device, and of each layer."""
    layers = [resident_bytes(block) for block in model.blocks]
    return resident_bytes(model) - sum(layers), layers


def test_an_empty_decoder_has_no_parameters_in_memory_and_all_its_buffers() -> None:
    model = empty_decoder(decoder().config)
    assert resident_bytes(model) == 0
    assert all(not buffer.is_meta for buffer in model.buffers())
    assert {n: t.shape for n, t in model_tensors(model).items()} == {
        n: t.shape for n, t in model_tensors(decoder()).items()
    }


@pytest.mark.parametrize("file", sorted((ROOT / "configs/models").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_model_file_can_be_built_without_memory(file: Path) -> None:
    described = yaml.safe_load(file.read_text())
    model = empty_decoder(DecoderConfig.model_validate(described["model"]))
    assert resident_bytes(model) == 0
    assert sum(p.numel() for p in model.parameters()) == described["parameters"]
    where = place(model, CPU, {"cpu": 4 * described["parameters"] // 2})
    assert 0 < where.blocks.count("disk") < len(model.blocks)


def test_fill_gives_the_weights_of_the_checkpoint(tmp_path: Path) -> None:
    model = trained(1, tie_embeddings=False)
    loaded = fill(empty_decoder(model.config), saved(model, tmp_path / "c"), CPU)
    for name, tensor in model_tensors(model).items():
        assert torch.equal(model_tensors(loaded)[name], tensor), name
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in loaded.parameters())


SCALED = {"tie_embeddings": False, "block": {"residual_scaling": True}, "layers": ["gdn + moe x2", "attention + moe"]}


@pytest.mark.parametrize("changes", [{}, SCALED])
def test_layers_on_disk_compute_the_same_bits(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = trained(2, **changes)
    pinned, layers = sizes(model)
    limit = pinned + layers[0] + layers[1] + max(layers[2:]) - 1  # room for one layer and a visitor, just not for two
    empty = empty_decoder(model.config)
    where = place(empty, CPU, {"cpu": limit})
    assert where.blocks[0] == "cpu" and where.blocks[1:] == ["disk"] * (len(layers) - 1)
    placed = fill_placed(empty, saved(model, tmp_path / "c"), where, tmp_path / "offload").eval()
    assert resident_bytes(placed) == pinned + layers[0]

    peak = 0

    def watch(module: nn.Module, *_: Any) -> None:
        nonlocal peak
        peak = max(peak, resident_bytes(placed))

    for block in placed.blocks:
        assert isinstance(block, Block)
        block.ffn.register_forward_pre_hook(watch)
    row = tokens(2, 30)
    with torch.no_grad():
        assert torch.equal(placed(row), model(row))
    assert resident_bytes(placed) == pinned + layers[0]
    assert max(layers[1:]) + pinned + layers[0] == peak <= limit < pinned + sum(layers)
    assert generate(placed, [1, 2, 3], tokens=6, temperature=0.0) == generate(
        model, [1, 2, 3], tokens=6, temperature=0.0
    )
    targets = tokens(1, 30, seed=1)
    borders = torch.tensor([0, 7, 30], dtype=torch.int32)
    with torch.no_grad():
        assert torch.equal(placed(row[:1], targets, borders), model(row[:1], targets, borders))


def test_layers_waiting_in_cpu_memory_compute_the_same_bits(tmp_path: Path) -> None:
    """As on a machine with a GPU, whose part the CPU plays: waiting layers are not on the main device."""

    class Elsewhere(Placement):
        def home(self, index: int) -> torch.device | None:
            return None

    model = trained(3)
    placed = fill_placed(empty_decoder(model.config), saved(model, tmp_path / "c"), Elsewhere(CPU, ["cpu"] * 4), None)
    assert resident_bytes(placed) == sizes(model)[0]
    with torch.no_grad():
        assert torch.equal(placed.eval()(tokens(1, 9)), model(tokens(1, 9)))


def test_the_multi_token_layer_stays_without_memory(tmp_path: Path) -> None:
    model = trained(4, multi_token={"layer": "gdn + moe"})
    empty = empty_decoder(model.config)
    placed = fill_placed(empty, saved(model, tmp_path / "c"), place(empty, CPU, None), None).eval()
    assert placed.multi_token is not None and resident_bytes(placed.multi_token) == 0
    with torch.no_grad():
        assert torch.equal(placed(tokens(1, 9)), model(tokens(1, 9)))


def test_the_offload_folder_is_emptied_when_the_model_goes(tmp_path: Path) -> None:
    model = decoder()
    pinned, layers = sizes(model)
    empty = empty_decoder(model.config)
    where = place(empty, CPU, {"each": pinned + max(layers) + 100})
    assert where.blocks == ["disk"] * 4 and str(where) == "4 on disk"
    fill_placed(empty, saved(model, tmp_path / "c"), where, tmp_path / "offload")
    (inner,) = (tmp_path / "offload").iterdir()
    assert sum(file.stat().st_size for file in inner.glob("blocks.*.dat")) == sum(layers)
    del empty
    gc.collect()
    assert list((tmp_path / "offload").iterdir()) == []


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    model = decoder()
    pinned, layers = sizes(model)
    with pytest.raises(Exit, match=r"too small for this model: .* allow at least") as error:
        place(empty_decoder(model.config), CPU, {"cpu": pinned + max(layers) - 1})
    assert error.value.exit_code == 2
    advised = str(error.value).rsplit("at least ", 1)[1].replace(" ", "")
    place(empty_decoder(model.config), CPU, {"cpu": memory_limits(advised)["each"]})
    checkpoint = saved(model, tmp_path / "c")
    with pytest.raises(Exit, match=r"4 of 4 layers .* give --offload FOLDER"):
        fill_placed(empty_decoder(model.config), checkpoint, Placement(CPU, ["disk"] * 4), None)
    with pytest.raises(Exit, match="names a GPU"):
        place(empty_decoder(model.config), CPU, {0: 10**9})
    with pytest.raises(Exit, match="the same memory"):
        place(empty_decoder(model.config), CPU, {"each": 10**9, "cpu": 10**9})
    fewer = empty_decoder(decoder(layers=["gdn + moe"]).config)
    with pytest.raises(ValueError, match=r"also holds model/blocks.1"):
        fill_placed(fewer, checkpoint, Placement(CPU, ["cpu"]), None)


def test_load_takes_limits_and_an_offload_folder(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plain, tokenizer = load(run)
    pinned, layers = sizes(plain)
    placed, again = load(run, max_memory={"each": pinned + 2 * max(layers) + 100}, offload_folder=tmp_path)
    assert "layers of step_00000004: 1 on cpu, 5 on disk" in capfd.readouterr().err
    assert again.path == tokenizer.path
    row = torch.tensor([[tokenizer.bos, *tokenizer.encode("import torch\n")]])
    with torch.inference_mode():
        assert torch.equal(placed(row), plain(row))


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("2GiB,cpu=8GiB", {"each": 2**31, "cpu": 2**33}),
        ("0=1.5kb, cuda:1=7", {0: 1500, 1: 7}),
        ("cpu=1 MiB", {"cpu": 2**20}),
    ],
)
def test_memory_limits_are_read(text: str, limits: dict[int | str, int]) -> None:
    assert memory_limits(text) == limits


@pytest.mark.parametrize("text", ["2GiX", "tpu=3GiB", "1GiB,2GiB", "", "cpu="])
def test_bad_memory_limits_are_refused(text: str) -> None:
    with pytest.raises(Exception, match=r"is no size|is no device|twice"):
        memory_limits(text)


def test_readable() -> None:
    assert readable(1536) == "1.50 KiB" and readable(7) == "7 B"
    assert all(memory_limits(readable(n, up=True).replace(" ", ""))["each"] >= n for n in (1023, 1025, 5_000_001))
