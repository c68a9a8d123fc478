"""Reasoning, tools and system messages: kept, dropped or refused, by the user's word."""

import pytest

from truetune.data.formats.checks import RowError
from truetune.data.policy import Policies, Policy, drops
from truetune.data.schema import Message, Origin, Row

TOOL = {"type": "function", "function": {"name": "f"}}
PLAIN = Row(Origin("x", 1), (Message("user", "<think>mine</think>"), Message("assistant", "a <think>b</think>")))


def row(*answers: Message, system: bool = False) -> Row:
    head = (Message("system", "s"),) if system else ()
    return Row(Origin("x", 1), (*head, Message("user", "q"), *answers), tools=(TOOL,))


@pytest.mark.parametrize("policy", ["keep", "drop", "error"])
def test_a_row_without_any_of_it_stays_the_same_object(policy: Policy) -> None:
    assert Policies(policy, policy, policy).apply(PLAIN) is PLAIN


@pytest.mark.parametrize(
    "answer",
    [Message("assistant", "Yes.", reasoning="hm"), Message("assistant", "\n<think>\nhm\n</think>\n\nYes."),
     Message("assistant", "<think></think>Yes.")],
)  # fmt: skip
def test_reasoning_is_dropped_in_either_form(answer: Message) -> None:
    assert Policies("drop").apply(row(answer)).messages[-1] == Message("assistant", "Yes.")
    assert Policies().apply(row(answer)).messages[-1] is answer
    with pytest.raises(RowError, match="brings its reasoning"):
        Policies("error").apply(row(answer))


def test_what_an_answer_says_about_thinking_stays() -> None:
    answer = Message("assistant", "Wrap it: <think>x</think> tags. Done.", reasoning="hm")
    assert Policies("drop").apply(row(answer)).messages[-1].content == "Wrap it: <think>x</think> tags. Done."


def test_an_answer_of_nothing_but_reasoning_is_no_answer() -> None:
    with pytest.raises(RowError) as caught:
        Policies("drop").apply(row(Message("assistant", "<think>hm</think>")))
    assert caught.value.reason == "empty_output"


def test_tools_and_system_messages_are_dropped_each_by_itself() -> None:
    whole = row(Message("assistant", "a"), system=True)
    assert Policies(tools="drop").apply(whole) == Row(whole.origin, whole.messages)
    assert Policies(system_messages="drop").apply(whole) == Row(whole.origin, whole.messages[1:], tools=(TOOL,))


def test_what_is_dropped_is_counted_by_row() -> None:
    everything = Policies("drop", "drop", "drop")
    thinks = row(Message("assistant", "Yes.", reasoning="hm"), Message("assistant", "<think>a</think>b"), system=True)
    rows = [everything.apply(each) for each in (thinks, row(Message("assistant", "a")), PLAIN)]
    assert everything.dropping() == ["thinking", "tools", "system_messages"]
    assert drops(rows) == {"thinking": 1, "tools": 2, "system_messages": 1}
    assert drops([Policies().apply(thinks)]) == {}


@pytest.mark.parametrize(("policies", "reason"), [(Policies(tools="error"), "tools"),
                                                  (Policies(system_messages="error"), "system")])  # fmt: skip
def test_what_is_not_wanted_is_a_fault(policies: Policies, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        policies.apply(row(Message("assistant", "a"), system=True))
    assert caught.value.reason == reason
