"""Settings of ``truetune chat``."""

from __future__ import annotations

from typing import ClassVar

from truetune.config.generate import AnswerGroup


class ChatConfig(AnswerGroup):
    """Settings of ``truetune chat``: talk with a base, an adapter on it, or a merged model, in the terminal."""

    command: ClassVar[str] = "chat"
