# SPDX-License-Identifier: Apache-2.0
"""Which settings change the weights of a run or the numbers of an evaluation (layer 0).

A run resumes if no setting that changes its weights differs. Runs that differ only in other settings are
compared as one. A stored result of a suite is valid if no setting that changes its numbers differs.
"""

WEIGHTS, NUMBERS, NOTHING = "weights", "numbers", "nothing"
_MONITOR = (
    "eval_delay", "eval_on_start", "eval_steps", "eval_strategy", "monitor_bank_images", "monitor_neighbors",
    "monitor_projector", "monitor_query_images", "monitor_steps", "on_collapse", "on_worse", "online_probe",
    "online_probe_learning_rate", "per_device_eval_batch_size",
)  # fmt: skip
_OUTPUT = (
    "debug", "disable_tqdm", "hub_always_push", "hub_model_id", "hub_private_repo", "hub_revision",
    "hub_strategy", "hub_token", "log_level", "log_level_replica", "log_on_each_node", "logging_first_step",
    "logging_nan_inf_filter", "logging_steps", "logging_strategy", "output_dir", "project", "push_to_hub",
    "report_to", "run_name", "save_on_each_node", "save_steps", "save_strategy", "save_total_limit",
    "skip_memory_metrics", "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id",
)  # fmt: skip
# Another number of workers reads a stream in another order, which the run reports when it resumes.
_MACHINE = (
    "dataloader_multiprocessing_context", "dataloader_num_workers", "dataloader_persistent_workers",
    "dataloader_pin_memory", "dataloader_prefetch_factor", "ddp_backend", "ddp_timeout",
    "torch_empty_cache_steps",
)  # fmt: skip
_FEATURES = "the monitor computes features of images, and collects no predictions of the model"
LANGUAGE = "it is meant for language models"
WITHOUT_EFFECT = {
    "average_tokens_across_devices": "the losses are means over images",
    "batch_eval_metrics": _FEATURES,
    "do_eval": "only scripts read it; the trainer measures every monitor_steps steps",
    "do_predict": "only scripts read it; use hf-ssl evaluate",
    "do_train": "only scripts read it",
    "eval_accumulation_steps": _FEATURES,
    "eval_do_concat_batches": _FEATURES,
    "eval_use_gather_object": _FEATURES,
    "include_for_metrics": "compute_metrics receives features and labels",
    "label_names": "training needs no labels; data.label_column names those of the monitor",
    "length_column_name": LANGUAGE,
    "liger_kernel_config": LANGUAGE,
    "prediction_loss_only": _FEATURES,
    "remove_unused_columns": "only the columns of images and labels are read",
    "use_cache": LANGUAGE,
}
"""Argument of transformers' Trainer without an effect here -> the reason. A value gives a warning."""
# `batch_size` and `baselines` change no number of the encoder, or only its last digits.
_EVALUATION = ("baselines", "batch_size", "cache", "cache_dir", "cache_size", "results_dir")

EFFECTS = {
    "name": NOTHING,
    "publish": NOTHING,
    "evaluation": NUMBERS,
    "data.box_format": NUMBERS,
    "data.cache": NOTHING,
    "data.mask_column": NUMBERS,
    "data.max_broken_fraction": NOTHING,
    **{f"evaluation.{key}": NOTHING for key in _EVALUATION},
    **{f"training.{key}": NUMBERS for key in _MONITOR},
    **{f"training.{key}": NOTHING for key in (*_OUTPUT, *_MACHINE, *WITHOUT_EFFECT)},
}
"""Section or `section.key` -> what it changes. All others change the weights."""


def effect(key: str) -> str:
    """Return what `section.key` changes: WEIGHTS (and thus numbers), only NUMBERS, or NOTHING."""
    section, _, name = key.partition(".")
    return EFFECTS.get(f"{section}.{name.partition('.')[0]}", EFFECTS.get(section, WEIGHTS))
