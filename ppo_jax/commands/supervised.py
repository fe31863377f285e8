"""`ppo-jax sft` and `ppo-jax reward`: the stages before PPO."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax import data
from ppo_jax.data.chat import conversation, end_of_turn, is_chat, joined, through_template
from ppo_jax.errors import SettingError, check_numbers
from ppo_jax.models import heads
from ppo_jax.models.io import pretrained, scorers
from ppo_jax.models.transformer import language_model
from ppo_jax.ppo import reward_model, sft
from ppo_jax.run.assembly import load_model
from ppo_jax.run.files import check_free, claim, write_json
from ppo_jax.run.serialize import plain

Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What supervised stages share."""

    model: str
    """Where to start: a folder or a Hugging Face id in safetensors, or a .gguf file."""
    data: Path
    """Training rows, one JSON object a line."""
    out: Path
    """Folder for the result."""
    eval_data: Path | None = None
    """Held-out rows; by default a tenth of the training rows is held out."""
    length: int = 128
    """Tokens that a row is cut to, and at most the model's positions."""
    epochs: int = 3
    """Passes over the rows."""
    batch_size: int = 16
    """Rows a step."""
    learning_rate: float = 5e-5
    """Peak of the cosine schedule."""
    weight_decay: float = 0.01
    """AdamW's decoupled decay."""
    seed: int = 0
    """Of the shuffles and of new parameters."""

    weight: ClassVar[Callable[..., float]] = staticmethod(
        sft.len_of_first
    )  # of a batch in the held-out loss

    def __post_init__(self):
        check_numbers(self)
        for name in ("length", "epochs", "batch_size", "learning_rate"):
            if not getattr(self, name) > 0:
                raise SettingError(f"{name} must be positive, not {getattr(self, name)}.")

    def split(self, columns: Sequence[str]) -> tuple[Rows, Rows]:
        """Rows to learn from and rows held out; both have the texts in `columns`."""
        rows = self.read(self.data, columns)
        if self.eval_data is not None:
            return rows, self.read(self.eval_data, columns)
        if len(rows) < 2:
            raise ValueError(
                f"{self.data} holds one row; one more is needed to be held out, or --eval-data."
            )
        order = np.random.default_rng(self.seed).permutation(len(rows))
        held = max(len(rows) // 10, 1)
        return [rows[i] for i in order[held:]], [rows[i] for i in order[:held]]

    def read(self, path: Path, columns: Sequence[str]) -> Rows:
        rows = data.read_rows(path, columns=columns)
        for i, row in enumerate(rows):
            for column in (*columns, "prompt"):
                if not (isinstance(row.get(column), str | None) or is_chat(row[column])):
                    says = f"needs a text or messages in its column {column!r}, not {row[column]!r:.60}."
                    raise ValueError(f"Row {i} of {path} {says}")
        return rows

    def fit(self, loss_fn, params, train: tuple[np.ndarray, ...], held: tuple[np.ndarray, ...]):
        """Trains, shows the loss on held-out rows after every epoch, and writes `summary.json`."""
        shown: list[tuple[float, float]] = []

        def show(epoch: int, loss: float, params) -> None:
            shown.append(
                sft.evaluate_loss(
                    loss_fn, params, held, batch_size=self.batch_size, weight=self.weight
                )
            )
            held_loss, accuracy = shown[-1]
            print(
                f"epoch {epoch + 1}: loss {loss:.4f}, held out: loss {held_loss:.4f}, accuracy {accuracy:.3f}",
                flush=True,
            )

        params = sft.fit(
            loss_fn,
            params,
            train,
            seed=self.seed,
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            on_epoch=show,
        )
        claim(self.out)
        write_json(
            self.out / "summary.json", {"eval/loss": shown[-1][0], "eval/accuracy": shown[-1][1]}
        )
        write_json(self.out / "run.json", plain(self))
        return params


@dataclass(frozen=True, kw_only=True)
class SFT(Fit):
    """Supervised fine-tuning on rows {"prompt": ..., "response": ...}; only the response is learned. Without a prompt, all is.

    A prompt of messages goes through the tokenizer's chat template, and the end of a turn closes its response."""

    weight: ClassVar[Callable[..., float]] = staticmethod(sft.learned_tokens)

    def run(self) -> None:
        check_free(self.out)
        policy, tokenizer = load_model(self.model)
        length = min(self.length, policy.config.positions)
        train, held = (self.encode(rows, tokenizer, length) for rows in self.split(("response",)))
        data.check_ids(np.concatenate([train[0], held[0]]), policy.config.vocab_size)
        model = language_model(policy.config)
        params = self.fit(
            lambda p, *batch: sft.sft_loss(model, p, *batch), policy.params, train, held
        )
        pretrained.save_policy(self.out, policy._replace(params=params), tokenizer)

    def encode(self, rows: Rows, tokenizer: Any, length: int) -> tuple[np.ndarray, ...]:
        """Tokens, mask and the mask of what is learned, `[n, length]` each; only a text that begins a row has an opening mark."""
        end = tuple(i for i in [data.end_id(tokenizer)] if i is not None)
        turn = end_of_turn(tokenizer) or end
        part = lambda text, **options: data.encode_text(tokenizer, text, closed=False, **options)
        prompts, responses = [], []
        for row in rows:
            prompt, response = _last_turn(row)
            told = is_chat(prompt)
            prompt = through_template({"prompt": prompt}, tokenizer)["prompt"] if told else prompt
            prompts.append(part(prompt, add_special_tokens=not told) if prompt else [])
            responses.append(
                [*part(response, add_special_tokens=not prompts[-1]), *(turn if told else end)]
            )
        ids = [(p + r)[:length] for p, r in zip(prompts, responses, strict=True)]
        tokens, mask = data.pad(ids, length=length, pad_id=0, left=False)
        return (
            tokens,
            mask,
            mask & (np.arange(length)[None] >= np.array([[len(p)] for p in prompts])),
        )


def _last_turn(row: dict[str, Any]) -> tuple[Any, str]:
    """What is read and what is learned; of a response in messages the last, behind those before it."""
    said = joined(row.get("prompt"), row["response"])
    if said is None:
        return row.get("prompt"), row["response"]
    prompt, response = said[:-1] or row.get("prompt"), said[-1]["content"]
    if not isinstance(response, str):
        raise ValueError(
            f"A response's last message needs a text as its content, not {response!r:.60}."
        )
    return prompt, response


@dataclass(frozen=True, kw_only=True)
class Reward(Fit):
    """A reward model from pairs or from scores. Rows may hold a "prompt", which is read before the answer.

    Prompts and answers may be messages, which go through the tokenizer's chat template."""

    learn_from: Literal["pairs", "scores", "classes"] = "pairs"
    """pairs: rows {"chosen": ..., "rejected": ...}, Bradley-Terry loss; scores: rows {"response": ..., "score": number}, squared
    error; classes: rows {"response": ..., "score": 0, 1, 2, ...} in order, ordinal loss."""
    columns: ClassVar = {
        "pairs": ("chosen", "rejected"),
        "scores": ("response",),
        "classes": ("response",),
    }

    def run(self) -> None:
        check_free(self.out)
        start, tokenizer = (
            scorers.start_scorer(self.model, jax.random.key(self.seed)),
            pretrained.load_tokenizer(self.model),
        )
        pretrained.check_tokenizer(tokenizer, start.config)
        rows, held_rows = self.split(self.columns[self.learn_from])
        length = min(self.length, start.config.positions)
        train, held = (self.encode(part, tokenizer, length) for part in (rows, held_rows))
        for tokens in (
            x for part in (train, held) for x in part if x.dtype == np.int32 and x.ndim == 2
        ):
            data.check_ids(tokens, start.config.vocab_size)
        params = dict(start.params)
        if self.learn_from == "classes":
            params["thresholds"] = _first_thresholds(np.concatenate([train[-1], held[-1]]))
        params = self.fit(self.loss(heads.reward_model(start.config)), params, train, held)
        scorers.save_scorer(
            self.out,
            start._replace(params={"trunk": params["trunk"], "head": params["head"]}),
            tokenizer,
        )

    def loss(self, score: Callable) -> Callable:
        """The loss of a batch as `encode` gives it, and its accuracy."""
        match self.learn_from:
            case "pairs":
                return lambda p, a, a_mask, b, b_mask: reward_model.bradley_terry_loss(
                    score(p, a, a_mask), score(p, b, b_mask)
                )
            case "scores":
                return lambda p, tokens, mask, target: reward_model.regression_loss(
                    score(p, tokens, mask), target
                )
            case "classes":
                return lambda p, tokens, mask, label: reward_model.ordinal_loss(
                    score(p, tokens, mask), label, p["thresholds"]
                )

    def encode(self, rows: Rows, tokenizer: Any, length: int) -> tuple[np.ndarray, ...]:
        """Tokens and mask of each text column, `[n, length]`, and the scores, `[n]`, unless the rows are pairs."""
        arrays = []
        for column in self.columns[self.learn_from]:
            ids = []
            for row in rows:
                told = conversation(row.get("prompt"), row[column], tokenizer)
                text = (row.get("prompt") or "") + row[column] if told is None else told
                ids.append(
                    data.encode_text(tokenizer, text, closed=True, add_special_tokens=told is None)[
                        :length
                    ]
                )
            if not all(ids):
                raise ValueError(
                    f"Row {[bool(i) for i in ids].index(False)} has no text in {column!r}."
                )
            arrays += data.pad(ids, length=length, pad_id=0, left=False)
        if self.learn_from == "pairs":
            return tuple(arrays)
        whole = self.learn_from == "classes"
        scores = [row.get("score") for row in rows]
        for i, score in enumerate(scores):
            ok = (
                isinstance(score, int | float)
                and np.isfinite(score)
                and (not whole or (score >= 0 and score == int(score)))
            )
            if not ok:
                raise ValueError(
                    f"Row {i} needs a {'class 0, 1, 2, ...' if whole else 'number'} in 'score', not {score!r}."
                )
        return (*arrays, np.asarray(scores, np.int32 if whole else np.float32))


def _first_thresholds(classes: np.ndarray) -> jax.Array:
    """Between each two of the classes `0 .. K`, from their shares: the logits of `P(class <= k)`."""
    count = np.bincount(classes)
    if len(count) < 2:
        raise ValueError("The scores hold a single class; an ordinal loss needs two.")
    share = np.clip(np.cumsum(count)[:-1] / count.sum(), 0.01, 0.99)
    return jnp.asarray(np.log(share / (1 - share)), jnp.float32)
