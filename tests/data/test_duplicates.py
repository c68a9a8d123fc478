from truetune.data.duplicates import duplicates, likeness, shared
from truetune.data.schema import Message, Origin, Row


def row(number: int, *messages: Message, text: str = "", tools: tuple[dict[str, object], ...] = ()) -> Row:
    return Row(Origin("x.jsonl", number), messages=messages, text=text, tools=tools)


def test_a_repeated_row_points_to_the_first() -> None:
    rows = [row(1, text="a"), row(2, text="b"), row(3, text="a"), row(5, text="a")]
    assert duplicates(rows) == [
        (Origin("x.jsonl", 3), Origin("x.jsonl", 1)),
        (Origin("x.jsonl", 5), Origin("x.jsonl", 1)),
    ]


def test_the_same_words_in_another_role_are_no_duplicate() -> None:
    assert duplicates([row(1, Message("user", "a")), row(2, Message("assistant", "a"))]) == []


def test_turns_that_only_join_to_the_same_text_are_no_duplicate() -> None:
    split = row(1, Message("user", "a"), Message("user", "b"))
    assert duplicates([split, row(2, Message("user", "ab"))]) == []


def test_tools_count_and_the_order_of_their_keys_does_not() -> None:
    one, same = row(1, tools=({"a": 1, "b": 2},)), row(2, tools=({"b": 2, "a": 1},))
    other = row(3, tools=({"a": 1},))
    assert [found.row for found, _ in duplicates([one, same, other])] == [2]


def test_half_a_character_is_hashed_like_any_other() -> None:
    assert [found.row for found, _ in duplicates([row(1, text="\ud83d"), row(2, text="\ud83d")])] == [2]


def test_held_out_rows_that_are_trained_on_are_found_whatever_their_file() -> None:
    trained = [row(1, text="a"), row(2, text="b")]
    held_out = [Row(Origin("held.jsonl", n), text=text) for n, text in enumerate("cab", 1)]
    assert [origin.row for origin in shared(trained, held_out)] == [2, 3]


ROW = "Explain in one sentence why the sky looks blue during the day; because air scatters blue light more than red."


def numbered(*texts: str, file: str = "x.jsonl") -> list[Row]:
    return [Row(Origin(file, n), text=text) for n, text in enumerate(texts, 1)]


def test_a_repeat_to_the_letter_is_no_near_one_and_the_other_way_round() -> None:
    found = likeness(numbered(ROW, "something else", ROW, ROW.replace("day", "daytime")))
    assert [(row.row, first.row) for row, first in found.repeats] == [(3, 1)]
    assert [(pair.row.row, pair.other.row) for pair in found.near] == [(4, 1)]
    assert 0.7 < found.near[0].share < 1


def test_held_out_rows_that_are_nearly_trained_on_are_named() -> None:
    rows = numbered("something else", ROW, "another thing")
    found = likeness(rows, numbered("new", "another thing", ROW.replace("red", "green"), file="v.jsonl"))
    assert [origin.row for origin in found.leaked] == [2]
    assert [(str(pair.row), str(pair.other)) for pair in found.near_leaked] == [("v.jsonl, row 3", "x.jsonl, row 2")]
    leaked, nearly = found.warnings()
    assert leaked.startswith("1 of 3 rows of --val-data is trained on too")
    assert nearly.startswith("1 of 3 held-out rows is nearly trained on too")
    assert "v.jsonl, row 3 and x.jsonl, row 2" in nearly


def test_nothing_alike_is_nothing_to_say() -> None:
    found = likeness(numbered("one thing here", "two quite different words"))
    assert found.warnings() == []
    assert {name: found.facts()[name] for name in ("exact", "near", "leaked", "near_leaked")} == dict.fromkeys(
        ("exact", "near", "leaked", "near_leaked"), 0
    )


def test_rows_beyond_the_limit_are_said_to_be_left_out_of_the_search() -> None:
    found = likeness(numbered(*(f"row {n} says {n * n}" for n in range(5))), limit=3)
    assert found.warnings() == ["near repeats were looked for among the first 3 of 5 rows"]


def test_the_report_keeps_twenty_pairs_and_counts_all() -> None:
    facts = likeness(numbered(*[ROW] * 30)).facts()
    assert (facts["exact"], len(facts["rows"]["exact"])) == (29, 20)
    assert facts["rows"]["exact"][0] == ["x.jsonl, row 2", "x.jsonl, row 1", 1.0]


def test_a_row_that_is_read_twice_by_its_weight_is_no_repeat_and_hides_none() -> None:
    text = " ".join(f"word{n}" for n in range(80))
    (one,), held = numbered(text), numbered(text + " more", file="held.jsonl")
    found = likeness([one, one], held)
    assert (found.repeats, len(found.near_leaked)) == ([], 1)
