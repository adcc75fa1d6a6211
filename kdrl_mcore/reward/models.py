"""Reward models: served over HTTP (`remote_model`), or loaded by each data-parallel replica (`local_model`)."""

from __future__ import annotations

import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch

from kdrl_mcore.config import RewardConfig
from kdrl_mcore.errors import ConfigError, ModelError, RewardError
from kdrl_mcore.parallel.platform import device
from kdrl_mcore.reward.registry import Reward, register_class
from kdrl_mcore.types import Rollout

FIRST_WAIT_SECONDS = 0.5
"""The wait before the second attempt of a request; it doubles with each further attempt."""
_TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Makes a redirect an error: it would send the token to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


@register_class("remote_model")
class RemoteModel(Reward):
    """Scores from a server, on the server's own scale.

    The request is a POST of `{"responses": [{"prompt": ..., "response": ..., "answer": ...}, ...]}`, each response also with
    `"columns": {...}` if `data.columns` names any; the reply is `{"scores": [number, ...]}`.
    """

    def __init__(self, config: RewardConfig) -> None:
        """Read the token. Connects only when there are responses to score.

        Raises:
            ConfigError: the token's environment variable is not set.
        """
        self._settings = config.remote
        self._headers = {"Content-Type": "application/json"}
        if variable := config.remote.token_variable:
            if not os.environ.get(variable):
                raise ConfigError(f"reward.remote.token_variable: the environment variable {variable} is not set")
            self._headers["Authorization"] = f"Bearer {os.environ[variable]}"
        self._opener = urllib.request.build_opener(_NoRedirect)

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """See `Reward`. A request that cannot be sent, times out or reaches a busy server is retried."""
        scores: list[float] = []
        for begin in range(0, len(rollouts), self._settings.batch_size):
            scores += self._request(rollouts[begin : begin + self._settings.batch_size])
        return scores

    def _request(self, rollouts: Sequence[Rollout]) -> list[float]:
        rows = [
            {"prompt": each.prompt, "response": each.response, "answer": each.answer}
            | ({"columns": dict(each.columns)} if each.columns else {})
            for each in rollouts
        ]
        body, url = json.dumps({"responses": rows}).encode(), str(self._settings.url)
        cause = ""
        for attempt in range(self._settings.attempts):
            if attempt:
                time.sleep(FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
            try:
                request = urllib.request.Request(url, body, self._headers)
                with self._opener.open(request, timeout=self._settings.timeout) as reply:
                    return _scores(reply.read(), len(rollouts), url)
            except urllib.error.HTTPError as error:
                cause = f"HTTP status {error.code}"
                if error.code not in _TRY_AGAIN:
                    raise RewardError(
                        f"the reward model at {url} rejects the request ({cause}): check reward.remote"
                    ) from error
            except (OSError, HTTPException) as error:  # no connection, a time-out, a truncated reply
                cause = str(getattr(error, "reason", error)) or type(error).__name__
            except ValueError as error:
                raise ConfigError(f"reward.remote.url={url} is not a URL: {error}") from error
        raise RewardError(
            f"the reward model at {url} does not answer ({cause}; {self._settings.attempts} attempts of "
            f"{self._settings.timeout:g} s): start it, or raise reward.remote.timeout or .attempts"
        )


def _scores(reply: bytes, count: int, url: str) -> list[float]:
    try:
        scores = json.loads(reply)["scores"]
        if len(scores) == count and all(type(score) in (int, float) and math.isfinite(score) for score in scores):
            return [float(score) for score in scores]
    except (ValueError, KeyError, TypeError):
        pass
    raise RewardError(
        f'the reward model at {url} did not reply with {{"scores": [...]}} and {count} finite numbers in it: fix the server'
    )


@register_class("local_model")
class LocalModel(Reward):
    """The logit of a sequence classifier with one label, for prompt and response as one text. Weights must be safetensors."""

    def __init__(self, config: RewardConfig) -> None:
        """Check the path. The model itself is loaded with the first response.

        Raises:
            ModelError: there is no such model at `reward.local.path`.
        """
        self._settings = config.local
        self._model: Any = None
        path = Path(str(self._settings.path))
        if not (path / "config.json").is_file() or not list(path.glob("*.safetensors")):
            raise ModelError(f"reward.local.path={path} is not an HF model directory with safetensors weights")

    @torch.inference_mode()
    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """See `Reward`. A text longer than the model's positions is an error and is not truncated."""
        if self._model is None:
            self._load()
        texts = [rollout.prompt + rollout.response for rollout in rollouts]
        ids = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        for rollout, each in zip(rollouts, ids, strict=True):
            if len(each) > self._longest:
                raise RewardError(
                    f"prompt {rollout.prompt_id}: prompt and response have {len(each)} tokens, the reward model's limit is "
                    f"{self._longest}: lower rollout.max_response_tokens, or use another model"
                )
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))  # by length, for little padding
        scores = [0.0] * len(ids)
        for begin in range(0, len(order), self._batch_size):
            chosen = order[begin : begin + self._batch_size]
            batch = self._tokenizer.pad({"input_ids": [ids[i] for i in chosen]}, return_tensors="pt").to(device())
            logits = self._model(**batch).logits.float()[:, 0].tolist()
            if not all(map(math.isfinite, logits)):
                raise RewardError(f"the reward model {self._settings.path} returns scores that are not finite")
            for index, logit in zip(chosen, logits, strict=True):
                scores[index] = logit
        return scores

    def _load(self) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        path = self._settings.path
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(path)
            model = AutoModelForSequenceClassification.from_pretrained(
                path, use_safetensors=True, dtype=getattr(torch, self._settings.dtype)
            )
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"reward.local.path={path} cannot be loaded: {' '.join(str(error).split())}") from error
        if model.config.num_labels != 1:
            raise ModelError(f"reward.local.path={path} has {model.config.num_labels} labels: a reward model has one")
        self._longest = int(getattr(model.config, "max_position_embeddings", 1 << 30))
        # A decoder without a padding token cannot find the end of a padded text.
        padded = model.config.pad_token_id is not None and self._tokenizer.pad_token_id == model.config.pad_token_id
        self._batch_size = self._settings.batch_size if padded else 1
        if not padded:
            self._tokenizer.pad_token = self._tokenizer.pad_token or self._tokenizer.eos_token
        self._model = model.to(device()).eval()

    def close(self) -> None:
        """Free the model."""
        self._model = None
