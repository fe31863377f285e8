"""The stateful train loop, which carries a `PPOState` and writes the files of a run."""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from ppo_jax import data
from ppo_jax.distributed import compilation, placement, processes
from ppo_jax.errors import Fault, NonFiniteParametersError
from ppo_jax.ppo.own_functions import check_advantage_fn, own_name
from ppo_jax.ppo.state import PPOState
from ppo_jax.ppo.unread import check_loss_fn
from ppo_jax.reward_functions import RewardFn
from ppo_jax.run import faults
from ppo_jax.run.assembly import Learner
from ppo_jax.run.collection import Collection, Collector, compiled_steps
from ppo_jax.run.evaluation import Evaluation, evaluate
from ppo_jax.run.forks import Fork, start_from
from ppo_jax.run.logging import PAIRS, SKIPPED, measured
from ppo_jax.run.loop import Display, RunLoop
from ppo_jax.run.opening import claim_folder, open_run
from ppo_jax.run.parts import initial_reference
from ppo_jax.run.remote import Mirror
from ppo_jax.run.resume import start_config
from ppo_jax.run.schedule import Schedule, with_pending
from ppo_jax.run.settings import LoopConfig, Resume
from ppo_jax.types import AdvantageFn, LossFn, Rollout

_DISPLAY = Display(
    "PPO", "update", {"score": "objective/scores", "kl": "objective/kl", "eval": "eval/scores"}
)


class Trainer:
    """A train loop that fine-tunes a policy by PPO on prompts and a reward.

    Attributes:
      state: the current `PPOState`; `step` donates its arrays, which are then deleted.
      learner: what is trained.
      prompts: the prompts to train on.
      collector: collects batches; it holds the reference's and the frozen parameters.
      schedule: samples the responses of each update with the policy that `loop.staleness` says.
      checkpoints, log: the run's checkpoints, and its files of metrics, samples and faults.

    Example::

        learner = assemble(*load_model("gpt2"), PPOConfig(), critic="shared")
        prompts, reward = learner.encode(read_rows("prompts.txt")), TextReward(function)
        trainer = Trainer(learner, prompts, reward, out=Path("a"), loop=LoopConfig(updates=50))
        state = trainer.run()
    """

    def __init__(
        self,
        learner: Learner,
        prompts: data.Prompts,
        reward: RewardFn,
        *,
        out: Path,
        loop: LoopConfig,
        eval_prompts: data.Prompts | None = None,
        settings: Any = None,
        resume: Resume = "no",
        fork: Fork | None = None,
        mirror: Mirror | None = None,
        advantage_fn: AdvantageFn | None = None,
        loss_fn: LossFn | None = None,
    ):
        """Place the parameters on the devices and open the run's folder.

        Args:
          learner: what is trained, as `assemble` returns it.
          prompts: the prompts to train on.
          reward: scores responses, such as `TextReward(function)`.
          out: the run's folder.
          loop: the settings of the loop.
          eval_prompts: held-out prompts for evaluation.
          settings: a dataclass that is written to `config.json`; a resumed run must have the same.
          resume: "yes" resumes from the newest good checkpoint in `out`, "auto" does so if there is
            one, and "no" starts a new run in an empty folder.
          fork: the checkpoint of another run that a new run starts from; `resume` is then "no".
          mirror: keeps the folder in an object store; `out` is then `mirror.folder`.
          advantage_fn: replaces the estimator that `ppo.advantage` names.
          loss_fn: replaces the loss that `ppo.loss` names.

        Raises:
          SettingError: if the settings do not fit the devices or the run that is resumed, if one
            has no effect because `loss_fn` does not read it, or if `advantage_fn` fails or returns
            arrays of other shapes.
          ValueError: if the folder cannot be used, or the run in it cannot be resumed.
        """
        if eval_prompts is not None:  # padded to the same length, so that one program samples both
            longest = max(prompts.tokens.shape[1], eval_prompts.tokens.shape[1])
            prompts, eval_prompts = prompts.padded(longest), eval_prompts.padded(longest)
        self.learner, self.prompts, self.eval_prompts = learner, prompts, eval_prompts
        self.loop, self.out = loop, out
        agent, mesh = learner.agent, learner.mesh
        learner.check(prompts)
        _check_functions(learner, prompts.tokens.shape[1], advantage_fn, loss_fn)
        claim = claim_folder(out, resume)
        params, frozen, ref_params = (
            placement.place(tree, mesh)
            for tree in (learner.params, learner.frozen, learner.ref_params)
        )
        ref_params = initial_reference(params, frozen, ref_params)
        state = compilation.start_state(
            agent, params, jax.random.key(loop.seed), updates=loop.updates, mesh=mesh
        )
        config = start_config(
            learner,
            (params, frozen, ref_params),
            prompts,
            eval_prompts,
            reward,
            loop=loop,
            command=settings,
            functions={"advantage": advantage_fn, "loss": loss_fn},
        )
        start = with_pending(state, learner, prompts, frozen, loop.staleness)
        publish = (lambda: None) if mirror is None else mirror.push
        first = fork and partial(start_from, fork, config=config, updates=loop.updates)
        opened = open_run(out, start, config, loop, resume, first, publish)
        best_by = None if eval_prompts is None else ("eval/scores", True)
        self._run_loop = RunLoop(
            opened, claim, loop, display=_DISPLAY, best_by=best_by, publish=publish
        )
        self.state, self.checkpoints, self.log = opened.state, opened.checkpoints, opened.log
        steps = compiled_steps(learner, state, frozen, advantage_fn=advantage_fn, loss_fn=loss_fn)
        if state.reference is not None:  # No copy of the initial policy has to stay in memory.
            ref_params = None
            self.learner = learner = learner.without_params()
        self.collector = Collector(learner, steps, ref_params, frozen, reward, loop.faults)
        self.schedule = Schedule(self.collector, prompts, loop.seed, loop.staleness)

    def step(self) -> dict[str, float] | None:
        """Run one PPO iteration, which deletes the arrays of the `state` before it.

        Returns:
          Its metrics, or None if a fault made the run skip the update.

        Raises:
          Fault: if something went wrong and the settings say to stop.
          ValueError: if a later `Trainer` of this process has taken over the folder.
        """
        self._run_loop.check()
        start, config = time.perf_counter(), self.learner.agent.config
        state, update = self.state.replace(pending=()), int(self.state.update)
        rollouts = self.schedule.sample(self.state)
        batch = self.collector.collect(state, self.schedule.prompts_of(update), rollouts[0])
        try:
            scale = state.scale if config.scale_scores else None
            task_scores = self.collector.task_scores(batch, scale)
        except Fault as fault:
            self._skip(fault, rollouts[1:])
            return None
        scored = time.perf_counter()
        state, metrics = self.collector.steps.learn(
            state,
            batch.rollout,
            batch.scores,
            *placement.to_mesh(task_scores[:2], self.learner.mesh),
            frozen=self.collector.frozen,
        )
        self.state = state.replace(pending=rollouts[1:])
        numbers = {name: float(x) for name, x in jax.device_get(metrics).items()}
        numbers = measured(numbers, waits=update < config.critic.warmup_updates)
        end, tokens = time.perf_counter(), float(batch.host_rollout.response_mask.sum())
        numbers |= task_scores.part_means() | {
            **self.schedule.age(update),
            "time/rollout_s": batch.sampled_at - start,
            "time/reward_s": scored - batch.sampled_at,
            "time/update_s": end - scored,
            "perf/response_tokens_per_s": tokens / (end - start),
        }
        self.log.metrics(update, numbers)
        self.log.samples(update, batch.scored_rows(task_scores, self.loop.samples))
        self._check_learned(update, numbers, batch)
        return numbers

    def run(self, on_update: Callable[[dict[str, float]], None] | None = None) -> PPOState:
        """Run all updates, with their evaluations and checkpoints.

        Args:
          on_update: called with the metrics of each update.

        Returns:
          The final state.

        Raises:
          Fault: one that the settings do not skip, or if all steps were skipped.
          ValueError: as `step`.
          SystemExit: with the status `faults.STOPPED` after SIGTERM or SIGINT, once the update is
            done and a checkpoint is written.
        """
        self._run_loop.run(self, int(self.state.update), on_update)
        faults.report(self.out, self.loop.updates)
        faults.check_end(self.state)
        return self.state

    def save(self, *, wait: bool = True) -> None:
        """Write a checkpoint, unless no update has been made; `wait` as in `Checkpoints.save`."""
        self._run_loop.save(self.state, wait=wait)

    def evaluate(self, prompts: data.Prompts) -> Evaluation:
        """Evaluate the current policy on held-out prompts.

        Args:
          prompts: `n` prompts.

        Returns:
          The metrics `eval/*`, and the `n` responses with their scores.

        Raises:
          Fault: if the reward fails or a number is not finite.
        """
        return evaluate(self.collector, self.state, prompts, seed=self.loop.seed)

    def measure(self, update: int) -> dict[str, float]:
        """Evaluate on the held-out prompts after an update, and write the result.

        Args:
          update: the number of the update; -1 before the first one.

        Returns:
          The metrics `eval/*`.

        Raises:
          Fault: as `evaluate`, after a checkpoint.
        """
        assert self.eval_prompts is not None, "only a run with held-out prompts is evaluated"
        try:
            evaluation = self.evaluate(self.eval_prompts)
        except Fault as fault:
            self.save()
            when = f"after update {update}" if update >= 0 else "before the first update"
            message = f"In the evaluation {when}: {fault}"
            self.log.fault(update, fault.kind, message, fault.dump)
            raise fault.with_rows(fault.rows, message) from fault
        self.log.metrics(update, evaluation.metrics)
        self.log.evaluation(update, evaluation.rows(max(PAIRS, self.loop.samples)))
        return evaluation.metrics

    def _skip(self, fault: Fault, pending: tuple[Rollout, ...]) -> None:
        """Write the offending rows, then stop the run or count the update as skipped."""
        update = int(self.state.update)
        stop = getattr(self.loop.faults, fault.kind) == "stop"
        if stop:
            self.save()
        self.log.fault(update, fault.kind, str(fault), fault.dump)
        if stop:
            raise fault
        self._warn(update, fault)
        self.log.metrics(update, SKIPPED)
        self.state = self.state.replace(update=self.state.update + 1, pending=pending)

    def _check_learned(self, update: int, metrics: dict[str, float], batch: Collection) -> None:
        """Write a fault if a loss, gradient or parameter is not finite, and may stop the run."""
        try:
            faults.check_steps(metrics)
        except Fault as fault:
            self.log.fault(update, fault.kind, str(fault), batch.rows())
            parameters_lost = isinstance(fault, NonFiniteParametersError)
            stop = self.loop.faults.gradient == "stop"
            if stop and not parameters_lost:
                self.save()
            if stop or parameters_lost:
                raise
            self._warn(update, fault)

    def _warn(self, update: int, fault: Fault) -> None:
        if processes.is_first():
            tqdm.write(f"ppo-jax: Update {update}: {fault}", file=sys.stderr)


def _check_functions(
    learner: Learner,
    prompt_tokens: int,
    advantage_fn: AdvantageFn | None,
    loss_fn: LossFn | None,
) -> None:
    """Check the functions that replace methods of the settings."""
    config = learner.agent.config
    check_loss_fn(config, loss_fn)
    if advantage_fn is not None and not learner.pmap:  # There it may use the mapped axis.
        name = own_name("advantage_fn", advantage_fn)
        check_advantage_fn(advantage_fn, config, prompt_tokens=prompt_tokens, name=name)
