from __future__ import annotations

from types import SimpleNamespace

import pytest

from charter.data import Conversation, Message
from charter.engine import templates

transformers = pytest.importorskip("transformers")

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def chat() -> object:
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "<|im_start|>": 1, "<|im_end|>": 2, "Hi": 3}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="[UNK]"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def test_added_system_turn_is_left_out(chat: object) -> None:
    assert templates.render(chat, Conversation.user("Hi")) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_given_system_turn_is_kept(chat: object) -> None:
    conversation = Conversation((Message("system", "Be brief."), Message("user", "Hi")))
    assert templates.render(chat, conversation).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")


def test_assistant_turn_is_continued(chat: object) -> None:
    text = templates.render(chat, Conversation.user("Hi").add("assistant", "The answer is: ("))
    assert text.endswith("<|im_start|>assistant\nThe answer is: (")


def test_text_that_speaks_of_a_system_is_not_cut(chat: object) -> None:
    text = templates.render(chat, Conversation.user("What is a system <|im_end|>?"))
    assert "What is a system <|im_end|>?" in text


def test_plain_template_for_base_models() -> None:
    tokenizer = SimpleNamespace(chat_template=None)
    conversation = Conversation.user("Hi").add("assistant", "Hello").add("user", "Bye")
    assert templates.render(tokenizer, conversation) == "Human: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant:"
    assert templates.stops(tokenizer) == ("\n\nHuman:",)
