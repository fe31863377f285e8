"""The stateful edge: a small loop that carries a `PPOState`, calls the reward on the host, and writes the run's folder."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from ppo_jax import data, errors
from ppo_jax.distributed import compilation, meshes, placement, processes, replicas
from ppo_jax.errors import Fault, SettingError
from ppo_jax.ppo.iteration import Agent, PPOState
from ppo_jax.reward_functions import RewardFn, TaskScores
from ppo_jax.run import faults
from ppo_jax.run.checkpoints import Checkpoints
from ppo_jax.run.files import check_free, claim, cut_back, lock, read_lines
from ppo_jax.run.logging import SKIPPED, NoLog, RunLog
from ppo_jax.run.resume import check_unchanged, start_config
from ppo_jax.run.settings import LoopConfig
from ppo_jax.types import LossFn, Params, Rollout

Resume = Literal["no", "yes", "auto"]


class Trainer:
    """PPO on prompts and a reward.

    Example (also in the README)::

        trainer = Trainer(agent, params, tokenizer, prompts, reward, out=Path("runs/mine"), loop=LoopConfig(updates=50))
        state = trainer.run()
    """

    def __init__(
        self,
        agent: Agent,
        params: Params,
        tokenizer: Any,
        prompts: data.Prompts,
        reward: RewardFn,
        *,
        out: Path,
        loop: LoopConfig,
        eval_prompts: data.Prompts | None = None,
        ref_params: Params | None = None,
        frozen: Params | None = None,
        settings: Any = None,
        resume: Resume = "no",
        mesh: Mesh | None = None,
        pmap: bool = False,
        loss_fn: LossFn | None = None,
    ):
        """Learns `params`, `{"policy": ..., "critic": ...}`, over the `frozen` ones if there are any.

        The reference, unless given, is the policy that does not train; without one, the policy as it comes. `resume` goes on from
        the folder's newest good checkpoint: "yes" needs one, "auto" starts afresh where there is none. `mesh`, of
        `meshes.make_mesh`, spreads rows and parameters over devices; `pmap` runs replicas on all of them instead. `loss_fn`
        stands in for PPO's loss.
        """
        if eval_prompts is not None:  # of one length, so that one program samples both
            longest = max(prompts.tokens.shape[1], eval_prompts.tokens.shape[1])
            prompts, eval_prompts = prompts.padded(longest), eval_prompts.padded(longest)
        self.agent, self.tokenizer, self.prompts, self.reward, self.loop = (
            agent,
            tokenizer,
            prompts,
            reward,
            loop,
        )
        self.eval_prompts, self.mesh = eval_prompts, mesh
        meshes.check_rows(
            agent.config, jax.local_device_count() if pmap else meshes.devices_of_rows(mesh)
        )
        self.out, self._lock = out, None
        processes.first_does(lambda: self._claim(resume != "no"))
        if processes.any_process(not out.is_dir()):
            raise ValueError(
                f"{out} is not there for all processes; they need one folder that each of them sees."
            )
        params, frozen, ref_params = (
            placement.place(tree, mesh) for tree in (params, frozen, ref_params)
        )
        if ref_params is None:
            ref_params = (frozen or {}).get("policy") or params["policy"]
        self.ref_params, self.frozen = ref_params, frozen
        self.state = compilation.start_state(
            agent, params, jax.random.key(loop.seed), updates=loop.updates, mesh=mesh
        )
        config = start_config(
            agent,
            loop,
            settings,
            (params, frozen, ref_params),
            tokenizer,
            prompts,
            eval_prompts,
            reward,
            loss_fn,
        )
        processes.check_same({f"The hash of the {name}": x for name, x in config.hashes.items()})
        self.checkpoints = Checkpoints(out / "checkpoints", keep=loop.keep)
        about: dict[str, Any] = {}
        if resume == "yes" and not self.checkpoints.were_any():
            raise ValueError(
                f"{out} holds no checkpoint to go on from; --resume auto or no starts a run."
            )
        if resume != "no" and self.checkpoints.were_any():
            check_unchanged(out, config)
            self.state, about = self.checkpoints.restore(self.state)
        self._unevaluated = about.get("unevaluated", False)
        self._best: tuple[float, int] | None = about.get("best") and tuple(
            about["best"]
        )  # score of an evaluation, updates done
        update = int(self.state.update)
        if update > loop.updates:
            raise SettingError(
                f"The run in {out} has {update} updates behind it already; updates={loop.updates} is fewer."
            )
        processes.first_does(
            lambda: (cut_back(out, about.get("sizes", {})), config.write(out, first_update=update))
        )
        board, project = loop.tensorboard, loop.wandb_project
        self.log = (
            RunLog(out, tensorboard=board, wandb_project=project, first_update=update)
            if processes.is_first()
            else NoLog()
        )
        self._steps = (
            replicas.pmap_steps(agent, loss_fn=loss_fn)
            if pmap
            else compilation.jit_steps(agent, mesh, self.state, loss_fn=loss_fn)
        )

    def _claim(self, resume: bool) -> None:
        self._lock = lock(claim(self.out, resume=resume))
        check_free(self.out, resume=resume)  # again: another process may have come and gone

    def step(self) -> dict[str, float] | None:
        """One PPO iteration; its metrics as numbers, or None if a fault made it skip."""
        start, c = time.perf_counter(), self.agent.config
        update = int(self.state.update)
        batch = self.prompts.take(
            data.batch_rows(len(self.prompts), c.batch_size, update, seed=self.loop.seed)
        )
        rollout, seen = self._sample(self.state, batch)
        sampled = time.perf_counter()
        scores = self._steps.score(
            self.state, self.ref_params, rollout, frozen=self.frozen
        )  # runs while the host makes the reward
        try:
            task_scores = self._ask(seen, batch)
            if c.scale_scores:
                faults.check_scale(self.state.scale, task_scores.response)
            faults.check_finite(seen, placement.to_host(scores))
        except Fault as fault:
            return self._skip(fault, seen, batch)
        scored = time.perf_counter()
        given = placement.to_mesh(task_scores, self.mesh)
        self.state, metrics = self._steps.learn(
            self.state, rollout, scores, *given, frozen=self.frozen
        )
        total = task_scores.total(seen.response_mask)  # this, too, while the device learns
        samples = [
            {**row, "score": float(x)}
            for row, x in zip(self.rows(seen, batch, self.loop.samples), total, strict=False)
        ]
        numbers = {name: float(x) for name, x in jax.device_get(metrics).items()}
        end = time.perf_counter()
        numbers |= {
            "time/rollout_s": sampled - start,
            "time/reward_s": scored - sampled,
            "time/update_s": end - scored,
            "perf/response_tokens_per_s": float(seen.response_mask.sum()) / (end - start),
        }
        self.log.metrics(update, numbers)
        self.log.samples(update, samples)
        try:
            faults.check_steps(numbers)
        except Fault as fault:
            self.log.fault(update, fault.kind, str(fault), self.rows(seen, batch))
            spoilt = isinstance(fault, errors.SpoiltError)
            if self.loop.faults.gradient == "stop" and not spoilt:
                self.save()
            if self.loop.faults.gradient == "stop" or spoilt:
                raise
            self._warn(update, fault)
        return numbers

    def run(self, on_update: Callable[[dict[str, float]], None] | None = None) -> PPOState:
        """All updates, with evaluations and checkpoints; the final state. `on_update` is called with each one's metrics.

        Raises:
          Fault: one that the settings do not skip, or if all steps were skipped.
          SystemExit: with the status `faults.STOPPED`, after SIGTERM or SIGINT, when the update is done and a checkpoint written.
        """
        loop, done = self.loop, int(self.state.update)
        hide = (
            None if loop.progress and processes.is_first() else True
        )  # None hides the bar where there is no terminal
        due = lambda every, update: (
            update + 1 == loop.updates or (every and (update + 1) % every == 0)
        )
        try:
            bar = tqdm(
                range(done, loop.updates),
                initial=done,
                total=loop.updates,
                disable=hide,
                desc="PPO",
            )
            with faults.StopSignals() as signals, bar:
                self._evaluate(done - 1)  # that a fault put an end to
                for update in bar:
                    m = self.step()
                    if m is not None:
                        if on_update is not None:
                            on_update(m)
                        self._show(bar, update, m)
                    self._unevaluated = self.eval_prompts is not None and due(
                        loop.eval_every, update
                    )
                    is_best = self._evaluate(update)
                    stop = processes.any_process(signals.received is not None)
                    if due(loop.save_every, update) or is_best or stop:
                        self.save()
                    if stop and update + 1 < loop.updates:
                        processes.say(
                            f"Stopped by a signal after {update + 1} updates; --resume auto goes on from there."
                        )
                        raise SystemExit(faults.STOPPED)
        finally:
            self.checkpoints.close()
            self.log.close()
            if self._lock is not None:
                self._lock.release()
        self._check_end()
        return self.state

    def _show(self, bar: tqdm, update: int, m: dict[str, float]) -> None:
        """On the bar; as a line, where there is no terminal."""
        names = {
            "score": "objective/scores",
            "kl": "objective/kl",
            "clip": "policy/clipfrac",
            "ev": "value/explained_variance",
        }
        text = ", ".join(f"{short}={m[name]:.3g}" for short, name in names.items())
        bar.set_postfix_str(text)
        if bar.disable and self.loop.progress and processes.is_first():
            print(
                f"update {update + 1} of {self.loop.updates}: {text}", file=sys.stderr, flush=True
            )

    def save(self) -> None:
        """A checkpoint of everything that the run needs to go on as if it had never stopped; none before the first update."""
        if int(self.state.update) == 0:
            return
        about = {"sizes": self.log.sizes(), "unevaluated": self._unevaluated, "best": self._best}
        self.checkpoints.save(self.state, about, best=self._best and self._best[1])

    def _evaluate(self, update: int) -> bool:
        """Scores held-out prompts after `update`, if that is still to be done, and says whether no earlier score was as good.

        A fault ends the run, after a checkpoint.
        """
        if not self._unevaluated:
            return False
        try:
            found = self.evaluate(self.eval_prompts)[0]
        except Fault as fault:
            self.save()
            fault.args = (f"In the evaluation after update {update}: {fault}",)
            self.log.fault(update, fault.kind, str(fault), fault.dump)
            raise
        self._unevaluated = False
        self.log.metrics(update, found)
        is_best = self._best is None or found["eval/scores"] > self._best[0]
        if is_best:
            self._best = (found["eval/scores"], update + 1)
        return is_best

    def rows(
        self, seen: Rollout, batch: data.Prompts, count: int | None = None
    ) -> list[dict[str, Any]]:
        """Prompt, response and the response's tokens, of the first `count` rows of a rollout on the host."""
        seen = jax.tree.map(lambda x: x[:count], seen)
        return [
            {"prompt": prompt, "response": response, "tokens": ids[real].tolist()}
            for prompt, response, ids, real in zip(
                batch.texts[:count],
                self.texts(seen),
                seen.responses,
                seen.response_mask,
                strict=True,
            )
        ]

    def _sample(self, state: PPOState, batch: data.Prompts) -> tuple[Rollout, Rollout]:
        """A rollout where it was made, and on the host."""
        prompts = placement.to_mesh((batch.tokens, batch.mask), self.mesh)
        rollout = self._steps.sample(state, *prompts, frozen=self.frozen)
        return rollout, placement.to_host(rollout)

    def _ask(self, seen: Rollout, batch: data.Prompts) -> TaskScores:
        """Scores of all rows. Each process asks for those of its own rows; a fault in one is a fault in all."""
        limits, here = self.loop.faults, placement.rows_here(self.mesh, len(batch))
        own, fault, scores = jax.tree.map(lambda x: x[here], seen), None, None
        ask = lambda: self.reward(own, batch.take(here), self.texts(own))
        try:
            scores = faults.persist(
                ask, retries=limits.reward_retries, timeout_s=limits.reward_timeout_s
            )
        except Fault as error:
            fault, error.rows = error, tuple(int(here[i]) for i in error.rows)
        processes.agree(fault)
        return placement.join_rows_here(scores, self.mesh, len(batch))

    def _skip(self, fault: Fault, seen: Rollout, batch: data.Prompts) -> None:
        """Writes the offending rows; then ends the run after a checkpoint, or counts the update as done with nothing learned."""
        update = int(self.state.update)
        if getattr(self.loop.faults, fault.kind) == "stop":
            self.save()
        self.log.fault(update, fault.kind, str(fault), self._offending(fault, seen, batch))
        if getattr(self.loop.faults, fault.kind) == "stop":
            raise fault
        self._warn(update, fault)
        self.log.metrics(update, SKIPPED)
        self.state = self.state.replace(update=self.state.update + 1)

    def _offending(self, fault: Fault, seen: Rollout, batch: data.Prompts) -> list[dict[str, Any]]:
        rows = self.rows(seen, batch)
        return [rows[i] for i in fault.rows] or rows

    def _warn(self, update: int, fault: Fault) -> None:
        if processes.is_first():
            tqdm.write(f"ppo-jax: Update {update}: {fault}", file=sys.stderr)

    def _check_end(self) -> None:
        """Says how many updates had faults; raises one if nothing was learned."""
        if processes.is_first() and (
            faulty := {row["update"] for row in read_lines(self.out / "faults.jsonl")}
        ):
            where = self.out / "faults.jsonl"
            print(
                f"ppo-jax: {len(faulty)} of {self.loop.updates} updates had faults; see {where}.",
                file=sys.stderr,
            )
        faults.check_end(self.state.train)

    def evaluate(self, prompts: data.Prompts) -> tuple[dict[str, float], list[str]]:
        """Samples a response to each held-out prompt with a key of its own, the same at every evaluation."""
        state = self.state.replace(key=jax.random.key(self.loop.seed + 1))
        size, responses, scores, lengths, kls = self.agent.config.batch_size, [], [], [], []
        for first in range(0, len(prompts), size):
            rows = np.arange(first, first + size) % len(
                prompts
            )  # the last batch is filled up, so one shape is compiled
            keep = min(size, len(prompts) - first)
            batch = prompts.take(rows)
            state = placement.place(state.replace(update=jax.numpy.int32(first // size)), self.mesh)
            rollout, seen = self._sample(state, batch)
            said = placement.to_host(
                self._steps.score(state, self.ref_params, rollout, frozen=self.frozen)
            )
            try:
                scores.extend(self._ask(seen, batch).total(seen.response_mask)[:keep])
                faults.check_finite(seen, said)
            except Fault as fault:
                fault.dump = self._offending(fault, seen, batch)
                raise
            responses.extend(self.texts(seen)[:keep])
            lengths.extend(seen.response_mask.sum(axis=1)[:keep])
            kls.extend((said.logprobs - said.ref_logprobs).sum(axis=1)[:keep])
        means = {"eval/scores": scores, "eval/length_mean": lengths, "eval/kl": kls}
        return {name: float(np.mean(x, dtype=np.float64)) for name, x in means.items()}, responses

    def texts(self, rollout: Rollout) -> list[str]:
        """The responses as texts, cut after the first end token; each as it reads behind its prompt."""
        tokens, mask, P = (
            np.asarray(rollout.responses),
            np.asarray(rollout.response_mask),
            rollout.prompt_length,
        )
        late = np.arange(tokens.shape[1]) >= self.agent.config.truncate_after
        ends = np.isin(tokens, self.agent.stop_ids) & mask & late[None, :]
        kept = np.concatenate(
            [np.asarray(rollout.mask)[:, :P], mask & (np.cumsum(ends, axis=1) - ends == 0)], axis=1
        )
        return data.decode(self.tokenizer, rollout.tokens, kept, start=P)
