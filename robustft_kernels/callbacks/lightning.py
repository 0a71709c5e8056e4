"""Callbacks for lightning.Trainer: `Trainer(callbacks=[TPGMCallback(...), TelemetryCallback(), WiSECallback(0.7)])`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

from torch import Tensor, nn

from ..finetune.pairing import Pretrained
from ..telemetry import Telemetry
from .shared import Every, Interpolation, RadiusLearner, check_apart, scalars, summary, telemetry_of

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError("robustft_kernels.callbacks.lightning needs it: pip install lightning") from error

WHOLE = ("SingleDeviceStrategy", "DDPStrategy")  # strategies that keep weights whole


class _Figures(Callback):
    """Logs figures by the module's own `log`, every `log_every_n_steps`, and shows two in the progress bar."""

    prefix: str
    by_parameter: bool
    _told_at = -1

    def told(self, trainer: Trainer) -> dict[str, Telemetry]:
        """The figures as they are now."""
        raise NotImplementedError

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._told_at = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step = trainer.global_step  # of the optimizer: batches that are accumulated leave it as it is
        if step == self._told_at or not trainer.log_every_n_steps or step % trainer.log_every_n_steps:
            return
        self._told_at, told = step, self.told(trainer)
        shown = {f"{self.prefix}{key}" for key in summary(told)} - {f"{self.prefix}alpha"}
        for key, value in scalars(told, self.prefix, by_parameter=self.by_parameter).items():
            pl_module.log(key, value, on_step=True, on_epoch=False, prog_bar=key in shown)


class TelemetryCallback(_Figures):
    """Logs what the optimizers did to each parameter, every `log_every_n_steps` of the trainer.

    The summary is "{prefix}deviation" = √Σ n², "{prefix}alpha", the mean, and "{prefix}selected", how many parameters
    have α ≠ 1. It reads the device once each time. Training is the same with and without it, bit for bit. The progress
    bar shows deviation and selected.

    Args:
        by_parameter: also "{prefix}{number}/{parameter}" for each number of `telemetry.Telemetry` that is not nan.
        prefix: of all keys.

    Raises TypeError when training begins, if no optimizer has telemetry.
    """

    def __init__(self, *, by_parameter: bool = False, prefix: str = "robustft/") -> None:
        self.by_parameter, self.prefix = by_parameter, prefix

    def told(self, trainer: Trainer) -> dict[str, Telemetry]:
        return telemetry_of(trainer.optimizers)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.told(trainer)


class TPGMCallback(_Figures):
    """TPGM in Lightning: learns radii γ on held-out training data, and projects, θ ← θ₀ + min(1, γ/n)·(θ − θ₀).

    θ₀ is the weights when `fit` sets up, before a checkpoint is loaded, unless `anchor` is given. "{prefix}deviation",
    "{prefix}alpha" and "{prefix}selected" are logged every `log_every_n_steps`.

    Checkpoints carry radii, Adam's state and anchors, and a resumed run has the same bits. every="evaluation" learns
    before the first batch of each validation within `fit`, and not in the sanity check or in `trainer.validate`. What
    is saved after it are the projected weights. If batches are being accumulated then, their gradients stay.
    every="end" is after the last epoch's checkpoint: `trainer.save_checkpoint` then saves the projected weights.

    Args:
        held_out: a dataset that nothing is trained or evaluated on, or a loader, whose dataset, `collate_fn` and batch
            size are taken. `callbacks.hold_out` takes it out of the training data. Batches are made in this process.
        every: a number of optimizer steps, "evaluation", or "end".
        steps: T_proj, how many batches an update takes.
        loss_fn: from the module and a batch to the loss. None calls `training_step` under the trainer's precision, in
            evaluation mode and with `log` muted. Give one if `training_step` has other effects, such as metrics.
        batch_size: None is the loader's, else 8.
        seed: of the order of the held-out data.
        by_parameter, prefix: as of `TelemetryCallback`.
        options: of `robustft_kernels.TPGM`, such as norm, lr, exclude, anchor.

    Raises:
        ValueError: an option out of its range. When training begins: held-out data that is known to be trained or
            evaluated on, every="evaluation" without one, several processes, or manual optimization without `loss_fn`.
            When it resumes: radii of other held-out data.
        TypeError: data without a length, or a `training_step` that returns no loss.
    """

    def __init__(
        self,
        held_out: Any,
        *,
        every: Every = "evaluation",
        steps: int = 1,
        loss_fn: Callable[[LightningModule, Any], Tensor] | None = None,
        batch_size: int | None = None,
        seed: int = 0,
        by_parameter: bool = False,
        prefix: str = "tpgm/",
        **options: Any,
    ) -> None:
        self.learner = RadiusLearner(held_out, every, steps, batch_size, seed, options)
        self.loss_fn, self.by_parameter, self.prefix = loss_fn, by_parameter, prefix
        self._start: dict[str, Tensor] = {}
        self._module: LightningModule | None = None

    def told(self, trainer: Trainer) -> dict[str, Telemetry]:
        return self.learner.telemetry()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copies θ₀: a checkpoint, and the move to the device, come after."""
        if stage == "fit" and self._module is not pl_module and self.learner.options.get("anchor") in (None, "initial"):
            trained = [(name, param) for name, param in pl_module.named_parameters() if param.requires_grad]
            self._start = {name: param.detach().clone() for name, param in trained}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _refuse_spread(trainer, self)
        if trainer.world_size > 1:
            raise ValueError("TPGMCallback serves one process; over several, call TPGM in a loop of your own")
        if self.loss_fn is None and not pl_module.automatic_optimization:
            raise ValueError("a training_step that optimizes by itself is no loss: give loss_fn=, of module and batch")
        if self._module is not pl_module:
            device = next(pl_module.parameters()).device
            given = {"anchor": {name: of.to(device) for name, of in self._start.items()}} if self._start else {}
            self.learner.begin(pl_module, **given)
            self._module, self._start = pl_module, {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.learner.every == "evaluation" and not trainer.enable_validation:
            raise ValueError("every='evaluation', but there is none: give fit a validation loader, or every=100")
        trained, evaluated = trainer.train_dataloader, trainer.val_dataloaders
        check_apart(self.learner.dataset, {"the training data": trained, "the validation data": evaluated})

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step != self._told_at:
            self._learn("step", trainer, pl_module)
        super().on_train_batch_end(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._learn("evaluation", trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._learn("end", trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return self.learner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.learner.load_state_dict(state_dict)

    def _learn(self, moment: str, trainer: Trainer, module: LightningModule) -> None:
        if self.learner.is_due(moment, trainer.global_step):
            self.learner.learn(trainer.global_step, lambda batch: self._loss(trainer, module, batch))

    def _loss(self, trainer: Trainer, module: LightningModule, batch: Any) -> Tensor:
        batch = trainer.precision_plugin.convert_input(batch)  # as the training loop does
        batch = trainer.strategy.batch_to_device(module._on_before_batch_transfer(batch))
        with trainer.precision_plugin.train_step_context(), _without_log(module):
            if self.loss_fn is not None:
                return self.loss_fn(module, batch)
            takes_index = len(signature(module.training_step).parameters) > 1
            found = module.training_step(batch, 0) if takes_index else module.training_step(batch)
        loss = found["loss"] if isinstance(found, Mapping) else found
        if not isinstance(loss, Tensor):
            raise TypeError(f"training_step returned a {type(loss).__name__} on held-out data; give loss_fn=")
        return loss


class WiSECallback(Callback):
    """WiSE-FT when `fit` ends: θ ← (1 − alpha)·θ₀ + alpha·θ, in the module.

    What ModelCheckpoint wrote is from before that. It holds the fine-tuned weights, from which training can resume.
    From then on the module has the interpolated weights. `trainer.save_checkpoint(path)`, `trainer.test(module)` and
    `module.state_dict()` take those. `trainer.test(ckpt_path="best")` loads fine-tuned ones again. An interrupted `fit`
    interpolates nothing. A second `fit` starts from what the first left.

    Args:
        alpha: from 0 (pre-trained) to 1 (fine-tuned).
        pretrained: θ₀. None takes the anchors of the optimizers, of which one must be ours. What has none, such as a
            free head and all buffers, stays fine-tuned. Else it is a module, a state dict, or the path of safetensors.
        options: `exclude` and `buffers` of `robustft_kernels.wise_ft`, if `pretrained` is given.

    Raises ValueError for an alpha outside [0, 1], and options without `pretrained`. When training begins: no anchors,
    weights that do not fit, or a strategy that spreads them.

    Source: Wortsman et al., CVPR 2022, Section 3.
    """

    def __init__(self, alpha: float, pretrained: Pretrained | None = None, **options: Any) -> None:
        self.interpolation = Interpolation(alpha, pretrained, options)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _refuse_spread(trainer, self)
        self.interpolation.check(pl_module, trainer.optimizers)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.interpolation.apply(pl_module, trainer.optimizers)


def _refuse_spread(trainer: Trainer, callback: Callback) -> None:
    """Raises ValueError where weights are not whole."""
    strategy = type(trainer.strategy).__name__
    if strategy not in WHOLE:
        raise ValueError(
            f"{type(callback).__name__} needs whole weights, so its strategy is one of {', '.join(WHOLE)}, not "
            f"{strategy}; call TPGM or wise_ft_ yourself"
        )


@contextmanager
def _without_log(module: nn.Module) -> Iterator[None]:
    """Mutes `module.log`, and with it `log_dict`: what is logged is of the training."""
    own = module.__dict__.get("log")
    object.__setattr__(module, "log", lambda *_, **__: None)
    try:
        yield
    finally:
        object.__delattr__(module, "log")
        if own is not None:
            object.__setattr__(module, "log", own)
