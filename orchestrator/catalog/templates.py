"""Chat templates: how the turns of a conversation become text, by name (`data.template`).

A template is plain text around `{content}`, one for each role. What `assistant` has before its content is context; the
content and what follows it carry the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from orchestrator.errors import MoegridError
from orchestrator.registry import Registry

CONTENT = "{content}"
Turn = tuple[str, str]  # role (system, user, assistant), text


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """One template; `system` is "" where it has none (the text then stands before the first user's turn).

    `begin` stands before the first turn.
    """

    name: str
    user: str
    assistant: str
    system: str = ""
    begin: str = ""
    version: int = 1

    def __post_init__(self) -> None:
        for role in ("user", "assistant", *(["system"] if self.system else [])):
            if getattr(self, role).count(CONTENT) != 1:
                raise MoegridError(
                    f"template {self.name!r} does not say once where the {role}'s {CONTENT} goes",
                    hint=f'as in {role}="<{role}>{CONTENT}</{role}>"',
                )

    def pieces(self, turns: Sequence[Turn]) -> tuple[str, ...]:
        """Return a conversation as pieces in turn: context, an answer that carries the loss, context, ...

        It ends with the last answer; what follows that is left out.
        """
        pieces: list[str] = []
        context = self.begin
        for role, text in self._placed(turns):
            before, after = getattr(self, role).split(CONTENT)
            if role == "assistant":
                # White space before the answer belongs to it, as it does where a response follows a prompt.
                bare = (context + before).rstrip(" ")
                pieces += [bare, (context + before)[len(bare) :] + text + after]
                context = ""
            else:
                context += before + text + after
        return tuple(pieces)

    def _placed(self, turns: Sequence[Turn]) -> Iterator[Turn]:
        """Yield the turns, with a system's text at the head of the next turn where the template has no place for it."""
        held = ""
        for role, text in turns:
            if role == "system" and not self.system:
                held += f"{text}\n\n"
                continue
            yield role, held + text if role == "user" else text
            held = "" if role == "user" else held


_OURS = (
    ChatTemplate("plain", "User: {content}\n", "Assistant: {content}\n", "{content}\n\n"),
    ChatTemplate(
        "chatml",
        "<|im_start|>user\n{content}<|im_end|>\n",
        "<|im_start|>assistant\n{content}<|im_end|>\n",
        "<|im_start|>system\n{content}<|im_end|>\n",
    ),
    # Stanford Alpaca's frame; its `input` is part of the user's turn.
    ChatTemplate(
        "alpaca",
        "### Instruction:\n{content}\n\n",
        "### Response:\n{content}\n\n",
        "{content}\n\n",
    ),
    ChatTemplate("tulu", "<|user|>\n{content}\n", "<|assistant|>\n{content}\n", "<|system|>\n{content}\n"),
)
TEMPLATES = Registry("templates", "template", ChatTemplate, MappingProxyType({kind.name: kind for kind in _OURS}))
