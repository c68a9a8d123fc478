from truetune.data.duplicates import duplicates, shared
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
