"""No content of a file that gptlab reads ends in anything but a sentence."""

from __future__ import annotations

import random

import pytest
from readers import OTHER_KINDS, Reader, flipped, make_readers, mutated, with_other_values


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> list[Reader]:
    return make_readers(tmp_path_factory.mktemp("readers"))


def test_every_reader_reads_a_whole_file(readers: list[Reader]) -> None:
    refused = [
        f"{reader.name} ({reader.file.name})" for reader in readers if not reader.survives(reader.file.read_bytes())
    ]
    assert refused == ["2:4 model (config.json)"]  # its weights are left out here


def test_a_file_of_another_kind_is_refused_or_read(readers: list[Reader]) -> None:
    draw = random.Random(1)
    for reader in readers:
        for content in (None, b"", b"[]", *draw.sample(OTHER_KINDS, 3)):
            reader.survives(content)


@pytest.mark.slow
def test_every_file_of_every_other_kind(readers: list[Reader]) -> None:
    for reader in readers:
        for content in OTHER_KINDS:
            reader.survives(content)


def try_damage(readers: list[Reader], count: int, seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(count):
        reader = draw.choice(readers)
        content = reader.file.read_bytes()
        match draw.randrange(4):
            case 0:
                reader.survives(flipped(content, draw))
            case 1:
                reader.survives(content[: draw.randrange(len(content))])
            case _:
                reader.survives(mutated(content, draw))


def test_damage_ends_in_a_sentence(readers: list[Reader]) -> None:
    try_damage(readers, 120, seed=1)


def test_values_of_other_kinds_end_in_a_sentence(readers: list[Reader]) -> None:
    draw = random.Random(1)
    for reader in readers:
        changed = list(with_other_values(reader.file.read_bytes()))
        for content in draw.sample(changed, min(len(changed), 3)):
            reader.survives(content)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_ten_thousand_damages_end_in_a_sentence(readers: list[Reader], seed: int) -> None:
    try_damage(readers, 2500, seed=100 + seed)


@pytest.mark.slow
def test_every_value_of_every_kind_ends_in_a_sentence(readers: list[Reader]) -> None:
    count = 0
    for reader in readers:
        for content in with_other_values(reader.file.read_bytes()):
            reader.survives(content)
            count += 1
    assert count > 5000
