# SPDX-License-Identifier: Apache-2.0
"""Publishes the encoder during and after training (`training.push_to_hub`).

The root of the repository always contains the native encoder. transformers' own implementation would replace
the encoder by the training checkpoint, which is the method model. It would also write a card about
fine-tuning.
"""

import logging
import shlex
import shutil
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from transformers.trainer_utils import HubStrategy

from hf_ssl.cards.card import CARD, encoder_metadata
from hf_ssl.cards.facts_files import FILE as FACTS
from hf_ssl.cards.privacy import check_leaks, folder_name, local_secrets
from hf_ssl.errors import UserError
from hf_ssl.files import STAGING_PREFIX, write_text
from hf_ssl.hub.export import export_model
from hf_ssl.hub.publish import encoder_files, is_owned, publish
from hf_ssl.hub.remote import Files, Published, Remote, hub_errors, open_repo, update_repo
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.image_trainer import save_for_trainer
from hf_ssl.names import warn_deprecated
from hf_ssl.trainer.arguments import SSLTrainingArguments
from hf_ssl.trainer.checkpoints import CheckpointTrainer
from hf_ssl.trainer.transformers_arguments import reject_argument

logger = logging.getLogger(__name__)

_UNFINISHED_CARD = """---
{metadata}
---

# {name}

This image encoder is in training with hf_ssl: step {step:,} of {steps:,}.
A complete card replaces this text after training.
"""


class PushingTrainer(CheckpointTrainer):
    """The part of `SSLTrainer` that writes and publishes the encoder.

    With `args.push_to_hub`, the trainer opens the repository `args.hub_model_id` before training, so that a
    missing token is reported at once. `args.hub_strategy` selects when it publishes:

    - `end`: after training, by `push_to_hub` or `publish_output`.
    - `every_save`: also at every checkpoint, in the background. These pushes contain the encoder, its image
      processor, the method model and a short card.

    If an earlier push is still running, the next one is skipped, or queued with `args.hub_always_push`. A
    failed push is logged and does not stop the training. The strategies `checkpoint` and `all_checkpoints` of
    transformers are deprecated and mean `every_save`, because hf_ssl publishes no optimizer state.
    """

    args: SSLTrainingArguments
    method: SSLPreTrainedModel
    hub_model_id: Any  # transformers assigns None and has no annotation

    # Writing.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the encoder, its image processor and the method model (`pretraining/`).

        Args:
            output_dir: the folder; None for `args.output_dir`.
            _internal_call: with `output_dir`, the trainer writes a checkpoint, which is the method model
                alone.
        """
        if not self.args.should_save:
            return
        if output_dir is None or not _internal_call:
            export_model(self.method, str(output_dir or self.args.output_dir))
        else:
            save_for_trainer(self.method, output_dir)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write a short card to `args.output_dir`.

        Without arguments, this method does nothing if the folder contains a card. `hf_ssl.cards.write_card`
        writes the full card from the facts of the run.

        Args:
            language, license, tags: metadata for the Hub; the tags of hf_ssl are added.
            model_name: the heading.
            finetuned_from: Hub id of the encoder that training started from.
            dataset_tags: Hub ids of the data sets.
            tasks, dataset, dataset_args: must be None.

        Raises:
            UserError: an argument has no place in the card, or arguments are given although the full card
                exists.
        """
        for name, value in (("tasks", tasks), ("dataset", dataset), ("dataset_args", dataset_args)):
            reject_argument(name, value, "use dataset_tags, and evaluate_encoder for results")
        given = {
            "language": language, "license": license, "base_model": finetuned_from, "datasets": dataset_tags,
        }  # fmt: skip
        known = {name: value for name, value in given.items() if value is not None}
        folder = Path(str(self.args.output_dir))
        changes = bool(known or tags or model_name)
        if not self.is_world_process_zero() or ((folder / CARD).exists() and not changes):
            return
        if (folder / FACTS).exists() and changes:
            raise UserError(
                f"create_model_card: expected no arguments for the complete {folder / CARD}; edit this file"
            )
        write_text(folder / CARD, self._unfinished_card(model_name, tags, **known))

    def _unfinished_card(
        self, model_name: str | None = None, tags: str | list[str] | None = None, **known: Any
    ) -> str:
        method = self.method.method_name()
        further = [tags] if isinstance(tags, str) else tags or []
        return _UNFINISHED_CARD.format(
            metadata=encoder_metadata(method, further, **known).to_yaml(),
            name=model_name or self.hub_model_id or folder_name(str(self.args.output_dir)),
            step=self.state.global_step,
            steps=self.state.max_steps,
        )

    # Publishing.

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Open or create the repository `args.hub_model_id`, by default with the name of the output folder.

        Raises:
            UserError: there is no token with write access, or the Hub does not answer.
        """
        if not self.is_world_process_zero():
            return
        self._replace_deprecated_strategy()
        name = self.args.hub_model_id or folder_name(str(self.args.output_dir))
        self._pushes: list[Future] = []
        with hub_errors(name):
            self._repo = open_repo(
                name,
                private=bool(self.args.hub_private_repo if private is None else private),
                token=token or self.args.hub_token,
                revision=self.args.hub_revision,
            )
        self.hub_model_id = self._repo.repo_id

    def _replace_deprecated_strategy(self) -> None:
        strategy = HubStrategy(self.args.hub_strategy)
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            warn_deprecated(
                f"training.hub_strategy: expected end or every_save, got {strategy.value}, which is "
                "deprecated and now means every_save; checkpoints stay on this machine"
            )
            self.args.hub_strategy = HubStrategy.EVERY_SAVE

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Write the current encoder to `args.output_dir` and publish this folder.

        The arguments are those of transformers; `kwargs` are those of `create_model_card`.

        Returns:
            A `hf_ssl.hub.remote.Published`, or its future if `blocking` is false. None on other processes
            than the first.

        Raises:
            UserError: the same errors as `publish`.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        self.create_model_card(**kwargs)
        if not self.is_world_process_zero():
            return None
        arguments = (commit_message, token, revision)
        return self.publish_output(*arguments) if blocking else _background(self.publish_output, *arguments)

    def publish_output(
        self, commit_message: str | None = None, token: str | None = None, revision: str | None = None
    ) -> Published:
        """Publish `args.output_dir` as it is, after the running pushes.

        If the folder contains `facts.json`, this method publishes the same files as `hf-ssl publish`.
        Otherwise, it publishes the encoder with a short card.

        Raises:
            UserError: the same errors as `publish`. The files of the run stay in their folder.
        """
        self._finish_current_push()
        folder, repo = Path(str(self.args.output_dir)), self._repo
        token, revision = token or self.args.hub_token, revision or self.args.hub_revision
        message = commit_message or "End of training"
        if (folder / FACTS).is_file():
            try:
                done = publish(folder, repo.repo_id, token=token, revision=revision, message=message)
            except UserError as error:
                again = f"hf-ssl publish {shlex.quote(str(folder))} {repo.repo_id}"
                raise UserError(
                    f"{error} (the run is complete in {folder}; `{again}` publishes it later)"
                ) from error
            assert done is not None, "only a dry run returns None"
            return done
        files: Files = {**encoder_files(folder), CARD: folder / CARD}
        with hub_errors(repo.repo_id):
            return _update(replace(repo, revision=revision), files, message, folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Publish the current encoder in the background, from a copy that later steps do not change."""
        if not self.is_world_process_zero() or HubStrategy(self.args.hub_strategy) == HubStrategy.END:
            return
        if not self.args.hub_always_push and any(not push.done() for push in self._pushes):
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        step, root = self.state.global_step, Path(str(self.args.output_dir))
        staging = root / f"{STAGING_PREFIX}push-{step}"
        shutil.rmtree(staging, ignore_errors=True)
        export_model(self.method, staging)
        files: Files = {**encoder_files(staging), CARD: self._unfinished_card().encode()}
        message = f"Training in progress, step {step}"
        self._pushes.append(_background(_push, self._repo, files, message, staging))

    def _finish_current_push(self) -> None:
        """Wait for the running pushes."""
        if self.hub_model_id is None or not self._pushes:
            return
        if any(not push.done() for push in self._pushes):
            logger.warning("waiting for the upload to %s", self._repo.url)
        wait(self._pushes)
        self._pushes.clear()


# One thread for all pushes, which keeps their order.
_BACKGROUND = HfApi()


def _background(call: Callable[..., Any], *arguments: Any) -> Future:
    return _BACKGROUND.run_as_future(call, *arguments)


def _push(repo: Remote, files: Files, message: str, staging: Path) -> None:
    """Update the repository and delete the copied files. An error is only logged."""
    disable_progress_bars()  # training shows its own
    try:
        with hub_errors(repo.repo_id):
            _update(repo, files, message, staging.parent)
    except Exception as error:  # no error may stop the training; the last push retries and raises
        logger.warning("the push to %s failed: %s", repo.url, error)
    finally:
        enable_progress_bars()
        shutil.rmtree(staging, ignore_errors=True)


def _update(repo: Remote, files: Files, message: str, output_dir: Path) -> Published:
    """Check files for private information and update the repository."""
    token = repo.api.token if isinstance(repo.api.token, str) else None
    check_leaks(files, local_secrets(output_dir, token))
    return update_repo(repo, files, is_owned=is_owned, message=message)
