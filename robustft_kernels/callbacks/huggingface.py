"""Callbacks for transformers.Trainer. They take the trainer, and are added to it: `trainer.add_callback(...)`."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backends.digests import digests
from ..finetune.pairing import Pretrained
from ..telemetry import Telemetry
from .shared import Every, Interpolation, RadiusLearner, check_apart, scalars, summary, telemetry_of

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise ImportError("robustft_kernels.callbacks.huggingface needs it: pip install transformers accelerate") from error

FILE = "tpgm.pt"  # in the folder of a checkpoint


class _OfTrainer(TrainerCallback):
    """A callback that knows its trainer."""

    def __init__(self, trainer: Trainer) -> None:
        if not isinstance(trainer, Trainer):
            raise TypeError(
                f"{type(self).__name__} takes the trainer, not a {type(trainer).__name__}: make the trainer first, "
                f"then trainer.add_callback({type(self).__name__}(trainer, ...))"
            )
        self.trainer = trainer

    def _refuse_spread(self) -> None:
        """Raises ValueError where weights are not whole, or are not those that the trainer was given."""
        trainer, name = self.trainer, type(self).__name__
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(f"{name} needs whole weights, which FSDP and DeepSpeed do not have; call TPGM or wise_ft_")
        if trainer.model_init is not None:
            raise ValueError(f"{name} needs the weights now, and model_init makes others later; give Trainer the model")


class _Figures(_OfTrainer):
    """Logs figures beside each training loss, by the trainer's own `log`, and shows two in its progress bar."""

    prefix: str
    by_parameter: bool
    shown: Mapping[str, str] = {}

    def told(self) -> dict[str, Telemetry]:
        """The figures as they are now."""
        raise NotImplementedError

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" not in (logs or {}):  # ours, or an evaluation's
            return
        told = self.told()
        self.trainer.log(scalars(told, self.prefix, by_parameter=self.by_parameter))
        figures = summary(told)
        self.shown = {f"{self.prefix}selected": f"{figures['selected']:.0f}/{len(told)}"}
        if "deviation" in figures:
            self.shown = {f"{self.prefix}deviation": f"{figures['deviation']:.3g}", **self.shown}
        callbacks = self.trainer.callback_handler.callbacks
        shown = {key: text for of in callbacks if isinstance(of, _Figures) for key, text in of.shown.items()}
        for callback in callbacks:
            if (bar := getattr(callback, "training_bar", None)) is not None:
                bar.set_postfix(shown)


class TelemetryCallback(_Figures):
    """Logs what the optimizer did to each parameter, wherever Trainer logs its loss (`logging_steps`).

    The summary is "{prefix}deviation" = √Σ n², "{prefix}alpha", the mean, and "{prefix}selected", how many parameters
    have α ≠ 1. It reads the device once each time. Training is the same with and without it, bit for bit. The progress
    bar shows deviation and selected.

    Args:
        trainer: whose optimizer is one of ours, or `Anchored` around another. Accelerate's wrapper is seen through.
        by_parameter: also "{prefix}{number}/{parameter}" for each number of `telemetry.Telemetry` that is not nan.
            These are many, and Trainer prints them all.
        prefix: of all keys. TensorBoard and W&B put Trainer's "train/" before it.

    Raises TypeError if it is given no trainer and, when training begins, if the optimizer has no telemetry.
    """

    def __init__(self, trainer: Trainer, *, by_parameter: bool = False, prefix: str = "robustft/") -> None:
        super().__init__(trainer)
        self.by_parameter, self.prefix = by_parameter, prefix

    def told(self) -> dict[str, Telemetry]:
        return telemetry_of([self.trainer.optimizer])

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.told()


class TPGMCallback(_Figures):
    """TPGM in Trainer: learns radii γ on held-out training data, and projects, θ ← θ₀ + min(1, γ/n)·(θ − θ₀).

    θ₀ is the weights when this callback is made, unless `anchor` is given. Losses are the trainer's `compute_loss` in
    evaluation mode. "{prefix}deviation", "{prefix}alpha" and "{prefix}selected" are logged with each training loss.

    Checkpoints: each has a file "tpgm.pt" with radii, Adam's state and anchors. A resumed run has the same bits. An
    update comes before the evaluation and the saving of its step, which therefore see the projected weights.
    every="end" is after the last checkpoint: `trainer.save_model()` then saves the projected weights.

    Args:
        trainer: it has the model, and computes the loss.
        held_out: a dataset that nothing is trained or evaluated on. `callbacks.hold_out` takes it out of the training
            data. The trainer's collator makes batches of it, in this process.
        every: a number of optimizer steps, "evaluation" (before each), or "end".
        steps: T_proj, how many batches an update takes.
        batch_size: of the held-out data. None is the trainer's for training.
        seed: of the order of the held-out data.
        resume_from: the checkpoint's folder, if `train` resumes from one that is not in `output_dir`.
        by_parameter, prefix: as of `TelemetryCallback`.
        options: of `robustft_kernels.TPGM`, such as norm, lr, exclude, anchor.

    Raises:
        ValueError: held-out data that is known to be trained or evaluated on. Also every="evaluation" without one, an
            option out of its range, several processes, FSDP, DeepSpeed or `model_init`. When training resumes, a
            "tpgm.pt" that is of other weights or of other held-out data.
        FileNotFoundError: when training resumes, no "tpgm.pt".
        TypeError: no trainer, or data without a length.
    """

    def __init__(
        self,
        trainer: Trainer,
        held_out: Any,
        *,
        every: Every = "evaluation",
        steps: int = 1,
        batch_size: int | None = None,
        seed: int = 0,
        resume_from: str | PathLike[str] | None = None,
        by_parameter: bool = False,
        prefix: str = "tpgm/",
        **options: Any,
    ) -> None:
        super().__init__(trainer)
        self._refuse_spread()
        if trainer.args.world_size > 1:
            raise ValueError("TPGMCallback serves one process; over several, call TPGM in a loop of your own")
        if every == "evaluation" and trainer.args.eval_strategy == "no":
            raise ValueError("every='evaluation', but there is none: set eval_strategy, or give every=100")
        self.by_parameter, self.prefix, self.resume_from = by_parameter, prefix, resume_from
        size = batch_size or trainer.args.train_batch_size
        self.learner = RadiusLearner(held_out, every, steps, size, seed, options)
        self._held_out = self.learner.dataset
        self._check_apart()
        loader = trainer.get_test_dataloader(self._held_out)  # for the trainer's collator and columns alone
        self.learner.dataset, self.learner.collate = loader.dataset, loader.collate_fn
        self.learner.begin(trainer.model)

    def told(self) -> dict[str, Telemetry]:
        return self.learner.telemetry()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._check_apart()
        if not state.global_step:
            return
        folder = Path(self.resume_from or Path(args.output_dir) / f"checkpoint-{state.global_step}")
        if not (folder / FILE).is_file():
            raise FileNotFoundError(
                f"training resumes at step {state.global_step}, and the radii of then are not in {folder / FILE}; "
                "TPGMCallback(resume_from=...) takes the folder of the checkpoint"
            )
        saved = torch.load(folder / FILE, map_location=args.device, weights_only=True)
        if not torch.equal(saved["weights"].cpu(), self._weights()):
            raise ValueError(
                f"{folder / FILE} belongs to other weights than those that training resumes with; "
                "TPGMCallback(resume_from=...) takes the folder of the checkpoint"
            )
        self.learner.load_state_dict(saved["learner"])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._learn("step", state)
        if control.should_evaluate:
            self._learn("evaluation", state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_evaluate:
            self._learn("evaluation", state)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.should_save and not args.save_only_model:
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE
            torch.save({"learner": self.learner.state_dict(), "weights": self._weights()}, path)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._learn("end", state)

    def _learn(self, moment: str, state: Any) -> None:
        if self.learner.is_due(moment, state.global_step):
            self.learner.learn(state.global_step, self._loss)

    def _loss(self, batch: Any) -> Tensor:
        inputs = self.trainer._prepare_inputs(batch)
        with self.trainer.compute_loss_context_manager():
            loss: Tensor = self.trainer.compute_loss(self.trainer.model, inputs)
        return loss

    def _check_apart(self) -> None:
        trained, evaluated = self.trainer.train_dataset, self.trainer.eval_dataset
        check_apart(self._held_out, {"train_dataset": trained, "eval_dataset": evaluated})

    def _weights(self) -> Tensor:
        """What tells the weights that take part from any others."""
        return torch.stack(digests(self.learner.weights))


class WiSECallback(_OfTrainer):
    """WiSE-FT when training ends: θ ← (1 − alpha)·θ₀ + alpha·θ, in the trainer's model.

    Trainer's checkpoints are written before that. They hold the fine-tuned weights, from which training can resume.
    From then on the model has the interpolated weights. `trainer.save_model()`, `push_to_hub()` and `evaluate()` take
    those. With `load_best_model_at_end`, the best weights are interpolated. A second `train()` starts from what the
    first left.

    Args:
        trainer: whose model is interpolated.
        alpha: from 0 (pre-trained) to 1 (fine-tuned).
        pretrained: θ₀. None takes the anchors of the optimizer, which must be one of ours. What has none, such as a
            free head and all buffers, stays fine-tuned. Else it is a module, a state dict, or the path of safetensors.
        options: `exclude` and `buffers` of `robustft_kernels.wise_ft`, if `pretrained` is given.

    Raises:
        ValueError: an alpha outside [0, 1], options without `pretrained`, FSDP, DeepSpeed or `model_init`. When
            training begins: no anchors, or weights that do not fit.
        TypeError: no trainer.

    Source: Wortsman et al., CVPR 2022, Section 3.
    """

    def __init__(
        self,
        trainer: Trainer,
        alpha: float,
        pretrained: Pretrained | None = None,
        **options: Any,
    ) -> None:
        super().__init__(trainer)
        self._refuse_spread()
        self.interpolation = Interpolation(alpha, pretrained, options)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.interpolation.check(self.trainer.model, [self.trainer.optimizer])

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.interpolation.apply(self.trainer.model, [self.trainer.optimizer])
