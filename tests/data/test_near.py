"""Near repeats: the shares are close to the true ones, no order or process changes them, and memory is bounded."""

import random
import subprocess
import sys

import numpy as np
import pytest

from truetune.data import near
from truetune.data.near import Sketches, near_repeats, near_shared, word_hashes

WORDS = [f"word{i}" for i in range(3000)]


def sketches(*texts: str, limit: int = near.LIMIT) -> Sketches:
    made = Sketches(limit)
    made.add(texts)
    return made


def triples(text: str) -> set[tuple[str, ...]]:
    """The plain statement of what a sketch stands for: each word with the two behind it."""
    words = text.lower().split()
    return {tuple(words[i : i + 3]) for i in range(len(words))}


def jaccard(one: str, other: str) -> float:
    return len(triples(one) & triples(other)) / len(triples(one) | triples(other))


def changed(text: str, count: int, seed: int = 0) -> str:
    words = text.split()
    for place in random.Random(seed).sample(range(len(words)), count):
        words[place] = f"new{place}"
    return " ".join(words)


def prose(count: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


@pytest.mark.parametrize("words", [30, 120, 1000])
def test_the_share_is_close_to_the_true_one(words: int) -> None:
    errors = []
    for seed in range(40):
        text = prose(words, seed)
        other = changed(text, max(1, words // 40), seed)
        found = near_repeats(sketches(text, other), threshold=0.01)[2]
        errors.append(float(found[0]) - jaccard(text, other))
    assert abs(np.mean(errors)) < 0.02  # no bias
    assert np.std(errors) < 0.06  # sqrt(0.85 * 0.15 / 128) = 0.03, and more for texts that fill few bins


def test_pairs_above_the_threshold_are_found_and_others_are_not() -> None:
    texts = [prose(80, seed) for seed in range(300)]
    near_ones = [changed(text, 3, seed) for seed, text in enumerate(texts[:100])]  # share 0.8
    far_ones = [changed(text, 30, seed) for seed, text in enumerate(texts[100:200])]  # share 0.2
    row, other, share = near_repeats(sketches(*texts, *near_ones, *far_ones))
    found = dict(zip(row.tolist(), other.tolist(), strict=True))
    assert sum(found.get(300 + i) == i for i in range(100)) >= 97
    assert all(300 <= number < 400 for number in found)
    assert (share >= near.THRESHOLD).all()


def test_case_punctuation_and_line_breaks_play_no_part() -> None:
    one, other = "Why is the sky blue? Because air scatters it.", "why is\nthe SKY, blue -- because air scatters it"
    assert near_repeats(sketches(one, other))[2].tolist() == [1.0]


def test_a_script_without_blanks_is_compared_by_its_characters() -> None:
    one = "解释为什么水对人类至关重要。水是人体细胞和组织的主要组成部分。"
    assert len(word_hashes([one])[0]) == sum(character.isalnum() for character in one)
    assert near_repeats(sketches(one, one.replace("主要", "重要")))[0].tolist() == [1]


def test_words_are_told_apart_wherever_they_stand() -> None:
    hashes, row = word_hashes(["the cat, the dog", "", "dog"])
    assert row.tolist() == [0, 0, 0, 0, 2]
    assert hashes[0] == hashes[2] != hashes[1]
    assert hashes[3] == hashes[4] != hashes[1]


def test_texts_without_words_are_like_no_other() -> None:
    assert near_repeats(sketches("...", "!!", "", "...", "one word", "..."))[0].tolist() == []


def test_half_a_character_is_no_obstacle() -> None:
    assert near_repeats(sketches("\ud83d one two", "\ud83d one two"))[0].tolist() == [1]


def test_held_out_texts_name_the_text_they_resemble_most() -> None:
    known = sketches(prose(80, 1), prose(80, 2), prose(80, 3))
    held_out = sketches(prose(80, 9), changed(prose(80, 3), 2), prose(80, 2))
    row, other, share = near_shared(held_out, known)
    assert (row.tolist(), other.tolist()) == ([1, 2], [2, 1])
    assert share[0] < share[1] == 1.0


def test_many_equal_texts_each_point_to_an_earlier_one() -> None:
    row, other, share = near_repeats(sketches(*["the same old words in every row of this file"] * 2000))
    assert (len(row), set(share.tolist())) == (1999, {1.0})
    assert (other < row).all()


def test_blocks_and_long_texts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [prose(50, seed) for seed in range(20)] + [prose(2000, 99)]
    at_once = sketches(*texts).matrix
    monkeypatch.setattr(near, "_BLOCK", 700)
    by_parts = Sketches()
    for start in range(0, len(texts), 7):
        by_parts.add(texts[start : start + 7])
    assert np.array_equal(by_parts.matrix, at_once)


def test_texts_beyond_the_limit_are_counted_and_not_kept() -> None:
    made = sketches("a b c", "d e f", limit=3)
    made.add(["g h i", "a b c", "j"])
    assert (made.seen, made.matrix.shape) == (5, (3, near.BINS))


def test_another_process_makes_the_same_sketch() -> None:
    code = "from truetune.data.near import Sketches\ns = Sketches()\ns.add(['why is the sky blue', '水'])\n"
    run = subprocess.run(
        [sys.executable, "-c", code + "print(s.matrix.tobytes().hex())"], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == sketches("why is the sky blue", "水").matrix.tobytes().hex()
