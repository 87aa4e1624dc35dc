# SPDX-License-Identifier: Apache-2.0
"""`training.push_to_hub` with transformers' meaning and our repo: the native encoder at the root, always.

transformers' own would copy the training checkpoint, the method model, over the encoder, and write a card
that speaks of fine-tuning.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import HubStrategy

from hf_ssl.data import DataConfig
from hf_ssl.errors import UserError
from hf_ssl.files import STAGING_PREFIX, replaced_folder, write_text
from hf_ssl.hub import export_encoder, image_processor
from hf_ssl.hub.card import CARD, TAGS
from hf_ssl.hub.leaks import check_leaks, secrets_here
from hf_ssl.hub.publish import publish
from hf_ssl.hub.refusals import told_in_a_sentence
from hf_ssl.hub.remote import Published, Remote, open_repo, send
from hf_ssl.hub.run_files import FACTS, Files, encoder_files, is_owned
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.trainer.arguments import SSLTrainingArguments
from hf_ssl.trainer.lean import LeanTrainer

logger = logging.getLogger(__name__)

LAST_CHECKPOINT = "last-checkpoint"  # where transformers looks for it too
PROGRESS = """---
library_name: transformers
tags:
{tags}
---

# {name}

An image encoder in training with hf_ssl: step {step:,} of {steps:,}. Its card follows once it is measured.
"""


class PushingTrainer(LeanTrainer):
    """The part of `SSLTrainer` that writes what is published, and publishes it.

    With `args.push_to_hub` the repo `args.hub_model_id` is opened before training, so that a missing token is
    known at once, and, as `args.hub_strategy` says, brought up to date in the background at every save:

    - `end`: not at all; `push_to_hub` and `publish_output` do it when training is over.
    - `every_save`: the encoder, its image processor and the method model.
    - `checkpoint`: the newest checkpoint as well, in `last-checkpoint/`.
    - `all_checkpoints`: every checkpoint as well.

    While one such push is on its way the next save is left out, or queued if `args.hub_always_push`. One that
    fails is told and does not stop the training.
    """

    args: SSLTrainingArguments
    method: SSLPreTrainedModel
    data: DataConfig

    # Writing.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Without a folder: what is published, in `args.output_dir`. With one: the whole method model at
        its root.
        """
        if not self.args.should_save:
            return
        if output_dir is None:
            self._write_repo(Path(str(self.args.output_dir)))
        else:
            # transformers would write old key names for a ViT, which its own Trainer cannot load again
            # (issue 43701)
            self.method.save_pretrained(output_dir, save_original_format=False)

    def _write_repo(self, root: Path) -> None:
        processor = image_processor(self.method.config.views, self.data.channels)
        export_encoder(self.method.exported_encoder, processor, root)
        with replaced_folder(root / "pretraining") as folder:
            self.method.save_pretrained(folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """A few words in `args.output_dir`, where no card is. The card itself is made of facts: see
        `hf_ssl.hub.write_card`.
        """
        card = Path(str(self.args.output_dir)) / CARD
        if self.is_world_process_zero() and not card.exists():
            write_text(card, self._progress())

    def _progress(self) -> str:
        method = str(self.method.config.model_type).removeprefix("ssl_")
        return PROGRESS.format(
            tags="\n".join(f"- {tag}" for tag in (*TAGS, method)),
            name=self.hub_model_id,
            step=self.state.global_step,
            steps=self.state.max_steps,
        )

    # Publishing.

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Open or make the repo of `args.hub_model_id`; without one, of the output folder's name.

        Raises:
            UserError: there is no token that may write, or the Hub does not answer.
        """
        if not self.is_world_process_zero():
            return
        name = self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name
        self._pushes: list[Future] = []
        self._repo = self._guarded(
            name,
            lambda: open_repo(
                name,
                private=bool(self.args.hub_private_repo if private is None else private),
                token=token or self.args.hub_token,
                revision=self.args.hub_revision,
            ),
        )
        self.hub_model_id = self._repo.repo_id

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Write the encoder as it is now to `args.output_dir` and publish that folder.

        Arguments as in transformers. Returns a `hf_ssl.hub.remote.Published`, or a future of one if not
        `blocking`; None on other processes than the first.

        Raises:
            UserError: as `publish`.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        self.create_model_card()
        if not self.is_world_process_zero():
            return None
        arguments = (commit_message, token, revision)
        return self.publish_output(*arguments) if blocking else _background(self.publish_output, *arguments)

    def publish_output(
        self, commit_message: str | None = None, token: str | None = None, revision: str | None = None
    ) -> Published:
        """Publish `args.output_dir` as it is, once what is on its way has arrived.

        A run that was described (`facts.json`) goes as `hf-ssl publish` sends it, another one without card.

        Raises:
            UserError: as `publish`; the run itself is whole in its folder.
        """
        self._finish_current_push()
        folder, repo = Path(str(self.args.output_dir)), self._repo
        token, revision = token or self.args.hub_token, revision or self.args.hub_revision
        message = commit_message or "End of training"
        if (folder / FACTS).is_file():
            try:
                done = publish(folder, repo.repo_id, token=token, revision=revision, message=message)
            except UserError as error:
                again = f"hf-ssl publish {folder} {repo.repo_id}"
                raise UserError(f"the run is whole in {folder}, but {error} ({again})") from error
            assert done is not None, "only a dry run gives nothing"
            return done
        files: Files = {**encoder_files(folder), CARD: folder / CARD}
        return self._guarded(repo.repo_id, lambda: _checked(replace(repo, revision=revision), files, message))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Send what `args.hub_strategy` says in the background, from copies that nothing later can change."""
        strategy = HubStrategy(self.args.hub_strategy)
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        if not self.args.hub_always_push and any(not push.done() for push in self._pushes):
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        step, root = self.state.global_step, Path(str(self.args.output_dir))
        stage = root / f"{STAGING_PREFIX}push-{step}"
        shutil.rmtree(stage, ignore_errors=True)
        self._write_repo(stage)
        files: Files = {**encoder_files(stage), CARD: self._progress().encode()}
        prefix = None
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            source = Path(checkpoint_folder)
            prefix = LAST_CHECKPOINT if strategy == HubStrategy.CHECKPOINT else source.name
            files |= _linked(source, stage / prefix, prefix)
        message = f"Training in progress, step {step}"
        self._pushes.append(_background(_push, self._repo, files, message, prefix, stage))

    def _finish_current_push(self) -> None:
        """Wait for what is on its way."""
        if self.hub_model_id is None or not self._pushes:
            return
        if any(not push.done() for push in self._pushes):
            logger.warning("waiting for what is on its way to %s", self._repo.url)
        wait(self._pushes)
        self._pushes.clear()

    def _guarded(self, repo_id: str, call: Callable[[], Any]) -> Any:
        with told_in_a_sentence(repo_id, constants.ENDPOINT):
            return call()


# One thread for all: what is sent keeps its order.
_BACKGROUND = HfApi()


def _background(call: Callable[..., Any], *arguments: Any) -> Future:
    return _BACKGROUND.run_as_future(call, *arguments)


def _push(repo: Remote, files: Files, message: str, prefix: str | None, stage: Path) -> None:
    """Send, tell a failure, and remove the copies."""

    def ours(path: str) -> bool:
        return is_owned(path) or (prefix is not None and path.startswith(f"{prefix}/"))

    disable_progress_bars()  # training has its own
    try:
        with told_in_a_sentence(repo.repo_id, constants.ENDPOINT):
            _checked(repo, files, message, ours)
    except Exception as error:  # training goes on, whatever it was; the last push tries again and raises
        logger.warning("not pushed to %s: %s", repo.url, error)
    finally:
        enable_progress_bars()
        shutil.rmtree(stage, ignore_errors=True)


def _checked(
    repo: Remote, files: Files, message: str, is_ours: Callable[[str], bool] = is_owned
) -> Published:
    token = repo.api.token if isinstance(repo.api.token, str) else None
    check_leaks(files, secrets_here(Path.cwd(), token=token))
    return send(repo, files, is_owned=is_ours, message=message)


def _linked(source: Path, target: Path, prefix: str) -> Files:
    """The files of a checkpoint under second names, which stay when the checkpoint is rotated away."""
    target.mkdir(parents=True)
    files: Files = {}
    for path in sorted(source.iterdir()):
        if path.name == TRAINER_STATE_NAME:
            state = json.loads(path.read_text())
            if state.get("best_model_checkpoint"):  # a path of this machine
                state["best_model_checkpoint"] = Path(state["best_model_checkpoint"]).name
            files[f"{prefix}/{path.name}"] = json.dumps(state, indent=2).encode()
            continue
        try:
            os.link(path, target / path.name)
        except OSError:  # a file system without links
            shutil.copyfile(path, target / path.name)
        files[f"{prefix}/{path.name}"] = target / path.name
    return files
