"""The only training loop."""

import logging
import math
import time
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trainers.batch import Batch, Stream, example_rng
from trainers.checkpoint import load_checkpoint, save_checkpoint
from trainers.efficiency import attention_by, check_attention, check_precision, checkpoint_activations, compile_blocks
from trainers.errors import CheckpointError, ConfigError, NonFiniteError, StoppedError
from trainers.memory import make_room, peak_bytes
from trainers.method import Method, MethodConfig
from trainers.notice import Notice
from trainers.optim import OptimizerConfig
from trainers.rundir import RunDir
from trainers.samples import SamplesConfig
from trainers.sampling import draw_samples
from trainers.validation import ValidationConfig, check_held_out, validate

log = logging.getLogger(__name__)


class Watch(Protocol):
    """Someone who wants to see a method while it is trained; the loop does not know what for."""

    def due(self, step: int) -> bool:
        """Whether to look after so many steps. The end of training is not asked about."""
        ...

    def look(self, method: Method, step: int) -> None:
        """See it, in evaluation mode. Training's random numbers must not be touched."""
        ...


def fit(
    method: Method, config: MethodConfig, run: RunDir, accelerator: Accelerator, watch: Watch | None = None
) -> None:
    """Train `method` to `config.steps` from the run's newest intact checkpoint, or from the start.

    `watch` is called, on every rank, while the networks carry the weights to be judged.

    An interrupted run that is started again ends with the weights of one that was not.

    Raises:
        NonFiniteError: A loss or gradient became infinite or NaN; the step was not taken.
        CheckpointError: There are checkpoints and none can be used.
        ConfigError: There are more processes than examples in a batch, or an option does not suit model or device.
        DataError: There is nothing to validate on.
        StoppedError: SIGTERM came; a checkpoint of the last step was written.
    """
    if config.batch_size < accelerator.num_processes:
        raise ConfigError(
            f"train.batch_size is {config.batch_size}; expected at least the number of processes "
            f"({accelerator.num_processes}): each needs an example"
        )
    _prepare(method, config, accelerator)
    training = _Training(method, config, run, accelerator, watch)
    step = training.restore()
    with _training_mode(method), Notice(accelerator) as notice:
        while step < config.steps:
            training.take(step)
            step += 1
            if training.due(step, config.log_every):
                training.report(step)
            training.look(step)
            # Last, so that a run which goes on from here has nothing of the steps before left to do.
            leaving = notice.given()
            if leaving or training.due(step, config.checkpoint_every):
                training.save(step)
            if leaving and step < config.steps:
                raise StoppedError(f"told to end after step {step} of {config.steps}; a checkpoint holds it")
    training.finish()
    # Gradients and the optimizer's moments make room for sampling.
    accelerator.free_memory()


def _prepare(method: Method, config: MethodConfig, accelerator: Accelerator) -> None:
    """Find out whether the options suit the model, and set it up for them."""
    check_precision(config.precision, accelerator)
    if config.validation:
        check_held_out(method)
    if config.gradient_checkpointing:
        checkpoint_activations(method)
    if config.compile_blocks:
        compile_blocks(method.backbone.denoiser)
    check_attention(method, config.attention, accelerator)
    make_room(method)


def split_batch(config: MethodConfig, rank: int, world: int) -> list[range]:
    """Places of the global batch that process `rank` of `world` works on, in groups of one forward pass each."""
    first, end = (config.batch_size * edge // world for edge in (rank, rank + 1))
    size = config.micro_batch_size or end - first
    return [range(start, min(start + size, end)) for start in range(first, end, size)]


class _Step(nn.Module):
    """A forward pass as a module of the trainable weights alone: all that has to be kept alike in all processes."""

    def __init__(self, method: Method, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self._parameters_of_method = nn.ParameterList(parameters)
        self._method = method

    def forward(self, batch: Batch) -> Tensor:
        return self._method.losses(batch).sum()


class _Training:
    """A method, its optimizer, and what has happened since the last report."""

    def __init__(
        self,
        method: Method,
        config: MethodConfig,
        run: RunDir,
        accelerator: Accelerator,
        watch: Watch | None = None,
    ) -> None:
        self.method, self.config, self.run, self.accelerator = method, config, run, accelerator
        self.watch = watch
        self.parameters = {
            f"{name}.{key}": parameter
            for name, trained in method.trained().items()
            for key, parameter in trained.parameters().items()
        }
        # A process on its own has nobody to average its gradients with; this keeps the precision and leaves that out.
        alone = accelerator.num_processes == 1
        step = _Step(method, list(self.parameters.values()))
        self.module: Any = accelerator.prepare_model(step, evaluation_mode=alone)
        self.optimizer = _build_optimizer(method, config.optimizer)
        self.stepper: Any = accelerator.prepare_optimizer(self.optimizer)
        self.micro_batches = split_batch(config, accelerator.process_index, accelerator.num_processes)
        self.loss = torch.zeros((), device=accelerator.device)
        """Sum of this process's part of the losses since the last report."""
        self.counted = 0
        """Steps in `loss`."""
        self.norm = 0.0
        """Of the last step's gradients, before they were scaled down."""
        self.clock, self.timed = time.monotonic(), 0
        self.averages = [parameter.detach().clone() for parameter in self.parameters.values()] if config.ema else None
        """Of the trainable weights."""

    def due(self, step: int, every: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens after `step` of them."""
        return step % every == 0 or step == self.config.steps

    def take(self, step: int) -> None:
        """One optimizer step."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self.config.schedule.factor(step, self.config.steps)
        for i, places in enumerate(self.micro_batches):
            last = i == len(self.micro_batches) - 1
            synchronised = nullcontext() if last else self.accelerator.no_sync(self.module)
            with synchronised, attention_by(self.config.attention):
                self._backward(step, places)
        limit = self.config.max_grad_norm
        norm = float(cast("Tensor", self.accelerator.clip_grad_norm_(self.parameters.values(), limit)))
        if math.isfinite(norm):
            self.norm = norm
        else:
            self._refuse(step, norm)
        self.stepper.step()
        self.optimizer.zero_grad()
        if self.config.ema and self.averages:
            self.config.ema.update(self.averages, list(self.parameters.values()), step)
        self.counted += 1
        self.timed += 1

    def _backward(self, step: int, places: range) -> None:
        first = step * self.config.batch_size
        indices = tuple(self.method.pick(step, first + place) for place in places)
        # Dropout layers draw from the global stream, which must not remember an interruption.
        torch.manual_seed(example_rng(self.method.seed, step, places.start, Stream.LAYERS).initial_seed())
        loss = self.module(Batch(step, tuple(places), indices)) / self.config.batch_size
        self.loss += loss.detach()
        # Data parallelism averages over processes; a batch's loss is the sum of their parts.
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def _refuse(self, step: int, norm: float) -> None:
        """Stop at gradients that are not finite, unless float16 overflowed, which its scaler skips and mends."""
        scaler = cast("Any", self.accelerator.scaler)
        if scaler is not None and torch.isfinite(self.loss) and scaler.get_scale() > 1:
            log.warning("step %d: float16 gradients overflow; the step is skipped and the loss scale lowered", step)
            return
        raise NonFiniteError(
            f"step {step}: gradient norm is {norm} and the loss {float(self.loss)}; the learning rate "
            f"({self.config.optimizer.lr:g}) is probably too high"
        )

    def report(self, step: int) -> None:
        """Append one event about the steps since the last one."""
        loss = float(cast("Tensor", self.accelerator.reduce(self.loss, reduction="sum"))) / self.counted
        now = time.monotonic()
        speed = self.timed * self.config.batch_size / (now - self.clock)
        lr = self.config.optimizer.rate(self.optimizer.param_groups[0])
        if self.accelerator.is_main_process:
            log.info("step %d/%d: loss %.4f, lr %.3g, %.1f images/s", step, self.config.steps, loss, lr, speed)
            peak = peak_bytes(self.accelerator.device)
            numbers = {"loss": loss, "lr": lr, "grad_norm": self.norm, "images_per_second": speed, "peak_bytes": peak}
            self.run.append("train", step=step, **numbers)
        self.loss.zero_()
        self.counted, self.timed, self.clock = 0, 0, now

    def look(self, step: int) -> None:
        """Validate, draw samples and export, whatever is due after `step` steps."""
        config = self.config
        validation = config.validation if config.validation and self.due(step, config.validation.every) else None
        samples = config.samples if config.samples and self.due(step, config.samples.every) else None
        weak = step == config.weak_step
        ended = step == config.steps
        snapshots = config.snapshots if config.snapshots and config.snapshots.due(step) and not ended else None
        watch = self.watch if self.watch and self.watch.due(step) and not ended else None
        if not (validation or samples or weak or snapshots or watch):
            return
        clock = time.monotonic()
        with self._judged():
            if validation:
                self._validate(step, validation)
            if samples:
                self._draw(step, samples)
            if watch:
                watch.look(self.method, step)
            if weak and self.accelerator.is_main_process:
                self.method.export(self.run.adapter / "weak")
            if snapshots and self.accelerator.is_main_process:
                snapshots.write(self.method.export, self.run.snapshots, step)
        make_room(self.method)
        self.clock += time.monotonic() - clock

    def _validate(self, step: int, validation: ValidationConfig) -> None:
        # Cut alike by every process, whatever its own share of a training batch is.
        rows = len(split_batch(self.config, 0, self.accelerator.num_processes)[0])
        loss = validate(self.method, validation, rows, self.accelerator)
        if self.accelerator.is_main_process:
            log.info("step %d/%d: validation loss %.4f", step, self.config.steps, loss)
            self.run.append("validation", step=step, loss=loss)

    def _draw(self, step: int, samples: SamplesConfig) -> None:
        folder = self.run.samples / f"step-{step:07d}"
        draw_samples(self.method.model, samples, folder, self.accelerator)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            files = [(folder / name).relative_to(self.run.path).as_posix() for name in samples.files().values()]
            self.run.append("samples", step=step, files=files)

    def finish(self) -> None:
        """Leave the weights that are to be judged in place of those that were trained."""
        with torch.no_grad():
            for parameter, average in zip(self.parameters.values(), self._averages(), strict=True):
                parameter.copy_(average)

    def _averages(self) -> list[Tensor]:
        """Weights to be judged, in the order of `parameters`."""
        own = self.averages or self.config.optimizer.judged(self.optimizer)
        return own or [parameter.detach() for parameter in self.parameters.values()]

    @contextmanager
    def _judged(self) -> Generator[None]:
        """Within the context networks are in evaluation mode and carry the weights to be judged.

        Tensors change places and are not copied, so that training goes on with the bits it left.
        """
        trained = [parameter.data for parameter in self.parameters.values()]
        for parameter, average in zip(self.parameters.values(), self._averages(), strict=True):
            parameter.data = average
        try:
            with _training_mode(self.method, training=False):
                yield
        finally:
            for parameter, data in zip(self.parameters.values(), trained, strict=True):
                parameter.data = data

    def save(self, step: int) -> None:
        """Write a checkpoint."""
        loss = cast("Tensor", self.accelerator.reduce(self.loss, reduction="sum"))
        if not self.accelerator.is_main_process:
            return
        scaler = cast("Any", self.accelerator.scaler)
        state = {
            "parameters": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
            "averages": self.averages,
            "loss": float(loss),
            "counted": self.counted,
        }
        save_checkpoint(self.run.checkpoints, step, state)

    def restore(self) -> int:
        """Load the newest intact checkpoint; the number of steps that it has behind it."""
        state = load_checkpoint(self.run.checkpoints)
        if state is None:
            return 0
        averages: list[Tensor] = state["averages"] or []
        if state["parameters"].keys() != self.parameters.keys() or len(averages) != len(self.averages or []):
            raise CheckpointError(
                f"{self.run.checkpoints}: the checkpoint is of other weights than this trial trains; remove the folder"
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["parameters"][name])
            for average, value in zip(self.averages or [], averages, strict=True):
                average.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            cast("Any", self.accelerator.scaler).load_state_dict(state["scaler"])
        # The first process speaks for all: parts are summed when they are reported.
        self.loss.fill_(state["loss"] if self.accelerator.is_main_process else 0.0)
        self.counted = state["counted"]
        if self.accelerator.is_main_process:
            log.info("resuming after step %d", state["step"])
        return int(state["step"])


def _build_optimizer(method: Method, config: OptimizerConfig) -> torch.optim.Optimizer:
    return config.build(
        [
            {"params": list(trained.parameters().values()), "lr": (peak := config.lr * trained.lr_scale), "peak": peak}
            for trained in method.trained().values()
        ]
    )


@contextmanager
def _training_mode(method: Method, *, training: bool = True) -> Generator[None]:
    networks = [trained.network for trained in method.trained().values()]
    for network in networks:
        network.train(training)
    try:
        yield
    finally:
        for network in networks:
            network.train(not training)
