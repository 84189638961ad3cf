"""One run: settings → adapter, metrics and record, in a folder that can be continued."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lora_squeeze.annealing.callback import SqueezeCallback
from lora_squeeze.attaching import attach_adapter, attach_lora, base_of, labels_of_adapter, use_adapter, write_labels
from lora_squeeze.errors import AdapterError, DataError, ModelError, RankError, TrainingError
from lora_squeeze.extras import require
from lora_squeeze.formats import open_adapter
from lora_squeeze.formats.folder import new_folder
from lora_squeeze.models import Task, load_model, load_seeing, load_tokenizer
from lora_squeeze.provenance import provenance_of
from lora_squeeze.sections import document_of
from lora_squeeze.seeing import Seeing
from lora_squeeze.training.callbacks import OnLog, Recorder
from lora_squeeze.training.folder import STATE, RunFolder, only_one
from lora_squeeze.training.inputs import Inputs, read_inputs
from lora_squeeze.training.record import RunRecord, environment, write_record
from lora_squeeze.training.settings import RunSettings
from lora_squeeze.training.tracking import tracked
from lora_squeeze.training.trainers import Prepared, trainer_of
from lora_squeeze.verbs import compress_adapter

__all__ = ["evaluate_adapter", "train"]

_PATIENCE = 30.0  # seconds that a worker whose campaign was killed may take to notice


def train(
    settings: RunSettings, folder: str | os.PathLike[str], *, overwrite: bool = False, on_log: OnLog | None = None
) -> RunRecord:
    """Train an adapter into a folder (see `lora_squeeze.training.folder`) and return its record.

    A folder that holds the finished run is only read; one that the same settings began is continued
    from its last checkpoint.
    overwrite
        begin anew: remove whatever is there of an earlier run, and nothing else.
    on_log
        called as on_log(step, steps, metrics) at each step; metrics are empty but when logged.

    Raises SettingsError, DataError, ModelError, AdapterError, OutputError or TrainingError.
    """
    if os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1"):
        raise TrainingError(
            f"WORLD_SIZE = {os.environ['WORLD_SIZE']}: train is one process, and several of them (torchrun) cannot "
            "share its folder; start it without torchrun, or use SqueezeCallback in a script of your own"
        )
    run = RunFolder(Path(folder))
    run.make()
    with only_one(run.path, patience=_PATIENCE):
        run.begin(settings, overwrite=overwrite)
        return run.finished() or _trained(settings, run, on_log)


def evaluate_adapter(
    settings: RunSettings, adapter: str | os.PathLike[str], *, scratch: str | os.PathLike[str]
) -> dict[str, float]:
    """Evaluate an adapter on the held-out data of a run, as that run would; `scratch` is a folder for the Trainer.

    Returns the Trainer's metrics, such as eval_loss. Raises DataError if nothing is held out.
    """
    require("transformers", "train").set_seed(settings.training.seed)
    adapter = os.fspath(adapter)
    inputs = read_inputs(settings, labels=labels_of_adapter(adapter))
    if not inputs.held_out:
        raise DataError("no data are held out to evaluate on: give [data] eval_source or eval_fraction")
    run = RunFolder(Path(scratch))
    # TRL takes what it is given as the reference of DPO's rewards, and that is what the run began with.
    compared = settings.method == "dpo"
    if not compared:
        settings = replace(settings, model=replace(settings.model, lora_rank=0, adapter=adapter, squeeze_to=0))
    _, reader, model = _loaded(settings, inputs, run, _fetched(settings.model.adapter))
    quiet = replace(settings, logging=replace(settings.logging, report_to=[], wandb_project=""))
    trainer, _ = trainer_of(Prepared(quiet, run, inputs, reader, model, ()))
    trainer.remove_callback(require("transformers", "train").PrinterCallback)
    if compared:
        use_adapter(model, adapter, name="evaluated")
    return {key: float(value) for key, value in trainer.evaluate().items() if isinstance(value, int | float)}


def _trained(settings: RunSettings, run: RunFolder, on_log: OnLog | None) -> RunRecord:
    started = _now()
    transformers = require("transformers", "train")
    transformers.set_seed(settings.training.seed)  # before a head or a LoRA is made at random
    adapter = _fetched(settings.model.adapter)
    labels = labels_of_adapter(adapter) if adapter else ()
    inputs = read_inputs(settings, labels=labels)
    name, reader, model = _loaded(settings, inputs, run, adapter)
    source_rank = _largest_rank(model)
    recorder = Recorder(run, on_log)
    callbacks = (*_in_squeeze(settings), recorder)
    trainer, notes = trainer_of(Prepared(settings, run, inputs, reader, model, callbacks))
    trainer.remove_callback(transformers.PrinterCallback)  # the recorder tells whoever wants to know
    checkpoint = _checkpoint(settings, run)
    with tracked(settings, run):  # the last evaluation is logged, too
        seconds = _train(trainer, settings, run, recorder=recorder, checkpoint=checkpoint)
        if inputs.held_out:
            trainer.evaluate()
    _save(model, reader, inputs, run.final)
    record = RunRecord(
        method=settings.method,
        model=name,
        adapter=str(run.final),
        source_rank=source_rank,
        rank=_largest_rank(model),
        steps=trainer.state.global_step,
        examples=len(inputs.training),
        held_out=len(inputs.held_out),
        trained_parameters=sum(one.numel() for one in model.parameters() if one.requires_grad),
        metrics=recorder.latest,
        seconds=round(seconds, 3),
        started=started,
        finished=_now(),
        peak_memory=_peak_memory(model),
        settings=document_of(settings),
        environment=environment(),
        notes=[*_what_the_squeeze_kept(settings, run), *notes],
    )
    write_record(record, run.record)
    return record


def _fetched(adapter: str) -> str:
    """The folder of an adapter on this disk, fetched if it lies elsewhere; "" for none."""
    if not adapter or Path(adapter).is_dir():
        return adapter
    found = open_adapter(adapter)
    if found.format != "peft":
        raise AdapterError(f"{adapter}: is a {found.format} file; only PEFT adapters can be loaded onto a model")
    return str(found.place)


def _loaded(settings: RunSettings, inputs: Inputs, run: RunFolder, adapter: str) -> tuple[str, Any, Any]:
    """The base model's name, what makes its inputs, and the model with the LoRA that is to be trained.

    adapter
        the folder of the one that `[model] adapter` names.
    """
    chosen = settings.model
    name = chosen.model or base_of(adapter)[0]
    adapter = _squeezed_first(settings, run) or adapter
    task: Task = "image-text-to-text" if inputs.have_images else "causal-lm"
    if settings.method == "classify":
        task = "sequence-classification"
    load_reader = load_seeing if task == "image-text-to-text" else load_tokenizer
    reader = load_reader(name, revision=chosen.revision)
    base = load_model(
        name,
        task=task,
        labels=inputs.labels,
        dtype=chosen.dtype,
        quantization=chosen.quantization,
        device=chosen.device,
        revision=chosen.revision,
    )
    base.config.use_cache = settings.method == "grpo"  # only generating gains from it
    if adapter:
        return name, reader, attach_adapter(base, adapter, trainable=True)
    lora = settings.lora
    model = attach_lora(
        base,
        rank=settings.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        target_modules=lora.target_modules,
        modules_to_save=lora.modules_to_save,
        rslora=lora.rslora,
        dora=lora.dora,
    )
    return name, reader, model


def _in_squeeze(settings: RunSettings) -> tuple[Any, ...]:
    """The callback that lowers the rank while training, if `[in_squeeze]` asks for it."""
    chosen = settings.in_squeeze
    if not chosen.schedule:
        return ()
    return (
        SqueezeCallback(
            chosen.schedule,
            ranks=chosen.ranks or None,
            target=chosen.target_rank or None,
            spacing=chosen.spacing,
            policy=chosen.rank_policy,
            state=chosen.optimizer_state,
            balance=chosen.balance,
            learning_rate=chosen.lr_after_switch,
            warmup_steps=None if chosen.rewarm_steps < 0 else chosen.rewarm_steps,
            learning_rates={int(rank): rate for rank, rate in chosen.lr_by_rank.items()},
        ),
    )


def _squeezed_first(settings: RunSettings, run: RunFolder) -> str:
    """The squeezed adapter that training starts from, if the settings ask for one (Cont-Squeeze); else ""."""
    chosen = settings.model
    if not chosen.squeeze_to:
        return ""
    rank = open_adapter(chosen.adapter).rank
    if chosen.squeeze_to > rank:
        raise RankError(
            f"{chosen.adapter}: has rank {rank}, and a squeeze lowers the rank: {chosen.squeeze_to} is not possible; "
            f"{rank}, or no rank, trains it on as it is"
        )
    if not run.squeezed.exists():
        compress_adapter(chosen.adapter, run.squeezed, chosen.squeeze_to)
    return str(run.squeezed)


def _what_the_squeeze_kept(settings: RunSettings, run: RunFolder) -> Iterator[str]:
    """A note on the squeeze that came before the training."""
    if settings.model.squeeze_to and (made := provenance_of(open_adapter(run.squeezed))) is not None:
        retained = f"{1 - made.relative_error**2:.2%} of the variance was retained"
        yield f"the adapter was squeezed to rank {settings.model.squeeze_to} first: {retained}"


def _checkpoint(settings: RunSettings, run: RunFolder) -> Path | None:
    """Where to go on from: the run's own last checkpoint, else that of the run which `[resume]` names."""
    run.clear_incomplete()
    if own := run.last_checkpoint():
        return own
    if not settings.resume.from_:
        return None
    other = RunFolder(Path(settings.resume.from_))
    checkpoint = other.last_checkpoint()
    if checkpoint is None:
        raise TrainingError(f"{other.checkpoints}: [resume] from names a run that has no checkpoint")
    if other.metrics.exists():
        shutil.copyfile(other.metrics, run.metrics)
    return checkpoint


def _train(
    trainer: Any, settings: RunSettings, run: RunFolder, *, recorder: Recorder, checkpoint: Path | None
) -> float:
    """Train, and return the seconds it took; nothing is trained where the checkpoint is that of the last step."""
    run.forget_metrics_after(_step_of(checkpoint) if checkpoint else 0)
    recorder.remember()
    begun = time.perf_counter()
    try:
        if checkpoint and _is_last(checkpoint, trainer, settings):
            _take_on(trainer, checkpoint)
            return 0.0
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except (DataError, ModelError) as error:
        if "Traceback" not in str(error):
            raise
        # A process that makes batches adds where in its code it was; its last line is what was said.
        raise type(error)(str(error).rstrip().rpartition("\n")[2].partition("Error: ")[2]) from error
    except RuntimeError as error:
        if checkpoint is None or "loading state_dict" not in str(error):
            raise
        was, wanted = open_adapter(checkpoint).rank, _largest_rank(trainer.model)
        why = f"its adapter has rank {was}, and these settings {wanted}" if was != wanted else _first_line(error)
        raise TrainingError(
            f"{checkpoint}: does not fit these settings: {why}; go on with the settings that it was trained with, or "
            "leave out [resume] from"
        ) from error
    except ValueError as error:
        if checkpoint is not None:
            raise TrainingError(f"{checkpoint}: cannot be continued: {error}; --overwrite begins anew") from error
        if "empty" in str(error) or "num_samples" in str(error):
            raise DataError(f"{', '.join(settings.data.source)}: too few examples for a batch") from error
        raise
    return time.perf_counter() - begun


def _first_line(error: Exception) -> str:
    """What did not fit, after the line that says in which class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[1:] or lines)[0]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_last(checkpoint: Path, trainer: Any, settings: RunSettings) -> bool:
    """Whether there is nothing left to train; transformers would take one step more before it looks."""
    done, steps = _step_of(checkpoint), settings.steps
    if not steps:
        *_, steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    if done > steps:
        raise TrainingError(
            f"{checkpoint}: {done} steps were trained already, and these settings say {steps}; raise [training] "
            "max_steps or epochs, and begin anew with --overwrite"
        )
    return done == steps


def _take_on(trainer: Any, checkpoint: Path) -> None:
    """Give the model and the Trainer the weights and the step of a checkpoint, to evaluate and save them."""
    trainer.model.load_adapter(str(checkpoint), "default", is_trainable=True)
    trainer.state = require("transformers", "train").TrainerState.load_from_json(str(checkpoint / STATE))


def _save(model: Any, reader: Any, inputs: Inputs, final: Path) -> None:
    with new_folder(final, overwrite=True) as folder:
        model.save_pretrained(str(folder), selected_adapters=["default"])
        (reader.processor if isinstance(reader, Seeing) else reader).save_pretrained(str(folder))
        if inputs.labels:
            write_labels(folder, inputs.labels)


def _largest_rank(model: Any) -> int:
    return max(module.r["default"] for module in model.modules() if hasattr(module, "lora_A") and "default" in module.r)


def _peak_memory(model: Any) -> int:
    torch = require("torch", "train")
    if model.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(model.device))
    status = Path("/proc/self/status")
    # On Linux, getrusage would give the peak of the process that started this one, if that was higher.
    if status.is_file():
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
