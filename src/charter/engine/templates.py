"""Conversations as the text and token ids that a model was trained on.

A tokenizer's own chat template is used where it has one, without any system turn that the template adds by itself
(SmolLM2's makes it worse at plain questions); a conversation's own system turn is kept. Base models get plain text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from charter.data import Conversation
from charter.errors import EngineError

_MARK = "\N{SECTION SIGN}\N{SECTION SIGN}"
SPEAKERS = {"system": "", "user": "Human: ", "assistant": "Assistant: "}


def render(tokenizer: Any, conversation: Conversation) -> str:
    """The text that a model continues: a new assistant turn, or the last one where it is the assistant's."""
    continues = conversation.messages[-1].role == "assistant"
    if not tokenizer.chat_template:
        return _plain(conversation, continues=continues)
    text = str(
        tokenizer.apply_chat_template(
            conversation.to_list(),
            tokenize=False,
            add_generation_prompt=not continues,
            continue_final_message=continues,
        )
    )
    if conversation.messages[0].role == "system":
        return text
    return _without_added_system_turn(tokenizer, text, conversation.messages[0].content.strip())


def encode(tokenizer: Any, conversation: Conversation) -> list[int]:
    """Token ids of :func:`render`; special tokens come from the template, else from the tokenizer."""
    text = render(tokenizer, conversation)
    return list(tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"])


def encode_turn(tokenizer: Any, prompt: Conversation, response: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of a whole answer to it, with what ends an assistant turn.

    The two are encoded apart, so that a prompt's ids are the ones that generation starts from.
    """
    end = tokenizer.eos_token or ""
    if tokenizer.chat_template:
        closed = str(tokenizer.apply_chat_template(prompt.add("assistant", _MARK).to_list(), tokenize=False))
        end = closed.rpartition(_MARK)[2].rstrip("\n") or end
    answer = tokenizer(response + end, add_special_tokens=False)["input_ids"]
    return encode(tokenizer, prompt), list(answer)


def encode_all(tokenizer: Any, conversations: Sequence[Conversation], *, room: int, context: int) -> list[list[int]]:
    """:func:`encode` every conversation, leaving ``room`` tokens free in a context of ``context`` tokens.

    Raises:
        EngineError: naming the first row that does not fit.
    """
    encoded = []
    for row, conversation in enumerate(conversations):
        tokens = encode(tokenizer, conversation)
        if len(tokens) + room > context:
            raise EngineError(
                f"Row {row} needs {len(tokens)} + {room} tokens; the model's context holds {context}.",
                fix="Shorten the prompt or lower max_new_tokens.",
            )
        encoded.append(tokens)
    return encoded


def stops(tokenizer: Any) -> tuple[str, ...]:
    """Strings that end an answer beside the end-of-sequence token."""
    return () if tokenizer.chat_template else ("\n\nHuman:",)


def _plain(conversation: Conversation, *, continues: bool) -> str:
    turns = [SPEAKERS[message.role] + message.content for message in conversation.messages]
    return "\n\n".join(turns if continues else [*turns, "Assistant:"])


def _without_added_system_turn(tokenizer: Any, text: str, first: str) -> str:
    """``text`` less a system turn that the template put before the first turn, whose content is ``first``.

    The added turn ends at the last end-of-sequence token before the first turn; a leading beginning-of-sequence token
    is kept.
    """
    head = text[: text.index(first)] if first in text else ""
    end = tokenizer.eos_token
    if "system" not in head or not end or end not in head:
        return text
    rest = text[head.rindex(end) + len(end) :].lstrip("\n")
    start = tokenizer.bos_token
    return start + rest if start and text.startswith(start) and not rest.startswith(start) else rest
