"""Settings of ``truetune serve``."""

from __future__ import annotations

import ipaddress
import re
from typing import ClassVar, Literal

from pydantic import field_validator, model_validator
from typing_extensions import Self

from truetune.config.groups import bytes_of
from truetune.config.mismatch import MismatchGroup
from truetune.config.options import option
from truetune.config.quant import QuantGroup

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
"""What a model may be called: nothing that could be taken for a path."""


class ServeConfig(QuantGroup, MismatchGroup):
    """Settings of ``truetune serve``: an OpenAI-compatible server, many adapters on one base."""

    command: ClassVar[str] = "serve"

    model: str = option(
        help="a local folder, or a name on the Hub", group="base", alias=("model_name_or_path",), min_length=1
    )
    revision: str | None = option(None, help="branch, tag or commit of a Hub model", group="base")
    adapters: tuple[str, ...] = option(
        (),
        help="NAME=DIR serves an adapter as the model NAME; DIR serves every adapter in it by its folder's name, those "
        "that appear later too",
        group="base",
        alias=("adapter",),
    )
    served_name: str | None = option(
        None, help="what the base is called; else the last part of --model", group="base", alias=("served_model_name",)
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", help="precision", group="base")
    device: Literal["auto", "cpu", "cuda"] = option("auto", help="where to compute", group="base")
    template: str = option(
        "auto",
        help="chat template: auto (each adapter's own, else the tokenizer's), none, a built-in name, or a Jinja file",
        group="dataset",
    )
    host: str = option("127.0.0.1", help="address to listen on; any but loopback needs a token", group="server")
    port: int = option(8000, help="port to listen on; 0 takes a free one", group="server", ge=0, le=65535)
    token: str | None = option(
        None,
        help="what clients must send as their API key; better in TRUETUNE_TOKEN, where no list of processes shows it",
        group="server",
        alias=("api_key",),
        min_length=8,
    )
    max_rows: int = option(16, help="answers that are computed together", group="limits", gt=0)
    max_tokens: int = option(
        65_536, help="tokens whose keys and values are kept in memory, over all answers", group="limits", gt=0
    )
    max_new_tokens: int = option(4096, help="longest answer a request may ask for, in tokens", group="limits", gt=0)
    max_queue: int = option(64, help="answers that may wait; more are told to come back", group="limits", ge=0)
    max_body: str = option("2MB", help="largest request", group="limits")
    max_seconds: float = option(600.0, help="longest time for one request", group="limits", gt=0)
    max_connections: int = option(256, help="open connections", group="limits", gt=0)
    max_stall: float = option(
        30.0, help="seconds a client may take to send its request, or to take a piece of its answer",
        group="limits", gt=0,
    )  # fmt: skip
    drain: float = option(
        30.0, help="seconds that running answers are given when the server is asked to stop", group="limits", ge=0
    )
    adapter_memory: str | None = option(
        None, help="memory for loaded adapters, such as 2GB; those used longest ago are put away", group="limits"
    )

    @field_validator("max_body", "adapter_memory")
    @classmethod
    def _size(cls, value: str | None) -> str | None:
        if value is not None:
            bytes_of(value)
        return value

    @field_validator("served_name")
    @classmethod
    def _name(cls, value: str | None) -> str | None:
        if value is not None and not NAME.fullmatch(value):
            raise ValueError("letters, digits, and . _ : - in between")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.allowed and not self.adapters:
            flag = "--allow-other-base" if self.allow_other_base else "--allow-mismatch"
            raise ValueError(f"{flag} needs --adapters: without one there is nothing to differ from")
        return self

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def body_bytes(self) -> int:
        """``max_body`` in bytes."""
        return bytes_of(self.max_body)

    @property
    def adapter_bytes(self) -> int | None:
        """``adapter_memory`` in bytes; None for no limit."""
        return None if self.adapter_memory is None else bytes_of(self.adapter_memory)
