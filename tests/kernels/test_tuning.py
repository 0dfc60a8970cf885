"""Architecture facts, and the lookup of launch parameters."""

import json

import pytest
import torch

from kernels import architecture as arch_module
from kernels import tuning
from kernels.architecture import ARCHITECTURES, architecture, assume, dot_precision, facts, vendor
from kernels.tuning import override, parameters

DEFAULTS = {
    "scan": {
        "generic": {"BLOCK_V": 32, "num_warps": 4, "waves_per_eu": 2, "maxnreg": 128, "kpack": 2},
        "gfx942": {"BLOCK_V": 64},
    }
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder of tuning files: write(arch, content)."""
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning.forget()

    def write(arch, content):
        (tmp_path / f"{arch}.json").write_text(content if isinstance(content, str) else json.dumps(content))
        tuning.forget()

    yield write
    tuning.forget()


def test_a_cpu_is_generic_and_assume_overrides_it():
    cpu = torch.device("cpu")
    assert architecture(cpu) == "generic"
    with assume("gfx942") as facts_942:
        assert architecture(cpu) == "gfx942"
        assert (facts_942.warp_size, facts_942.shared_memory_block, facts_942.dies) == (64, 65536, 8)
    assert architecture(cpu) == "generic"
    with pytest.raises(ValueError, match="'sm70' is not a known architecture; choose one of sm80"):
        facts("sm70")


@pytest.mark.parametrize(
    ("name", "properties", "hip"),
    [
        ("sm80", {"major": 8, "minor": 0}, None),
        ("sm90", {"major": 9, "minor": 0}, None),
        ("sm100", {"major": 10, "minor": 3}, None),
        ("generic", {"major": 8, "minor": 9}, None),
        ("gfx942", {"gcnArchName": "gfx942:sramecc+:xnack-"}, "7.0"),
        ("generic", {"gcnArchName": "gfx1100"}, "7.0"),
    ],
)
def test_devices_are_named_by_what_torch_says_of_them(monkeypatch, name, properties, hip):
    from types import SimpleNamespace

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(**properties))
    monkeypatch.setattr(torch.version, "hip", hip)
    arch_module._of_device.cache_clear()
    assert architecture(torch.device("cuda:0")) == name
    arch_module._of_device.cache_clear()


def test_amd_occupancy_follows_llvms_steps_and_counts_shared_memory():
    mi300 = facts("gfx942")
    steps = {64: 8, 72: 7, 80: 6, 96: 5, 128: 4, 168: 3, 256: 2, 512: 1}
    assert {registers: mi300.warps_per_simd(registers, 0, 4) for registers in steps} == steps
    assert mi300.warps_per_simd(64, 36864, 2) == 0.5  # one block of two waves fills the CU
    assert mi300.warps_per_simd(64, 32768, 4) == 2.0
    assert mi300.blocks_resident(64, 65537, 4) == 0
    assert mi300.blocks_resident(513, 0, 4) == 0


def test_nvidia_occupancy_counts_registers_slots_and_the_reserved_shared_memory():
    h100 = facts("sm90")
    assert h100.blocks_resident(128, 0, 4) == 4  # 65536 registers / (128 registers x 128 threads)
    assert h100.blocks_resident(168, 0, 4) == 3
    assert h100.blocks_resident(32, 0, 4) == 16  # 64 warps
    assert h100.blocks_resident(32, 0, 1) == 32  # 32 blocks
    assert h100.blocks_resident(32, 116224, 4) == 1  # 2 x (113.5 + 1) KiB > 228 KiB
    assert h100.blocks_resident(32, 113 * 1024, 4) == 2
    assert h100.blocks_resident(32, 232449, 4) == 0


def test_fp32_dots_use_what_each_vendor_can_do():
    assert {name: dot_precision(name, "state") for name in ARCHITECTURES if name != "generic"} == {
        "sm80": "tf32x3",
        "sm90": "tf32x3",
        "sm100": "tf32x3",
        "gfx942": "ieee",
        "gfx950": "ieee",
    }
    assert dot_precision("sm90", "fast") == "tf32"
    assert dot_precision("generic", "inverse") == "ieee" or torch.cuda.is_available()
    with pytest.raises(ValueError, match="'speed' is not a purpose"):
        dot_precision("sm90", "speed")


def test_an_unknown_gpu_has_its_vendors_precision(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    assert (vendor("generic"), dot_precision("generic", "fast")) == ("nvidia", "tf32")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert (vendor("generic"), dot_precision("generic", "fast")) == ("amd", "ieee")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert vendor("generic") == "none"


def test_defaults_are_layered_and_options_filtered_by_vendor(files):
    assert parameters("scan", "sm90", defaults=DEFAULTS, K=64) == {"BLOCK_V": 32, "num_warps": 4, "maxnreg": 128}
    assert parameters("scan", "gfx942", defaults=DEFAULTS, K=64) == {
        "BLOCK_V": 64,
        "num_warps": 4,
        "waves_per_eu": 2,
        "kpack": 2,
    }
    assert "kpack" not in parameters("scan", "gfx950", defaults=DEFAULTS)
    with assume("generic"):
        assert parameters("scan", "generic", defaults=DEFAULTS) == {"BLOCK_V": 32, "num_warps": 4}


def test_a_file_wins_over_defaults_and_the_most_particular_row_wins(files):
    rows = [
        {"when": {"T_min": 1024}, "use": {"BLOCK_V": 1}},
        {"when": {"K": 128}, "use": {"BLOCK_V": 2}},
        {"when": {"K": 128, "T_min": 4096, "T_max": 8192}, "use": {"BLOCK_V": 3}},
        {"when": {"K": 128, "dtype": "bf16"}, "use": {"BLOCK_V": 4}},
        {"when": {"K": 128}, "use": {"BLOCK_V": 5}},
    ]
    files("sm90", {"scan": {"default": {"num_warps": 8}, "rows": rows}})

    def block(**keys):
        return parameters("scan", "sm90", defaults=DEFAULTS, **keys)["BLOCK_V"]

    assert block(K=64, T=512) == 32  # no row applies
    assert block(K=64, T=1024) == 1
    assert block(K=64) == 32  # a bound on a key that the call does not give does not hold
    assert block(K=128, T=512) == 2  # of equals, the earlier
    assert (block(K=128, T=4096), block(K=128, T=8192), block(K=128, T=8193)) == (3, 3, 2)
    assert block(K=128, T=4096, dtype="bf16") == 4  # equalities count before bounds
    assert parameters("scan", "sm90", defaults=DEFAULTS, K=64)["num_warps"] == 8
    assert (
        parameters("scan", "sm80", defaults=DEFAULTS, K=64)["num_warps"] == 4
    )  # another architecture's file is not read


def test_generic_json_lies_under_the_architectures_own_defaults(files):
    files("generic", {"scan": {"default": {"BLOCK_V": 16, "num_warps": 2}}})
    assert parameters("scan", "sm90", defaults=DEFAULTS)["BLOCK_V"] == 16
    use = parameters("scan", "gfx942", defaults=DEFAULTS)
    assert (use["BLOCK_V"], use["num_warps"]) == (64, 2)


def test_an_unknown_kernel_names_the_file(files):
    with pytest.raises(KeyError, match=r"no launch parameters for kernel 'scam' on sm90.*sm90\.json"):
        parameters("scam", "sm90", defaults=DEFAULTS)


def test_the_caller_cannot_change_the_table(files):
    parameters("scan", "sm90", defaults=DEFAULTS)["BLOCK_V"] = 7
    assert parameters("scan", "sm90", defaults=DEFAULTS)["BLOCK_V"] == 32


def test_overrides_and_observation(files):
    with override({"scan": {"BLOCK_V": 8, "kpack": 2}}), tuning.observe() as seen:
        assert parameters("scan", "sm90", defaults=DEFAULTS, K=64)["BLOCK_V"] == 8
    assert seen == [("scan", {"K": 64}, {"BLOCK_V": 8, "num_warps": 4, "maxnreg": 128})]
    assert parameters("scan", "sm90", defaults=DEFAULTS, K=64)["BLOCK_V"] == 32


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ({"scan": {"row": []}}, "must have the keys 'default' and 'rows' only"),
        ({"scan": {"default": {"BLOCK_V": "64"}}}, "must be an object of integers"),
        ({"scan": {"rows": [{"use": {}}]}}, "row 0: needs 'when' and 'use'"),
        (
            {"scan": {"rows": [{"when": {"K": [1]}, "use": {}}]}},
            "row 0: 'when' must be an object of numbers and strings",
        ),
        ({"scan": {"rows": [{"when": {}, "use": {}, "source": 3}]}}, "row 0: 'measured' and 'source' must be text"),
    ],
)
def test_a_malformed_file_is_named(files, content, message):
    files("sm90", content)
    with pytest.raises(ValueError, match=message):
        parameters("scan", "sm90", defaults=DEFAULTS)


def test_the_shipped_tables_hold_every_kernel_of_every_architecture():
    tuning.forget()
    tables = {name: tuning.read(name) for name in ARCHITECTURES}
    kernels = set(tables["gfx942"])
    assert len(kernels) >= 25
    for name, table in tables.items():
        assert (tuning.FOLDER / f"{name}.json").exists()
        if name == "generic":
            continue
        assert set(table) == kernels, name
        for kernel, entry in table.items():
            if kernel not in ("delta_rule_segments", "experts_tile"):  # sizes that several kernels share; no launches
                assert {"num_warps", "num_stages"} <= set(entry.default), (name, kernel)
            foreign = tuning.NVIDIA_ONLY if name.startswith("gfx") else tuning.AMD_ONLY
            assert not foreign & {option for use in (entry.default, *(r.use for r in entry.rows)) for option in use}
            # Nothing is claimed without saying by what: a measurement or the compilers' figures.
            assert all(row.measured or row.source.startswith("offline: ") for row in entry.rows), (name, kernel)


def test_a_row_may_say_where_it_comes_from(files):
    rows = [{"when": {}, "use": {"BLOCK_V": 16}, "source": "offline: why", "measured": "row 40"}]
    files("sm90", {"scan": {"rows": rows}})
    (row,) = tuning.read("sm90")["scan"].rows
    assert (row.source, row.measured) == ("offline: why", "row 40")
    assert parameters("scan", "sm90", defaults=DEFAULTS)["BLOCK_V"] == 16
