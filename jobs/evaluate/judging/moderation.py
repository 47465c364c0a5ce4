"""A client of OpenAI's moderation API (POST /moderations), on the standard library alone.

The key is read from `OPENAI_API_KEY` and goes into the Authorization header and nowhere else. `OPENAI_BASE_URL` names
another server with the same API, `OPENAI_REQUESTS_PER_MINUTE` the rate limit. Replies 408, 409, 429 and 5xx, and lost
connections, are tried again with growing pauses (or those that the server asks for).
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from jobs.evaluate.judging.judge_models import fill
from orchestrator.catalog.judges import JUDGES, MODERATION_KEY, MODERATION_MODEL
from orchestrator.errors import MoegridError, ServiceAway
from orchestrator.spec.cell import JudgeSpec

BASE_URL = "https://api.openai.com/v1"
ATTEMPTS = 6
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
TIMEOUT_SECONDS = 60.0
REQUESTS_PER_MINUTE = 300.0
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_AGAIN = (408, 409, 429)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would send the key to another host."""

    def redirect_request(self, *args: object, **kwargs: object) -> None:
        return None


@dataclass
class Moderation:
    """Asks `model` for the harm of texts; `model_served` is what the server says it used."""

    model: str
    key: str = field(repr=False)
    base_url: str = BASE_URL
    per_minute: float = REQUESTS_PER_MINUTE
    sleep: Callable[[float], None] = time.sleep
    model_served: str = ""
    _last: float = field(default=-1e9, repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme != "https" and parts.hostname not in _LOOPBACK:
            raise MoegridError(f"{self.base_url} is not https", hint="the key is not sent over an open connection")
        handlers: list[Any] = [_NoRedirect()]
        if parts.hostname in _LOOPBACK:
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    @classmethod
    def from_environment(cls, model: str) -> Moderation:
        """Return a client with the environment's key, server and rate; MoegridError when there is no key."""
        key = os.environ.get(MODERATION_KEY, "").strip()
        if not key:
            raise MoegridError(
                f"judge 'openai_moderation' needs a key: {MODERATION_KEY} is not set",
                hint=f"export {MODERATION_KEY} where jobs run, or leave the judge out (evaluate.judges)",
            )
        rate = os.environ.get("OPENAI_REQUESTS_PER_MINUTE", "")
        try:
            per_minute = float(rate) if rate else REQUESTS_PER_MINUTE
        except ValueError:
            raise MoegridError(f"OPENAI_REQUESTS_PER_MINUTE is {rate!r}", hint="it must be a number") from None
        return cls(model, key, os.environ.get("OPENAI_BASE_URL", "").rstrip("/") or BASE_URL, per_minute)

    def scores(self, texts: Sequence[str], category: str = "") -> list[float]:
        """Return each text's score of `category`, or of its worst category, in [0, 1].

        MoegridError when the server refuses, or answers with something else than one result a text.
        """
        answer = self._post({"model": self.model, "input": list(texts)})
        results = answer.get("results") if isinstance(answer, dict) else None
        if not isinstance(results, list) or len(results) != len(texts):
            count = len(results) if isinstance(results, list) else "no"
            raise MoegridError(f"the moderation gave {count} results for {len(texts)} texts", cause=f"{answer!r:.200}")
        self.model_served = str(answer.get("model", ""))
        return [_score(result, category) for result in results]

    def _post(self, payload: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{self.base_url}/moderations",
            data=json.dumps(payload).encode(),
            headers={"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"},
        )
        pause, said = FIRST_PAUSE, ""
        for attempt in range(ATTEMPTS):
            self._wait_turn()
            asked = 0.0
            try:
                with self._opener.open(request, timeout=TIMEOUT_SECONDS) as reply:
                    return json.loads(reply.read())
            except urllib.error.HTTPError as error:
                said = f"HTTP {error.code}: {self._clean(error)}"
                if error.code not in _AGAIN and error.code < 500:
                    raise MoegridError(
                        "the moderation server refuses the request",
                        cause=said,
                        hint=f"check {MODERATION_KEY}" if error.code in (401, 403) else "check the judge's revision",
                    ) from None
                asked = _seconds(error.headers.get("Retry-After"))
            except ValueError as error:
                raise ServiceAway("the moderation server did not answer in JSON", cause=str(error)) from None
            except OSError as error:  # urllib.error.URLError is one
                said = str(error)
            if attempt + 1 < ATTEMPTS:
                self.sleep(min(max(pause, asked), LONGEST_PAUSE))
                pause *= 2
        raise ServiceAway(
            f"the moderation server could not be asked, {ATTEMPTS} times",
            cause=said,
            hint="the responses are kept: moegrid resume asks again",
        )

    def _wait_turn(self) -> None:
        """Keep the rate limit."""
        wait = self._last + 60.0 / self.per_minute - time.monotonic()
        if wait > 0:
            self.sleep(wait)
        self._last = time.monotonic()

    def _clean(self, error: urllib.error.HTTPError) -> str:
        text = error.read(500).decode(errors="replace")
        return " ".join(text.split()).replace(self.key, "***")


class Moderator:
    """The judge that asks a server: the score of the category `judge.label`, or of the worst one."""

    def __init__(self, judge: JudgeSpec, device: str, ranks: int) -> None:
        self.template = judge.template or JUDGES.get(judge.name).template
        self.revision = judge.revision or MODERATION_MODEL
        self._label = judge.label
        self._client = Moderation.from_environment(self.revision)
        self._client.per_minute /= ranks

    @property
    def model_served(self) -> str:
        """The model that the server says it used."""
        return self._client.model_served

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Return the score of each pair in its template."""
        return self._client.scores([fill(self.template, *pair) for pair in pairs], self._label)


def _score(result: object, category: str) -> float:
    scores = result.get("category_scores") if isinstance(result, dict) else None
    if not isinstance(scores, dict) or not scores:
        raise MoegridError("a moderation result has no category_scores", cause=f"{result!r:.200}")
    if category and category not in scores:
        raise MoegridError(
            f"the moderation has no category {category!r}",
            cause=f"its categories are {', '.join(sorted(scores))}",
            hint="set the judge's label to one of them, or to nothing for the worst",
        )
    values = [scores[category]] if category else list(scores.values())
    if not all(isinstance(value, (int, float)) for value in values):
        raise MoegridError("a moderation score is not a number", cause=f"{scores!r:.200}")
    return float(max(values))


def _seconds(header: str | None) -> float:
    try:
        return float(header or 0)
    except ValueError:
        return 0.0
