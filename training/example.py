# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# ///
"""Trains a ResNet-18 with SimCLR: `python training/example.py PHOTOS`, a folder or a data set on the Hub."""

import sys

from datasets import load_dataset
from transformers import EarlyStoppingCallback, ResNetConfig

from hf_ssl import SimCLRConfig, SimCLRForPreTraining, SSLTrainer, SSLTrainingArguments

data = load_dataset(sys.argv[1])  # a folder contains train/CLASS/*.jpg and test/CLASS/*.jpg
backbone = ResNetConfig(layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512])
trainer = SSLTrainer(
    model=SimCLRForPreTraining(SimCLRConfig(backbone_config=backbone, views={"size": 64})),
    args=SSLTrainingArguments(
        output_dir="out",
        num_train_epochs=20,
        warmup_epochs=2,
        per_device_train_batch_size=64,
        report_to="none",
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_knn",
    ),
    train_dataset=data["train"],  # labels have no effect on training
    eval_dataset=data,  # labeled images: 20-NN accuracy of `test` with the labels of `train`
    callbacks=[EarlyStoppingCallback(early_stopping_patience=5)],
)
trainer.train()
trainer.save_model()  # writes the encoder, its image processor and the method model to "out"
