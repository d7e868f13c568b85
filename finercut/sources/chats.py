"""Chats in the rows of a text source, as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A message's names for who speaks and what is said: OpenAI's, and ShareGPT's, which has names of roles of its own.
_NAMES = (("role", "content"), ("from", "value"))
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages that say who speaks and what."""
    return isinstance(value, list) and bool(value) and all(_message(message) for message in value)


def text(chat: list[Any], tokenizer: PreTrainedTokenizerBase | None, where: str) -> str:
    """The chat as the tokenizer's template writes it; without one, a paragraph a message.

    Raises:
        ValueError: the template does not take it.
    """
    messages = [_message(message) for message in chat]
    if tokenizer is None or tokenizer.chat_template is None:
        return "\n\n".join(message["content"] for message in messages)
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:
        # A template may refuse a chat, with an error of any class.
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the model's chat template does not take {where}: {reason}; take it out") from error


def _message(message: Any) -> dict[str, Any] | None:
    """With the names that templates know, and what else it has, such as calls of tools; None where it is no message."""
    for speaker, said in _NAMES:
        if isinstance(message, dict) and isinstance(message.get(speaker), str) and said in message:
            content = _content(message[said])
            if content is None:
                return None
            more = {name: value for name, value in message.items() if name not in (speaker, said) and value is not None}
            return more | {"role": _ROLES.get(message[speaker], message[speaker]), "content": content}
    return None


def _content(said: Any) -> str | None:
    """What is said, as text: nothing beside a call of a tool, or parts of text; None where it is more than text."""
    if said is None:
        return ""
    if isinstance(said, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in said):
        return "".join(part["text"] for part in said)
    return said if isinstance(said, str) else None
