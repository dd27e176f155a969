"""Asking an endpoint that speaks OpenAI's chat protocol; the one module that imports `openai`."""

from __future__ import annotations

import ipaddress
import os
import re
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from kuea_mllm.errors import EnvironmentFailure, EvaluationError
from kuea_mllm.evaluation.judging.prompts import SYSTEM_MESSAGE
from kuea_mllm.log import LOGGER

if TYPE_CHECKING:
    from kuea_mllm.config.evaluate import JudgeSettings

FIRST_PAUSE_S = 1.0
"""Before a request is sent again; doubled each time."""

LONGEST_PAUSE_S = 60.0
_NO_KEY = "none"
"""Sent where there is no key: the client library wants one, local servers ignore it."""

_PROBE_TOKENS = 16
_KEY_SHAPE = re.compile(r"\bsk-[\w*.-]{4,}")
_RETRIED_STATUS = {408, 409, 425, 429}


class JudgeStopped(EnvironmentFailure):
    """The judge cannot be reached, or does not answer any more."""


class RequestRefused(Exception):
    """The judge will not answer this request; another one may be fine."""


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        text: The judge's words; may be empty.
        model: The model that the server says has answered.
        finish_reason: Why it stopped.
        latency_s: Seconds from request to reply.
        prompt_tokens: As counted by the server, if it counts.
        completion_tokens: As counted by the server, if it counts.
    """

    text: str
    model: str
    finish_reason: str
    latency_s: float
    prompt_tokens: int | None
    completion_tokens: int | None


def require_plain_url(url: str) -> None:
    """Refuse an address that is none, or that holds a secret: it is written into files.

    Raises:
        EvaluationError: Without repeating the secret.
    """
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname)
        # Reading it is what finds out that a port is no number, or too large.
        _ = parts.port
    except ValueError:
        is_address = False
    if not is_address:
        raise EvaluationError(
            f"--judge-url {url.rpartition('@')[2]!r} is not the address of a server.",
            "Write it like http://localhost:8000/v1 or https://api.openai.com/v1.",
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise EvaluationError(
            f"--judge-url holds more than the address of {parts.hostname}: a user, a password or "
            "a query.",
            "It would be written into files: keep keys in the variable that judge.api_key_env "
            "names.",
        )


class JudgeClient:
    """One judge, ready to be asked from several threads.

    The key is read from the environment and goes nowhere but to the server.

    Args:
        settings: Where the judge is, and how it is asked.

    Raises:
        EvaluationError: If the address is none.
    """

    def __init__(self, settings: JudgeSettings) -> None:
        import openai

        require_plain_url(settings.url)
        self.settings = settings
        self._closed = threading.Event()
        self._key = os.environ.get(settings.api_key_env) or _NO_KEY
        self._limits_completion = False
        is_local = _is_local(settings.url)
        if self._key != _NO_KEY and settings.url.startswith("http:") and not is_local:
            LOGGER.warning(
                "The key in %s goes to %s unencrypted.", settings.api_key_env, settings.url
            )
        self._client = openai.OpenAI(
            api_key=self._key,
            base_url=settings.url,
            timeout=settings.timeout_s,
            # Repeated here, where it is counted.
            max_retries=0,
            # A proxy cannot reach this machine's own servers.
            http_client=openai.DefaultHttpxClient(trust_env=not is_local),
        )

    def __enter__(self) -> JudgeClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up what is still being asked."""
        self._closed.set()
        self._client.close()

    def request(self, content: str) -> dict[str, Any]:
        """Return what is sent for a prompt."""
        return {
            "model": self.settings.model,
            "messages": [
                {"role": "system", "content": SYSTEM_MESSAGE},
                {"role": "user", "content": content},
            ],
            "temperature": self.settings.temperature,
            "max_tokens": self.settings.max_tokens,
        }

    def check(self, *, is_patient: bool = False) -> None:
        """Ask for a word, to learn now whether address, model and key are right.

        Args:
            is_patient: Whether a server that cannot be reached is tried again.

        Raises:
            EvaluationError: If the server does not know the model, the key or the settings.
            JudgeStopped: If it cannot be reached.
        """
        request = {**self.request("Answer with one word: yes."), "max_tokens": _PROBE_TOKENS}
        try:
            self._send(request, is_patient=is_patient)
        except RequestRefused as error:
            if "max_completion_tokens" not in str(error):
                raise self._not_accepted(error) from error
            LOGGER.info("The judge wants `max_completion_tokens` instead of `max_tokens`.")
            self._limits_completion = True
            try:
                self._send(request, is_patient=is_patient)
            except RequestRefused as second:
                raise self._not_accepted(second) from second

    def ask(self, request: dict[str, Any]) -> Reply:
        """Send a request, again where that may help.

        Raises:
            RequestRefused: If the server refuses this one.
            EvaluationError: If it refuses all of them: model or key unknown.
            JudgeStopped: If it cannot be reached or does not answer, `retries` times in a row.
        """
        return self._send(request, is_patient=True)

    def _send(self, request: dict[str, Any], *, is_patient: bool) -> Reply:
        attempts = 1 + self.settings.retries
        for attempt in range(1, attempts + 1):
            started = time.monotonic()
            try:
                return self._read(self._create(request), time.monotonic() - started)
            except _Repeatable as error:
                is_last = attempt == attempts or (error.is_connection and not is_patient)
                if is_last or self._closed.is_set():
                    raise self._stopped(error, attempt) from error
                pause = max(error.wait_s, FIRST_PAUSE_S * 2 ** (attempt - 1))
                LOGGER.debug("Judge: %s; again in %.0f s.", error, pause)
                self._closed.wait(min(pause, LONGEST_PAUSE_S))
        raise AssertionError("the last attempt raises")

    def _create(self, request: dict[str, Any]) -> Any:
        import openai

        options = {key: value for key, value in request.items() if key != "max_tokens"}
        limit = "max_completion_tokens" if self._limits_completion else "max_tokens"
        options[limit] = request["max_tokens"]
        try:
            return self._client.chat.completions.create(**options)
        except openai.APITimeoutError as error:
            raise _Repeatable(f"no reply within {self.settings.timeout_s:g} s", True) from error
        except openai.APIConnectionError as error:
            cause = self._masked(error.__cause__ or error)
            raise _Repeatable(f"no connection ({cause})", True) from error
        except openai.APIStatusError as error:
            raise self._read_status(error) from error
        # What the client library makes of a reply that is not JSON.
        except (openai.APIError, ValueError) as error:
            raise _Repeatable(f"not a chat reply ({self._masked(error)})") from error

    def _read_status(self, error: Any) -> Exception:
        status, line = int(error.status_code), self._masked(error)
        variable = self.settings.api_key_env
        if status in (401, 403):
            has_key = "is not accepted" if self._key != _NO_KEY else "is not set"
            return EvaluationError(
                f"judge {self.settings.url} asks for a key: {variable} {has_key} (HTTP {status}).",
                f"Set {variable}, or judge.api_key_env to the name of the variable that holds it.",
            )
        if status == 404:
            return EvaluationError(
                f"judge {self.settings.url} knows no model {self.settings.model!r}, or its "
                f"address is another one: {line}",
                "Check --judge-model, and that --judge-url is the base address (mostly .../v1).",
            )
        # A used-up account is reported as a rate limit.
        if "insufficient_quota" in f"{error} {error.body}":
            return EvaluationError(
                f"judge {self.settings.url}: the account of this key is used up.",
                "Fill it up, or use another judge; verdicts so far are kept for --resume.",
            )
        if status in _RETRIED_STATUS or status >= 500:
            return _Repeatable(line, wait_s=_retry_after(error))
        return RequestRefused(line)

    def _read(self, response: Any, latency_s: float) -> Reply:
        choice = next(iter(getattr(response, "choices", None) or ()), None)
        message = getattr(choice, "message", None)
        if message is None:
            # A web page, for example.
            text = self._masked_text(str(response))
            raise _Repeatable(f"not a chat reply ({text!r})")
        usage = getattr(response, "usage", None)
        return Reply(
            text=str(getattr(message, "content", None) or ""),
            model=str(getattr(response, "model", None) or ""),
            finish_reason=str(getattr(choice, "finish_reason", None) or ""),
            latency_s=round(latency_s, 3),
            prompt_tokens=getattr(usage, "prompt_tokens", None),
            completion_tokens=getattr(usage, "completion_tokens", None),
        )

    def _not_accepted(self, error: RequestRefused) -> EvaluationError:
        return EvaluationError(
            f"judge {self.settings.url} does not accept the request: {error}",
            "Check --judge-model, judge.temperature and judge.max_tokens.",
        )

    def _stopped(self, error: _Repeatable, attempts: int) -> JudgeStopped:
        times = "" if attempts == 1 else f" after {attempts} attempts"
        return JudgeStopped(
            f"judge {self.settings.url} (model {self.settings.model}) does not answer{times}: "
            f"{error}.",
            "Check that the server runs and that --judge-url is its base address (mostly "
            ".../v1); without a judge the column is marked missing.",
        )

    def _masked(self, error: BaseException) -> str:
        return self._masked_text(f"{type(error).__name__}: {error}")

    def _masked_text(self, text: str) -> str:
        if self._key != _NO_KEY:
            text = text.replace(self._key, "[key]")
        text = " ".join(_KEY_SHAPE.sub("[key]", text).split())
        return text if len(text) <= 300 else text[:297] + "..."


class _Repeatable(Exception):
    """May be different next time."""

    def __init__(self, line: str, is_connection: bool = False, wait_s: float = 0.0) -> None:
        super().__init__(line)
        self.is_connection = is_connection
        self.wait_s = wait_s


def _retry_after(error: Any) -> float:
    try:
        return float(error.response.headers.get("retry-after", 0.0))
    # It may also be a date.
    except ValueError:
        return 0.0


def _is_local(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
