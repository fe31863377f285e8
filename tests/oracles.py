"""Reference implementations: slow float64 loops in numpy, written from the definitions."""

import math

import numpy as np

# --- inputs ---


def ragged_mask(rng: np.random.Generator, B: int, R: int, *, holes: bool = False) -> np.ndarray:
    """Return a `[B, R]` bool mask with a full first row, one token in the last, the rest random.

    With `holes`, every other row also has masked entries inside.
    """
    lengths = rng.integers(1, R + 1, B)
    lengths[0], lengths[-1] = R, 1
    mask = np.arange(R) < lengths[:, None]
    return mask & ((rng.random((B, R)) < 0.6) | (np.arange(B)[:, None] % 2 == 0)) if holes else mask


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


# --- masked ---


def kept(x, mask) -> list[float]:
    return [float(a) for a, m in zip(np.ravel(x), np.ravel(mask), strict=True) if m]


def mean(x, mask, count=None) -> float:
    return sum(kept(x, mask)) / (max(len(kept(x, mask)), 1) if count is None else count)


def sequence_mean(x, mask, count=None) -> float:
    rows = [mean(a, m) for a, m in zip(x, mask, strict=True) if m.any()]
    return sum(rows) / (max(len(rows), 1) if count is None else count)


def var(x, mask, *, unbiased=False) -> float:
    entries, centre = kept(x, mask), mean(x, mask)
    return sum((a - centre) ** 2 for a in entries) / max(len(entries) - unbiased, 1)


def whiten(x, mask, *, shift_mean=True, unbiased=False, eps=1e-8) -> np.ndarray:
    centre, deviation = mean(x, mask), math.sqrt(var(x, mask, unbiased=unbiased) + eps)
    out = np.zeros(np.shape(x))
    for i in zip(*np.nonzero(mask), strict=True):
        out[i] = (float(x[i]) - centre) / deviation + (0 if shift_mean else centre)
    return out


# --- advantages ---


def gae(rewards, values, mask, gamma, lam, bootstrap_value=None) -> np.ndarray:
    """Compute `A_t = Σ_k (Π γ λ) δ_k` over real steps.

    A masked step has the advantage of the next real step.
    """
    B, R = rewards.shape
    gamma, lam = np.broadcast_to(gamma, (B, R)), np.broadcast_to(lam, (B, R))
    out = np.zeros((B, R))
    for b in range(B):
        real = [t for t in range(R) if mask[b, t]]
        after = 0.0 if bootstrap_value is None else float(bootstrap_value[b])
        values_tp1 = [float(values[b, t]) for t in real[1:]] + [after] * bool(real)
        delta = [
            float(rewards[b, t]) + gamma[b, t] * v - float(values[b, t])
            for t, v in zip(real, values_tp1, strict=True)
        ]
        for t in range(R):
            weight = 1.0
            for k, at in enumerate(real):
                if at >= t:
                    out[b, t] += weight * delta[k]
                    weight *= gamma[b, at] * lam[b, at]
    return out


def carried_values(values, mask, bootstrap_value=None) -> np.ndarray:
    """Give each masked step the value of the next real step."""
    out = np.array(values, np.float64)
    for b, t in np.argwhere(~np.asarray(mask)):
        later = [k for k in range(t + 1, out.shape[1]) if mask[b, k]]
        out[b, t] = (
            values[b, later[0]] if later else 0.0 if bootstrap_value is None else bootstrap_value[b]
        )
    return out


# --- kl, logprobs ---


def log_softmax(logits) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


def token_logprobs(logits, tokens, temperature=1.0) -> np.ndarray:
    logp = log_softmax(np.asarray(logits, np.float64) / temperature)
    return np.array(
        [row[a] for row, a in zip(logp.reshape(-1, logp.shape[-1]), np.ravel(tokens), strict=True)]
    ).reshape(np.shape(tokens))


def entropy(logits, temperature=1.0) -> np.ndarray:
    logp = log_softmax(np.asarray(logits, np.float64) / temperature)
    rows = [
        -sum(math.exp(a) * a for a in row if a > -math.inf)
        for row in logp.reshape(-1, logp.shape[-1])
    ]
    return np.array(rows).reshape(logp.shape[:-1])


def kl_full(logits, ref_logits, temperature=1.0) -> np.ndarray:
    logp, logq = (
        log_softmax(np.asarray(x, np.float64) / temperature) for x in (logits, ref_logits)
    )
    pairs = zip(logp.reshape(-1, logp.shape[-1]), logq.reshape(-1, logq.shape[-1]), strict=True)
    rows = [
        sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True) if a > -math.inf)
        for p, q in pairs
    ]
    return np.array(rows).reshape(logp.shape[:-1])


KL = {
    "k1": lambda p, q: p - q,
    "k2": lambda p, q: (p - q) ** 2 / 2,
    "k3": lambda p, q: np.exp(q - p) - 1 - (q - p),
    "abs": lambda p, q: abs(p - q),
}


# --- losses ---


def policy_terms(logprobs, old_logprobs, advantages, mask, *, clip_low, clip_high, dual_clip=None):
    """Return each token's loss and its derivative by the log-prob; both are 0 outside the mask."""
    loss, slope = np.zeros(mask.shape), np.zeros(mask.shape)
    for i in zip(*np.nonzero(mask), strict=True):
        ratio, advantage = (
            math.exp(float(logprobs[i]) - float(old_logprobs[i])),
            float(advantages[i]),
        )
        if advantage >= 0:
            clipped = ratio > 1 + clip_high
            loss[i] = -min(ratio, 1 + clip_high) * advantage
        else:
            clipped = ratio < 1 - clip_low
            loss[i] = -max(ratio, 1 - clip_low) * advantage
            if dual_clip is not None and ratio > dual_clip:
                clipped = True
                loss[i] = -dual_clip * advantage
        slope[i] = 0 if clipped else -ratio * advantage
    return loss, slope


def value_terms(values, old_values, returns, mask, *, clip):
    """Return each step's loss and its derivative by the value; both are 0 outside the mask."""
    loss, slope = np.zeros(mask.shape), np.zeros(mask.shape)
    for i in zip(*np.nonzero(mask), strict=True):
        v, old, target = float(values[i]), float(old_values[i]), float(returns[i])
        near = v if clip is None else min(max(v, old - clip), old + clip)
        far = (near - target) ** 2 > (v - target) ** 2
        loss[i] = 0.5 * max((v - target) ** 2, (near - target) ** 2)
        slope[i] = 0 if far else v - target
    return loss, slope


# --- rewards ---


def score_index(row, score_at: str) -> int:
    real = [t for t, m in enumerate(row) if m]
    last = real[-1] if real else None
    match score_at:
        case "last_token":
            return 0 if last is None else last
        case "after_last_token":
            return 0 if last is None else min(last + 1, len(row) - 1)
        case "last_index":
            return len(row) - 1
    raise ValueError(score_at)


def token_rewards(scores, kl, mask, *, kl_coef, score_at, token_scores=None) -> np.ndarray:
    out = np.zeros(mask.shape)
    for b, row in enumerate(mask):
        for t in range(len(row)):
            if row[t]:
                out[b, t] -= kl_coef * float(kl[b, t])
                out[b, t] += 0 if token_scores is None else float(token_scores[b, t])
        if any(row):
            out[b, score_index(row, score_at)] += float(scores[b])
    return out


def running_scale(batches, eps=1e-8) -> list[np.ndarray]:
    """Divide each batch by the deviation of all finite scores up to and including it."""
    seen, out = [], []
    for batch in batches:
        seen += [float(s) for s in batch if math.isfinite(s)]
        out.append(np.asarray(batch, np.float64) / math.sqrt(np.var(seen) + eps))
    return out


# --- sampling ---


def top_k(logits, k) -> np.ndarray:
    out = np.full(len(logits), -np.inf)
    for i in sorted(range(len(logits)), key=lambda i: -logits[i])[:k]:
        out[i] = logits[i]
    return out


def top_p(logits, p) -> np.ndarray:
    probs, out, mass = np.exp(log_softmax(logits)), np.full(len(logits), -np.inf), 0.0
    for i in sorted(range(len(logits)), key=lambda i: -logits[i]):
        if mass >= p:
            break
        out[i] = logits[i]
        mass += probs[i]
    return out


# --- attention ---


def attention(q, k, v, seen, weight, cap=None):
    """Return attention, and the gradients of `sum(weight * attention)` for q, k and v.

    Args:
      q: `[B, H, S, C]`; head `h` reads key head `h // (H / K)`.
      k: `[B, K, N, C]`.
      v: `[B, K, N, C]`.
      seen: `[B, S, N]` bool. The result of a query that sees nothing is 0.
      weight: `[B, H, S, C]`.
      cap: soft cap of the logits.
    """
    q, k, v, weight = (np.asarray(x, np.float64) for x in (q, k, v, weight))
    out, in_q, in_k, in_v = (np.zeros(x.shape) for x in (q, q, k, v))
    for b, h, s in np.ndindex(*q.shape[:3]):
        g, see = h // (q.shape[1] // k.shape[1]), np.flatnonzero(seen[b, s])
        if len(see) == 0:
            continue
        keys, values = k[b, g, see], v[b, g, see]
        raw = keys @ q[b, h, s]
        logits = raw if cap is None else cap * np.tanh(raw / cap)
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        out[b, h, s] = weights @ values
        slope = 1 if cap is None else 1 - np.tanh(raw / cap) ** 2
        of_weights = values @ weight[b, h, s]
        of_raw = weights * (of_weights - weights @ of_weights) * slope
        in_q[b, h, s] = of_raw @ keys
        in_k[b, g, see] += np.outer(of_raw, q[b, h, s])
        in_v[b, g, see] += np.outer(weights, weight[b, h, s])
    return out, in_q, in_k, in_v


def follow_reference(reference, policy, *, update, every, decay):
    """Return an array of the reference after an update: the same, or mixed with the policy's."""
    if update % every:
        return reference
    old, new = np.float64(reference), np.float64(policy)
    return (decay * old + (1 - decay) * new).astype(reference.dtype)
