"""verify: the dense and the patched model side by side on the user's own prompt."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fierpatch.cache import LayerCache
from fierpatch.config import FierConfig
from fierpatch.errors import ConfigError, PromptError, TokenizerError
from fierpatch.evaluate.metrics import logit_kl
from fierpatch.hf.cache import FierCache
from fierpatch.hf.decoding import Bookmark, eos_token_ids, next_logits
from fierpatch.hf.support import max_positions, unwrap
from fierpatch.ops import attention_mass
from fierpatch.patching import Handle, apply, current_handle
from fierpatch.report import Report, describe


@dataclass(frozen=True)
class Verification:
    """How the patched model's decode steps compare with dense ones; printing it gives a summary.

    Attributes:
        tokens: tokens of the prompt, of the longest one in a batch.
        config: the settings compared, with `compile` left out.
        report: what the last patched step reads and what is held, by layer.
        tokens_attended: the most that any did attend; 0 where no layer is sparse.
        token_agreement: share of decode steps whose best token is that of the dense model.
        kl: mean of ``KL(dense || patched)`` of the next token over decode steps, nats.
        max_kl: the largest of them.
        attention_mass: for each sparse layer the share of the exact attention weight that falls on
            the attended tokens, mean over query heads and steps.
        step_agreement: share of the rows that agree, for each step.
        step_kl: mean KL over the rows, nats, for each step.
    """

    tokens: int
    config: FierConfig
    report: Report
    tokens_attended: int
    token_agreement: float
    kl: float
    max_kl: float
    attention_mass: dict[int, float]
    step_agreement: tuple[float, ...]
    step_kl: tuple[float, ...]

    @property
    def budget(self) -> int:
        """Tokens that a KV head and step may attend."""
        return self.config.budget

    def __str__(self) -> str:
        lines = [
            f"{len(self.step_kl)} decode steps after {self.tokens} tokens, "
            f"{self.tokens_attended} attended (budget {self.budget})",
            f"selected by      {describe(self.config)}",
            f"bytes read       {self.report.reading}",
            f"token agreement  {self.token_agreement:.1%}",
            f"KL               {self.kl:.4f} nats a token, at most {self.max_kl:.4f}",
        ]
        if self.attention_mass:
            least = min(self.attention_mass, key=lambda number: self.attention_mass[number])
            mean = sum(self.attention_mass.values()) / len(self.attention_mass)
            lines.append(
                f"attention mass   {mean:.3f} mean of {len(self.attention_mass)} sparse layers, "
                f"least {self.attention_mass[least]:.3f} (layer {least})"
            )
        else:
            lines.append("attention mass   no layer is sparse: every step was dense")
        return "\n".join(lines)


def verify(
    model: Any,
    tokenizer: Any,
    prompt: str | list[str],
    *,
    max_new_tokens: int = 32,
    config: FierConfig | None = None,
    **options: Any,
) -> Verification:
    """Compare decode through retrieval with dense decode on a prompt of your own.

    The dense model continues the prompt greedily; the patched one then reads the same continuation,
    token by token, and each of its predictions is set against the dense one. The prompt is read
    once, for both: with ``prefill="sparse"`` both start from a sparse prefill. The model is left as
    it was found, patched or not, whatever happens.

    Args:
        model: as in `apply`. Where it is patched, the settings of that patch are the defaults.
        tokenizer: the model's.
        prompt: one text or a batch of them, tokenized as they are, without a chat template.
        max_new_tokens: decode steps. A row that ends its text earlier counts no further.
        config: the settings; None means those of the patch, or ``FierConfig(**options)``.
        **options: fields of `FierConfig`, which override.

    Raises:
        ConfigError: a bad option.
        ModelError: the model cannot be patched.
        PromptError: a prompt is empty, or has no room in the model's positions.
        TokenizerError: the texts differ in length and the tokenizer has no padding token, or it
            gives tokens that the model does not know.

    Example:
        >>> print(fierpatch.verify(model, tokenizer, open("report.txt").read(), budget=512))
    """
    _check_steps(max_new_tokens)
    inner = unwrap(model)
    current = current_handle(inner)
    if config is None and current is not None:
        config = current.config
    settings = FierConfig.from_dict(options) if config is None else config.replace(**options)
    rows = _encode(inner, tokenizer, prompt, max_new_tokens)
    input_ids, mask = (tensor.to(inner.device) for tensor in _left_padded(rows, tokenizer))
    with (
        torch.no_grad(),
        nullcontext() if current is None else current.disabled(),
        # A compiled step gives the same numbers, and is not worth its compilation here.
        apply(inner, settings.replace(compile=False)) as handle,
    ):
        return _compare(handle, input_ids, mask, max_new_tokens)


def _compare(
    handle: Handle, input_ids: Tensor, prompt_mask: Tensor, num_steps: int
) -> Verification:
    model, settings = handle.model, handle.config
    cache = FierCache(model.config, settings)
    batch_size, length = input_ids.shape
    mask = torch.cat((prompt_mask, prompt_mask.new_ones((batch_size, num_steps))), dim=1)

    def step(number: int, token: Tensor) -> Tensor:
        return next_logits(model, token[:, None], mask[:, : length + number + 1], cache)

    # A prompt short enough for retrieval is read densely for a dense reference.
    is_short = length <= settings.max_query_length
    with handle.disabled() if is_short else nullcontext():
        logits = next_logits(model, input_ids, prompt_mask, cache)
    bookmark = Bookmark(cache)
    eos = eos_token_ids(model)
    is_open = torch.ones(batch_size, dtype=torch.bool, device=input_ids.device)
    tokens: list[Tensor] = []
    dense: list[Tensor] = []
    open_rows: list[Tensor] = []
    with handle.disabled():
        while len(tokens) < num_steps and is_open.any():
            tokens.append(logits.argmax(-1).to(input_ids.device))
            open_rows.append(is_open)
            logits = step(len(tokens) - 1, tokens[-1])
            dense.append(logits)
            is_open = is_open & ~torch.isin(tokens[-1], eos)
    bookmark.restore()
    meter = _MassMeter(cache)
    cache.observe(meter)
    kl: list[list[float]] = []
    agrees: list[list[float]] = []
    for number, (token, expected, is_open) in enumerate(zip(tokens, dense, open_rows, strict=True)):
        meter.open_rows = is_open
        given = step(number, token)
        rows = is_open.nonzero().flatten().tolist()
        kl.append([logit_kl(expected[row], given[row]) for row in rows])
        agrees.append((expected.argmax(-1) == given.argmax(-1))[rows].tolist())
    return Verification(
        tokens=int(prompt_mask.sum(-1).max()),
        config=settings,
        report=handle.report(cache),
        tokens_attended=meter.tokens_attended,
        token_agreement=_mean([agree for step_agrees in agrees for agree in step_agrees]),
        kl=_mean([nats for step_kl in kl for nats in step_kl]),
        max_kl=max(nats for step_kl in kl for nats in step_kl),
        attention_mass=meter.means(),
        step_agreement=tuple(_mean(step_agrees) for step_agrees in agrees),
        step_kl=tuple(_mean(step_kl) for step_kl in kl),
    )


class _MassMeter:
    """An observer that sums attention mass by layer, over the rows that are still open."""

    def __init__(self, cache: FierCache) -> None:
        self.open_rows: Tensor | None = None
        self.tokens_attended = 0
        self._numbers = {store: number for number, store in cache.stores.items()}
        self._masses: dict[int, list[Tensor]] = {}

    def __call__(
        self,
        layer: LayerCache,
        query: Tensor,
        token_indices: Tensor,
        visible: Tensor | None,
        scale: float,
        softcap: float,
    ) -> None:
        assert self.open_rows is not None
        length = layer.num_tokens
        mass = attention_mass(
            query,
            layer.keys[:, :, :length],
            token_indices,
            scale=scale,
            softcap=softcap,
            visible=None if visible is None else visible[..., :length],
        )  # [B, Hq, 1]
        rows = self.open_rows.to(mass.device)
        self._masses.setdefault(self._numbers[layer], []).append(mass[rows].mean((1, 2)))
        attended = (token_indices[rows] >= 0).sum(-1).max()
        self.tokens_attended = max(self.tokens_attended, int(attended))

    def means(self) -> dict[int, float]:
        """Mean attention mass of each layer that was observed."""
        return {
            number: float(torch.cat(masses).double().mean())
            for number, masses in sorted(self._masses.items())
        }


def _check_steps(max_new_tokens: object) -> None:
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens!r} must be a positive integer")


def _texts(prompt: object) -> list[str]:
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise PromptError(f"the prompt is a {type(prompt).__name__}: give a str or a list of str")
    return texts


def _encode(
    model: Any, tokenizer: Any, prompt: str | list[str], max_new_tokens: int
) -> list[list[int]]:
    """Token ids of every prompt, checked against the model."""
    rows = [list(tokenizer.encode(text, verbose=False)) if text else [] for text in _texts(prompt)]
    if not all(rows) or not rows:
        raise PromptError("the prompt is empty: give a text of at least one token")
    limit = max_positions(model.config.get_text_config(decoder=True))
    longest = max(map(len, rows))
    if limit is not None and longest + max_new_tokens > limit:
        raise PromptError(
            f"the prompt has {longest} tokens, which with max_new_tokens={max_new_tokens} is past "
            f"the model's {limit} positions: shorten the prompt or lower max_new_tokens"
        )
    num_known = model.get_input_embeddings().num_embeddings
    highest = max(map(max, rows))
    if highest >= num_known:
        raise TokenizerError(
            f"the tokenizer gave token {highest} and the model knows {num_known}: load the "
            "tokenizer that belongs to the model"
        )
    return rows


def _left_padded(rows: list[list[int]], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Token ids ``[B, T]`` and their mask, 0 for padding."""
    longest = max(map(len, rows))
    padding = getattr(tokenizer, "pad_token_id", None)
    if padding is None:
        if min(map(len, rows)) < longest:
            raise TokenizerError(
                "the prompts differ in length and the tokenizer has no padding token: set "
                "tokenizer.pad_token = tokenizer.eos_token, or verify them one by one"
            )
        padding = 0
    ids = [[padding] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)
