"""The table of graphics cards: its rows against figures typed in anew, the spellings it forgives, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eightgig.core.errors import ConfigError
from eightgig.registry.gpus import GpuFacts, all_gpus, get_gpu, gpu_of_vram

ROOT = Path(__file__).parents[2]
MIB = 2**20
ROWS: dict[str, dict[str, Any]] = {
    row["name"]: row for row in json.loads((files("eightgig.registry") / "gpus.json").read_text("utf-8"))["cards"]
}

# From the survey's table: GB, GB/s, TFLOP/s (fp16 with fp32 sums), bf16, compute capability, PCIe generation and lanes.
SURVEY = {
    "GTX 1660": (6, 192, 5, False, (7, 5), 3, 16),
    "RTX 2060 SUPER": (8, 448, 28.7, False, (7, 5), 3, 16),
    "RTX 2070": (8, 448, 29.9, False, (7, 5), 3, 16),
    "RTX 2080 Ti": (11, 616, 53.8, False, (7, 5), 3, 16),
    "RTX 3050": (8, 224, 18.2, True, (8, 6), 4, 8),
    "RTX 3060": (12, 360, 25.5, True, (8, 6), 4, 16),
    "RTX 3060 Ti": (8, 448, 32.4, True, (8, 6), 4, 16),
    "RTX 3070": (8, 448, 40.6, True, (8, 6), 4, 16),
    "RTX 3080": (10, 760, 59.5, True, (8, 6), 4, 16),
    "RTX 3090": (24, 936, 71, True, (8, 6), 4, 16),
    "RTX 4060": (8, 272, 30.2, True, (8, 9), 4, 8),
    "RTX 4060 Ti 8GB": (8, 288, 44.1, True, (8, 9), 4, 8),
    "RTX 4060 Ti 16GB": (16, 288, 44.1, True, (8, 9), 4, 8),
    "RTX 4070": (12, 504, 58.3, True, (8, 9), 4, 16),
    "RTX 4080": (16, 717, 97.5, True, (8, 9), 4, 16),
    "RTX 4090": (24, 1008, 165.2, True, (8, 9), 4, 16),
    "RTX 5060": (8, 448, 38.4, True, (12, 0), 5, 8),
    "RTX 5060 Ti 8GB": (8, 448, 47.4, True, (12, 0), 5, 8),
    "RTX 5060 Ti 16GB": (16, 448, 47.4, True, (12, 0), 5, 8),
    "RTX 5070": (12, 672, 61.7, True, (12, 0), 5, 16),
    "RTX 5080": (16, 960, 112.6, True, (12, 0), 5, 16),
    "RTX 5090": (32, 1792, 209.5, True, (12, 0), 5, 16),
    "RTX 3070 Laptop": (8, 448, 26, True, (8, 6), 4, 16),
    "RTX 3070 Laptop hi": (8, 448, 33, True, (8, 6), 4, 16),
    "RTX 4060 Laptop": (8, 256, 18, True, (8, 9), 4, 8),
    "RTX 4060 Laptop hi": (8, 256, 29, True, (8, 9), 4, 8),
    "RTX 4070 Laptop": (8, 256, 23, True, (8, 9), 4, 8),
    "RTX 4070 Laptop hi": (8, 256, 40, True, (8, 9), 4, 8),
    "T4": (16, 320, 65, False, (7, 5), 3, 16),
    "L4": (24, 300, 121, True, (8, 9), 4, 16),
    "A10": (24, 600, 125, True, (8, 6), 4, 16),
    "A100 40GB": (40, 1555, 312, True, (8, 0), 4, 16),
    "A100 80GB SXM": (80, 2039, 312, True, (8, 0), 4, 16),
    "A100 80GB PCIe": (80, 1935, 312, True, (8, 0), 4, 16),
    "H100 SXM": (80, 3350, 989.5, True, (9, 0), 5, 16),
    "H100 PCIe": (80, 2000, 756.5, True, (9, 0), 5, 16),
    "H200": (141, 4800, 989, True, (9, 0), 5, 16),
}
GB_PER_S_A_LANE = {3: 0.985, 4: 1.969, 5: 3.938}  # PCI-SIG's figures, per direction

# What CUDA (torch.cuda.mem_get_info) showed, in MiB, as read in public logs.
READ_MIB = {
    "RTX 3060": 11906,
    "RTX 3070": 7819,
    "RTX 3090": 24123,
    "RTX 4060 Laptop": 7815,
    "RTX 4070": 11866,
    "RTX 5060": 7708,
    "RTX 5090": 32109,
    "T4": 14912,
}

# Name as the driver gives it (nvidia-smi, torch.cuda.get_device_name) or as people type it -> the table's.
SPELLINGS = {
    "rtx4060": "RTX 4060",
    "RTX 4060": "RTX 4060",
    "4060": "RTX 4060",
    "  GeForce RTX-4060  ": "RTX 4060",
    "4060 8GiB": "RTX 4060",
    "NVIDIA GeForce RTX 4060 Laptop GPU": "RTX 4060 Laptop low power",
    "4060 mobile": "RTX 4060 Laptop low power",
    "RTX 4060 8GB Laptop GPU": "RTX 4060 Laptop low power",
    "rtx 4060 laptop hi": "RTX 4060 Laptop high power",
    "3060 12gb": "RTX 3060 12GB",
    "NVIDIA GeForce RTX 3060": "RTX 3060 12GB",
    "3060ti": "RTX 3060 Ti",
    "4060ti16gb": "RTX 4060 Ti 16GB",
    "RTX 4060 Ti (8 GB)": "RTX 4060 Ti 8GB",
    "2060s": "RTX 2060 SUPER",
    "NVIDIA GeForce RTX 2060 SUPER": "RTX 2060 SUPER",
    "NVIDIA GeForce GTX 1660": "GTX 1660",
    "RTX 3050": "RTX 3050 8GB",
    "NVIDIA GeForce RTX 3050 Laptop GPU": "RTX 3050 Laptop 4GB",
    "Tesla T4": "T4",
    "NVIDIA L4": "L4",
    "NVIDIA A10": "A10",
    "NVIDIA A100-SXM4-40GB": "A100 40GB",
    "NVIDIA A100-PCIE-40GB": "A100 40GB",
    "NVIDIA A100-SXM4-80GB": "A100 80GB SXM",
    "NVIDIA A100 80GB PCIe": "A100 80GB PCIe",
    "NVIDIA H100 80GB HBM3": "H100 SXM",
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA H200": "H200",
}


@pytest.mark.parametrize("name", SURVEY)
def test_a_row_says_what_the_survey_says(name: str) -> None:
    gpu = get_gpu(name)
    vram_gb, gb_per_s, tflop_per_s, has_bf16, capability, generation, lanes = SURVEY[name]
    assert (gpu.vram_gb, gpu.has_bf16, gpu.compute_capability) == (vram_gb, has_bf16, capability)
    assert gpu.bandwidth_bytes_per_s == pytest.approx(gb_per_s * 1e9, rel=1e-3)
    # The survey rounds some to whole TFLOP/s.
    assert gpu.matrix_flop_per_s == pytest.approx(tflop_per_s * 1e12, abs=0.51e12 if tflop_per_s % 1 == 0 else 1e9)
    attained_bytes_per_s = 0.8 * GB_PER_S_A_LANE[generation] * 1e9 * lanes
    assert gpu.pcie_bytes_per_s == pytest.approx(attained_bytes_per_s, rel=1e-3)


# CUDA cores and boost clock in GHz, from NVIDIA's pages and whitepapers; a core does one fp32 FMA a clock.
CORES = {
    "GTX 1660": (1408, 1.785),
    "RTX 2060 SUPER": (2176, 1.65),
    "RTX 2080 Ti": (4352, 1.545),
    "RTX 3060": (3584, 1.777),
    "RTX 3090": (10496, 1.695),
    "RTX 4060": (3072, 2.46),
    "RTX 4090": (16384, 2.52),
    "RTX 5090": (21760, 2.407),
    "T4": (2560, 1.59),
    "L4": (7424, 2.04),
    "A10": (9216, 1.695),
    "A100 40GB": (6912, 1.41),
    "A100 80GB SXM": (6912, 1.41),
    "A100 80GB PCIe": (6912, 1.41),
    "H100 SXM": (16896, 1.98),
    "H100 PCIe": (14592, 1.755),
    "H200": (16896, 1.98),
}


@pytest.mark.parametrize("name", CORES)
def test_the_fp32_rate_is_two_flop_a_core_and_clock(name: str) -> None:
    cores, boost_ghz = CORES[name]
    assert get_gpu(name).fp32_flop_per_s == pytest.approx(2 * cores * boost_ghz * 1e9, rel=0.01)


def test_a_geforce_cards_fp32_rate_follows_from_its_matrix_rate() -> None:
    for gpu in all_gpus():
        if gpu.name.startswith("RTX") and gpu.matrix_flop_per_s is not None:
            share = 4 if gpu.compute_capability == (7, 5) else 2
            assert gpu.fp32_flop_per_s == pytest.approx(gpu.matrix_flop_per_s / share, rel=1e-3)


def test_every_row_is_checked_but_the_one_without_a_rate() -> None:
    checked = {get_gpu(name).name for name in SURVEY}
    assert {gpu.name for gpu in all_gpus()} - checked == {"RTX 3050 Laptop 4GB"}
    assert [gpu.name for gpu in all_gpus() if gpu.matrix_flop_per_s is None] == ["RTX 3050 Laptop 4GB"]


@pytest.mark.parametrize("gpu", all_gpus(), ids=lambda gpu: gpu.name)
def test_a_row_is_complete_and_plausible(gpu: GpuFacts) -> None:
    assert gpu.vram_gb is not None
    assert 0.90 < gpu.vram_bytes / (gpu.vram_gb * 2**30) < 1
    assert gpu.vram_bytes % MIB == 0
    assert gpu.vram_basis
    assert gpu.rate_basis
    assert gpu.compute_capability is not None
    assert gpu.has_bf16 == (gpu.compute_capability >= (8, 0))
    assert gpu.bandwidth_bytes_per_s is not None
    assert gpu.pcie_bytes_per_s is not None
    assert gpu.pcie_bytes_per_s < gpu.bandwidth_bytes_per_s / 5


@pytest.mark.parametrize("name", READ_MIB)
def test_memory_is_what_cuda_was_seen_to_report(name: str) -> None:
    assert get_gpu(name).vram_bytes == READ_MIB[name] * MIB


def test_the_h100_has_the_memory_that_our_own_runs_recorded() -> None:
    recorded = json.loads((ROOT / "benchmarks" / "results" / "llava_7b_8gb.json").read_text())["device"]
    assert get_gpu(recorded["name"]).vram_bytes == recorded["total_bytes"]


def test_memory_not_read_is_that_of_the_worst_card_of_its_kind() -> None:
    def missing_mib(row: dict[str, Any]) -> int:
        return int(row["vram_gb"] * 1024 - row["cuda_mib"])

    derived = [row for row in ROWS.values() if "cuda_mib" not in row]
    assert derived
    for row in derived:
        like = ROWS[row["cuda_mib_like"]]
        same_kind = [
            other
            for other in ROWS.values()
            if other["compute_capability"] == row["compute_capability"]
            and "cuda_mib" in other
            and "TX" in other["name"]
            and other["vram_gb"] <= 16
        ]
        worst_mib = max(map(missing_mib, same_kind or [like]))
        assert get_gpu(row["name"]).vram_bytes == (row["vram_gb"] * 1024 - worst_mib) * MIB
        assert like["name"] in get_gpu(row["name"]).vram_basis


@pytest.mark.parametrize("typed", SPELLINGS)
def test_a_card_is_found_as_drivers_and_people_write_it(typed: str) -> None:
    assert get_gpu(typed).name == SPELLINGS[typed]


@st.composite
def _spelling(draw: st.DrawFn) -> tuple[GpuFacts, str]:
    """A card of the table and its name with everything changed that may be."""
    gpu = draw(st.sampled_from(all_gpus()))
    words = gpu.name.split()
    if not gpu.name.endswith("GB") and "0GB" not in gpu.name and draw(st.booleans()):
        words.append(f"{gpu.vram_gb}{draw(st.sampled_from(['', ' ']))}{draw(st.sampled_from(['GB', 'GiB']))}")
    if words[0] in ("RTX", "GTX") and draw(st.booleans()):
        words.pop(0)
    elif words[0] in ("RTX", "GTX") and draw(st.booleans()):
        words[:2] = ["".join(words[:2])]
    prefix = draw(st.sampled_from(["", "NVIDIA", "GeForce", "NVIDIA GeForce"]))
    separator = draw(st.sampled_from([" ", "-", "_", "  "]))
    name = separator.join([*prefix.split(), *words, *draw(st.sampled_from([[], ["GPU"]]))])
    capitals = draw(st.lists(st.booleans(), min_size=len(name), max_size=len(name)))
    return gpu, "".join(
        letter.upper() if is_capital else letter.lower() for letter, is_capital in zip(name, capitals, strict=True)
    )


@given(_spelling())
def test_every_card_is_found_under_every_spelling_of_its_name(case: tuple[GpuFacts, str]) -> None:
    gpu, typed = case
    assert get_gpu(typed) is gpu


@given(st.text(st.characters(exclude_categories=["Nd"]), max_size=20))
def test_text_without_a_number_is_refused_with_a_next_step(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        get_gpu(text)
    assert any(gpu.name in refused.value.next_step for gpu in all_gpus())


def _meant(typed: str) -> set[str]:
    """The card that is found, or those that the refusal names."""
    try:
        return {get_gpu(typed).name}
    except ConfigError as error:
        return set(error.next_step.removeprefix("name one of: ").split(", "))


def test_every_alias_leads_to_its_card() -> None:
    pairs = [(gpu.name, alias) for gpu in all_gpus() for alias in gpu.aliases]
    assert pairs
    assert [(name, alias) for name, alias in pairs if name not in _meant(alias)] == []


@pytest.mark.parametrize(
    ("typed", "names"),
    [
        ("4060 ti", "RTX 4060 Ti 8GB, RTX 4060 Ti 16GB"),
        ("NVIDIA GeForce RTX 5060 Ti", "RTX 5060 Ti 8GB, RTX 5060 Ti 16GB"),
        ("A100", "A100 40GB, A100 80GB SXM, A100 80GB PCIe"),
        ("A100 80GB", "A100 80GB SXM, A100 80GB PCIe"),
        ("A100 PCIe", "A100 40GB, A100 80GB PCIe"),
        ("h100", "H100 SXM, H100 PCIe"),
        ("NVIDIA H100 80GB", "H100 SXM, H100 PCIe"),
    ],
)
def test_a_name_of_several_cards_is_refused_naming_them(typed: str, names: str) -> None:
    with pytest.raises(ConfigError, match="one card alone has") as refused:
        get_gpu(typed)
    assert refused.value.next_step == f"name one of: {names}"
    assert repr(typed) in str(refused.value)


@pytest.mark.parametrize(
    ("typed", "measured_mib", "name"),
    [
        ("NVIDIA GeForce RTX 4060 Ti", 8187, "RTX 4060 Ti 8GB"),  # as CUDA reports on Windows
        ("NVIDIA GeForce RTX 4060 Ti", 7800, "RTX 4060 Ti 8GB"),
        ("NVIDIA GeForce RTX 4060 Ti", 16379, "RTX 4060 Ti 16GB"),
        ("NVIDIA GeForce RTX 5060 Ti", 15888, "RTX 5060 Ti 16GB"),
        ("A100 PCIe", 81037, "A100 80GB PCIe"),
        ("RTX 4090", 24563, "RTX 4090"),
    ],
)
def test_the_measured_memory_tells_versions_apart(typed: str, measured_mib: int, name: str) -> None:
    assert get_gpu(typed, vram_bytes=measured_mib * MIB).name == name


def test_the_measured_memory_does_not_tell_plugs_apart() -> None:
    with pytest.raises(ConfigError, match="name one of: H100 SXM, H100 PCIe"):
        get_gpu("H100", vram_bytes=81079 * MIB)


@pytest.mark.parametrize(
    ("typed", "guess"),
    [
        ("RTX 4061", "RTX 4060"),
        ("rtx 4060 super", "RTX 4060"),
        ("4060 12gb", "RTX 4060"),  # there is such a card, but of another size
        ("RTX 3060 8GB", "RTX 3060 12GB"),
        ("4060 Ti 12GB", "RTX 4060 Ti 8GB or RTX 4060 Ti 16GB"),
        ("RTX 4090 Laptop GPU", "RTX 4070 Laptop low power"),
        ("H1000", "H100 SXM or H100 PCIe"),
    ],
)
def test_an_unknown_card_names_the_nearest(typed: str, guess: str) -> None:
    with pytest.raises(ConfigError, match=rf"did you mean .*{guess}") as refused:
        get_gpu(typed)
    assert repr(typed) in str(refused.value)


@pytest.mark.parametrize("typed", ["", "NVIDIA", "8GB", "Radeon"])
def test_a_name_that_resembles_nothing_lists_every_card(typed: str) -> None:
    with pytest.raises(ConfigError) as refused:
        get_gpu(typed)
    assert all(gpu.name in refused.value.next_step for gpu in all_gpus())


def test_of_a_laptops_power_limits_the_plain_name_means_the_slowest() -> None:
    for number in (3070, 4060, 4070):
        plain, fast = get_gpu(f"{number} Laptop"), get_gpu(f"{number} Laptop high power")
        assert plain.matrix_flop_per_s is not None
        assert fast.matrix_flop_per_s is not None
        assert plain.matrix_flop_per_s < fast.matrix_flop_per_s
        assert plain.vram_bytes == fast.vram_bytes


@given(st.floats(0.001, 1000))
def test_a_card_of_a_given_memory_has_that_and_no_speed(gib: float) -> None:
    gpu = gpu_of_vram(gib)
    assert gpu.vram_bytes <= gib * 1024**3 < gpu.vram_bytes + 1
    assert gpu.vram_gb is None
    assert gpu.bandwidth_bytes_per_s is gpu.matrix_flop_per_s is gpu.fp32_flop_per_s is gpu.pcie_bytes_per_s is None
    assert gpu.compute_capability is gpu.has_bf16 is None


def test_a_card_of_a_given_memory_is_named_by_it() -> None:
    assert gpu_of_vram(8).name == "8 GiB card"
    assert gpu_of_vram(7.5).name == "7.5 GiB card"


@pytest.mark.parametrize("gib", [0, -1, float("nan"), float("inf")])
def test_a_memory_that_no_card_can_have_is_refused(gib: float) -> None:
    with pytest.raises(ConfigError, match=rf"vram_gib = {gib:g}: a number above 0"):
        gpu_of_vram(gib)


def test_the_table_is_part_of_the_wheel() -> None:
    # hatchling packs all below a package that git does not ignore and that nothing excludes.
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert build == {"targets": {"wheel": {"packages": ["src/eightgig"]}}}
    path = ROOT / "src" / "eightgig" / "registry" / "gpus.json"
    assert path.is_file()
    ignored = subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT, check=False)
    assert ignored.returncode == 1


def test_looking_up_a_card_loads_neither_torch_nor_transformers() -> None:
    program = (
        "import sys; from eightgig.registry.gpus import get_gpu; get_gpu('4060'); "
        "print([name for name in ('torch', 'transformers', 'huggingface_hub') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_table_adds_no_model_family() -> None:
    from eightgig.registry.discovery import families

    names = [family.name for family in families()]
    assert "llava" in names
    assert all(type(family).__module__ != "eightgig.registry.gpus" for family in families())
