"""Cards by the names that users and drivers give them."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from autotune.config import cards
from autotune.config.cards import cards as known
from autotune.config.cards import find, nearest, of_device
from autotune.errors import ConfigError
from autotune.units import GIB


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("4090", "RTX 4090"), ("rtx-4090", "RTX 4090"), ("rtx4090", "RTX 4090"), ("GeForce RTX 4090", "RTX 4090"),
        ("3090", "RTX 3090"), ("3090ti", "RTX 3090 Ti"), ("4070tisuper", "RTX 4070 Ti Super"), ("4080", "RTX 4080"),
        ("a100 80gb", "A100 80GB SXM"), ("A100 80 GB", "A100 80GB SXM"), ("a100-pcie-80gb", "A100 80GB PCIe"),
        ("H100", "H100 SXM"), ("h100 nvl", "H100 NVL"), ("A6000", "RTX A6000"), ("6000 ada", "RTX 6000 Ada"),
        ("t4", "T4"), ("2080", "RTX 2080 Ti"),
    ],
)  # fmt: skip
def test_words_find_a_card(words: str, name: str) -> None:
    assert find(words).name == name


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100 40GB SXM"), ("NVIDIA A100-PCIE-40GB", "A100 40GB PCIe"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"), ("NVIDIA H100 80GB HBM3", "H100 SXM"), ("Tesla T4", "T4"),
        ("NVIDIA H100 PCIe", "H100 PCIe"), ("Tesla V100-SXM2-16GB", "V100 SXM 16GB"), ("NVIDIA A10G", "A10G"),
        ("NVIDIA GeForce RTX 4080 SUPER", "RTX 4080 Super"), ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None), ("Paper Card", None),
        ("", None),
    ],
)  # fmt: skip
def test_a_drivers_name_is_its_card_or_none(driver: str, name: str | None) -> None:
    card = of_device(driver)
    assert (card.name if card else None) == name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("a100", "may be A100 40GB PCIe, A100 40GB SXM, A100 80GB PCIe, A100 80GB SXM; name one of them"),
        ("RTX 4091", "is not a known card; did you mean RTX 4090"), ("h1000", "did you mean H100"),
        ("", "is not a known card"), ("Radeon RX 7900 XTX", "is not a known card"), ("gpu", "is not a known card"),
    ],
)  # fmt: skip
def test_unknown_and_ambiguous_names_get_one_line(words: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find(words)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.sampled_from(known()), st.sampled_from(["{}", "NVIDIA {}", "GeForce {} GPU", "  {}  "]), st.booleans())
def test_every_card_is_found_however_it_is_written(card: cards.Card, form: str, lower: bool) -> None:
    for name in (card.name, *card.aliases):
        words = form.format(name.lower() if lower else name.upper())
        assert find(words) == of_device(words.replace(" ", "-")) == card


@given(st.text(max_size=40))
@example("4090\n\x1b[31m")
def test_any_text_is_a_card_or_one_line(text: str) -> None:
    try:
        found = find(text)
    except ConfigError as error:
        if not str(error).isprintable():
            raise
    else:
        assert found in known()


def test_the_table_is_whole() -> None:
    names = [name for card in known() for name in (card.name, *card.aliases)]
    assert len(known()) >= 25
    assert len(set(map(cards._key, names))) == len(names)
    for card in known():
        assert card.source.startswith("https://")
        assert 5 < card.memory_gib < 300
        assert 100 < card.gb_per_second < 10_000
        assert card.float32_tflops < card.float16_tflops
        assert (card.bfloat16_tflops is None) == (card.tfloat32_tflops is None) == (card.capability < (8, 0))
        assert card.peak_flops == 1e12 * card.float16_tflops


def test_an_unknown_card_is_taken_for_one_of_its_generation() -> None:
    assert nearest((8, 9), 16 * GIB).capability == (8, 9)
    assert nearest((8, 9), 16 * GIB).memory_gib == pytest.approx(16, rel=0.05)
    assert nearest((12, 1), 32 * GIB).name == "RTX 5090"
