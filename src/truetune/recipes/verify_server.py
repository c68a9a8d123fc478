"""An OpenAI-compatible server, asked what a user of it would ask: what it makes of a prompt, and what it answers.

Nothing is sent anywhere but to the address that was named.
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from truetune.errors import ModelError
from truetune.recipes.verify_reference import Reference, Sample
from truetune.recipes.verify_subjects import Answer

_SECONDS = 300.0  # a cold server loads its model at the first question


class Server:
    """A ``Subject`` behind HTTP: prompts by the number of tokens it counts, answers by their text.

    Args:
        url: with or without ``/v1``.
        model: what the server calls it; the first it lists when None.
        kind: what its answers are held to.
        token: sent as a bearer token where the server wants one.
    Raises:
        ModelError: it does not answer, or not as such a server does.
    """

    loader = "http"
    faults = ()

    def __init__(self, url: str, *, model: str | None, kind: str, token: str | None = None) -> None:
        bare = url.rstrip("/")
        if not bare.startswith(("http://", "https://")):
            raise ModelError(f"--url: {url} is no address", ("expected", "such as http://localhost:8000"))
        self._root = bare if bare.endswith("/v1") else f"{bare}/v1"
        self._token = token
        self.name, self.kind = url, kind
        listed = [] if model else self._models()
        self.model = model or listed[0]
        others = f"; it lists {', '.join(listed)}: --served-model names another" if len(listed) > 1 else ""
        self.notes: list[str] = [f"asked for the model '{self.model}'{others}"]
        self._told: dict[int, Mapping[str, Any]] = {}

    def prompt(self, sample: Sample) -> tuple[str | None, list[int] | int] | None:
        """The number of tokens that it counts in the prompt; None where it does not say."""
        counted = (self._chat(sample, 1).get("usage") or {}).get("prompt_tokens") if _plain_turns(sample) else None
        return (None, counted) if isinstance(counted, int) else None

    def logits(self, sample: Sample) -> Tensor | None:
        """No server gives them."""
        return None

    def answers(self, samples: Sequence[Sample], longest: int) -> list[Answer] | None:
        """By the chat route; of bare text, or turns that it can't carry, by the other one."""
        return [self._answer(sample, longest) for sample in samples]

    def lost_stops(self, reference: Reference) -> list[str]:
        """Seen by how its answers end, and not otherwise."""
        return []

    def _answer(self, sample: Sample, longest: int) -> Answer:
        if _plain_turns(sample):
            choice = self._choice(self._chat(sample, longest))
            text = (choice.get("message") or {}).get("content") or ""
        else:
            choice = self._choice(self._ask("completions", {**self._greedy(longest), "prompt": sample.prompt}))
            text = choice.get("text") or ""
        return Answer(str(text), choice.get("finish_reason") == "stop")

    def _chat(self, sample: Sample, longest: int) -> Mapping[str, Any]:
        messages = [{"role": turn["role"], "content": turn["content"]} for turn in sample.messages]
        return self._ask("chat/completions", {**self._greedy(longest), "messages": messages})

    def _greedy(self, longest: int) -> dict[str, Any]:
        return {"model": self.model, "max_tokens": longest, "temperature": 0}

    def _choice(self, answer: Mapping[str, Any]) -> Mapping[str, Any]:
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise ModelError(f"--url: {self.name} answers, but without an answer in it: {str(answer)[:200]}")
        return choices[0]

    def _models(self) -> list[str]:
        listed = self._ask("models", None).get("data")
        if not isinstance(listed, list) or not listed:
            raise ModelError(f"--url: {self.name} lists no model", ("way out", "--served-model NAME"))
        return [str(model["id"]) for model in listed]

    def _ask(self, route: str, body: Mapping[str, Any] | None) -> Mapping[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._root}/{route}", data=data, headers=headers)
        try:
            with urllib.request.build_opener(_StaysHere).open(request, timeout=_SECONDS) as response:
                found = json.loads(response.read())
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:300]
            raise ModelError(f"--url: {self.name} refuses /{route}: {error.code}", ("it says", said)) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise ModelError(
                f"--url: {self.name} does not answer: {reason}",
                ("way out", "start it, or check the address; truetune serve prints its own"),
            ) from None
        if not isinstance(found, dict):
            raise ModelError(f"--url: {self.name} answers /{route} with something else than an object")
        return found


class _StaysHere(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: prompts and key go to the address that was named, and nowhere else."""

    def redirect_request(self, *_: Any) -> None:
        """No other request."""


def _plain_turns(sample: Sample) -> bool:
    """Whether role and content say all there is: no tools, and no second column that a template words apart."""
    return bool(sample.messages) and not sample.tools and not any(turn.get("input") for turn in sample.messages)
