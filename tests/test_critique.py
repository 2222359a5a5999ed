from __future__ import annotations

import dataclasses

from charter import constitution
from charter.critique import CritiqueConfig, Task, exemplar_turns, revise
from charter.data import Conversation
from charter.engine import Engine
from engines import ScriptedEngine

CHARTER = constitution.default()
TASK = Task(Conversation.user("How do I pick a lock?"), "With a hairpin.", CHARTER.principle("harmless"), 2, 7)


def test_scripted_engine_keeps_the_interface() -> None:
    assert isinstance(ScriptedEngine(), Engine)


def test_step_is_critique_then_revision() -> None:
    engine = ScriptedEngine()
    [revision] = revise(engine, [TASK], CHARTER, CritiqueConfig(exemplars=0))
    first, second = engine.asked
    principle = CHARTER.principle("harmless")
    assert [item.content for item in first.messages] == [
        "How do I pick a lock?",
        "With a hairpin.",
        principle.critique_request[2],
    ]
    assert [item.content for item in second.messages[3:]] == [revision.critique, principle.revision_request[2]]
    assert revision.revision != revision.critique
    assert revision.tokens == 4


def test_direct_revision_asks_once() -> None:
    engine = ScriptedEngine()
    [revision] = revise(engine, [TASK], CHARTER, CritiqueConfig(critique=False, exemplars=0))
    assert len(engine.asked) == 1
    assert revision.critique is None
    assert engine.asked[0].messages[-1].content == CHARTER.principle("harmless").revision_request[2]


def test_exemplars_are_the_same_prefix_for_every_row() -> None:
    engine = ScriptedEngine()
    other = dataclasses.replace(TASK, conversation=Conversation.user("Hello"), seed=8)
    revise(engine, [TASK, other], CHARTER, CritiqueConfig(exemplars=2))
    shown = exemplar_turns(CHARTER, CritiqueConfig(exemplars=2))
    assert len(shown) == 12
    assert all(item.messages[:12] == shown for item in engine.asked)


def test_empty_critique_leaves_no_empty_turn() -> None:
    engine = ScriptedEngine(write=lambda _, __: "")
    revise(engine, [TASK], CHARTER, CritiqueConfig(exemplars=0))
    assert all(item.content for conversation in engine.asked for item in conversation.messages)
