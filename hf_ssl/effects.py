# SPDX-License-Identifier: Apache-2.0
"""Which settings change the weights of a run or the numbers of an evaluation (layer 0).

A run resumes if no setting that changes its weights differs. Runs that differ only in other settings are
compared as one. A stored result of a suite is valid if no setting that changes its numbers differs.
"""

WEIGHTS, NUMBERS, NOTHING = "weights", "numbers", "nothing"
_MONITOR = (
    "eval_delay", "eval_on_start", "eval_steps", "eval_strategy", "monitor_bank_images", "monitor_neighbors",
    "monitor_query_images", "monitor_steps", "on_collapse", "on_worse", "online_probe",
    "online_probe_learning_rate", "per_device_eval_batch_size",
)  # fmt: skip
_OUTPUT = (
    "disable_tqdm", "hub_always_push", "hub_revision", "hub_strategy", "logging_steps", "logging_strategy",
    "output_dir", "push_to_hub", "report_to", "run_name", "save_steps", "save_total_limit",
)  # fmt: skip
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
    **{f"training.{key}": NOTHING for key in _OUTPUT},
}
"""Section or `section.key` -> what it changes. All others change the weights."""


def effect(key: str) -> str:
    """Return what `section.key` changes: WEIGHTS (and thus numbers), only NUMBERS, or NOTHING."""
    section, _, name = key.partition(".")
    return EFFECTS.get(f"{section}.{name.partition('.')[0]}", EFFECTS.get(section, WEIGHTS))
