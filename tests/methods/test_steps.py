# SPDX-License-Identifier: Apache-2.0
"""Three training steps of a method equal a slow version of the paper's loop, written here in plain torch."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from hf_ssl.methods.byol.configuration_byol import BYOLConfig
from hf_ssl.methods.byol.modeling_byol import BYOLForPreTraining
from hf_ssl.methods.deepcluster_v2.configuration_deepcluster_v2 import DeepClusterV2Config
from hf_ssl.methods.deepcluster_v2.modeling_deepcluster_v2 import DeepClusterV2ForPreTraining
from hf_ssl.methods.directpred.configuration_directpred import DirectPredConfig
from hf_ssl.methods.directpred.modeling_directpred import DirectPredForPreTraining
from hf_ssl.methods.moco.configuration_moco import MoCoConfig
from hf_ssl.methods.moco.modeling_moco import MoCoForPreTraining
from hf_ssl.methods.swav.configuration_swav import SwAVConfig
from hf_ssl.methods.swav.modeling_swav import SwAVForPreTraining
from hf_ssl.modeling.outputs import RunProgress

RESNET = {
    "model_type": "resnet", "layer_type": "basic", "embedding_size": 4, "depths": [1], "hidden_sizes": [6]
}  # fmt: skip
STEPS, BATCH, RATE = 3, 6, 0.5


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, 2, 3, 16, 16, generator=generator, dtype=torch.float64) for _ in range(STEPS)]


def build(model_class, config):
    torch.manual_seed(0)
    return model_class(config).double().train()


def train(model, batches):
    """What SSLTrainer does around each step, with plain SGD. Returns the losses."""
    return [loss for step, batch in enumerate(batches) for loss in train_one(model, batch, step)]


def train_one(model, batch, step):
    """What SSLTrainer does around one step, with plain SGD. Returns the loss in a list."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], RATE)
    model.before_step(RunProgress(step, STEPS, steps_per_epoch=STEPS))
    loss = model(pixel_values=batch).loss
    loss.backward()
    model.after_backward(RunProgress(step, STEPS, steps_per_epoch=STEPS))
    optimizer.step()
    optimizer.zero_grad()
    model.after_step(RunProgress(step + 1, STEPS, steps_per_epoch=STEPS))
    return [loss.item()]


class Network(nn.Module):
    """A copy of some parts of a method, one after the other; the first is an encoder of transformers."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(copy.deepcopy(part) for part in parts).requires_grad_()

    def forward(self, images):
        x = self.parts[0](pixel_values=images).pooler_output.flatten(1)
        for part in self.parts[1:]:
            x = part(x)
        return x


def descend(network, loss):
    parameters = list(network.parameters())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter -= RATE * gradient


def follow(teacher, student, momentum):
    with torch.no_grad():
        for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
            slow.copy_(momentum * slow + (1 - momentum) * fast)


def assert_same_weights(part, expected):
    for (name, value), other in zip(part.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("symmetric", [False, True])
def test_moco(batches, symmetric):
    config = MoCoConfig(
        backbone_config=RESNET, queue_size=16, projection_size=5, momentum=0.9, temperature=0.3,
        symmetric=symmetric,
    )  # fmt: skip
    model = build(MoCoForPreTraining, config)
    query_net, key_net = (Network(model.backbone, model.projector) for _ in "qk")
    queue, pointer = model.queue.rows.clone(), 0
    losses = train(model, batches)
    for batch, got in zip(batches, losses, strict=True):
        follow(key_net, query_net, 0.9)
        pairs = [(batch[:, 0], batch[:, 1])] + ([(batch[:, 1], batch[:, 0])] if symmetric else [])
        loss, all_keys = 0.0, []
        asked = [normalize(query_net(first), dim=1) for first, _ in pairs]
        for queries, (_, second) in zip(asked, pairs, strict=True):
            with torch.no_grad():
                keys = normalize(key_net(second), dim=1)
            all_keys.append(keys)
            for query, key in zip(queries, keys, strict=True):
                scores = torch.stack([query @ key, *(query @ normalize(row, dim=0) for row in queue)]) / 0.3
                loss = loss + (scores.logsumexp(0) - scores[0]) / BATCH / len(pairs)
        assert got == pytest.approx(loss.item(), rel=1e-9)
        descend(query_net, loss)
        for key in torch.cat(all_keys):
            queue[pointer] = key
            pointer = (pointer + 1) % 16
    torch.testing.assert_close(model.queue.rows, queue, rtol=1e-9, atol=1e-11)
    assert model.queue.total % 16 == pointer
    assert_same_weights(model.teacher_backbone, key_net.parts[0])
    assert_same_weights(model.projector, query_net.parts[1])


def test_byol(batches):
    config = BYOLConfig(backbone_config=RESNET, projection_size=5, projection_hidden_size=16, momentum=0.8)
    model = build(BYOLForPreTraining, config)
    online = Network(model.backbone, model.projector, model.predictor)
    target = Network(model.backbone, model.projector)
    losses = train(model, batches)
    for step, (batch, got) in enumerate(zip(batches, losses, strict=True)):
        loss = 0.0
        for seen, aimed in ((0, 1), (1, 0)):
            predictions = online(batch[:, seen])
            with torch.no_grad():
                targets = target(batch[:, aimed])
            for prediction, wanted in zip(predictions, targets, strict=True):
                loss = loss + (2 - 2 * prediction @ wanted / prediction.norm() / wanted.norm()) / BATCH
        assert got == pytest.approx(loss.item(), rel=1e-9)
        descend(online, loss)
        momentum = 1 - (1 - 0.8) * (math.cos(math.pi * step / STEPS) + 1) / 2
        follow(target, nn.ModuleList(online.parts[:2]), momentum)
    assert_same_weights(model.teacher_backbone, target.parts[0])
    assert_same_weights(model.teacher_projector, target.parts[1])
    assert_same_weights(model.predictor, online.parts[2])


def boosted(correlation, epsilon):
    """The predictor of DirectPred (arXiv:2102.06810, eq. 18), with the largest eigenvalue scaled to 1."""
    values, vectors = torch.linalg.eigh(correlation)
    shares = [math.sqrt(max(0.0, value) / max(values)) + epsilon for value in values.tolist()]
    return sum(share * torch.outer(v, v) for share, v in zip(shares, vectors.T, strict=True))


def copied(correlation, epsilon):
    """The predictor of the authors' DirectCopy: the matrix itself plus epsilon times the identity."""
    return correlation + epsilon * torch.eye(len(correlation), dtype=correlation.dtype)


# The momentum of the paper, and one at which the start of the moving average matters; every second step with
# and without gradient; both kinds of eigenvalues for each exponent.
@pytest.mark.parametrize(
    ("fields", "predictor_of"),
    [
        ({}, boosted),
        ({"correlation_momentum": 0.8}, boosted),
        ({"exponent": 1.0, "correlation_momentum": 0.8}, copied),
        ({"update_frequency": 2}, boosted),
        ({"update_frequency": 2, "exponent": 1.0}, copied),
        ({"update_frequency": 2, "learn_between_updates": False}, boosted),
    ],
)
def test_directpred(batches, fields, predictor_of):
    """The loop of the authors' `byol_trainer.py`. A batch first changes the correlation matrix, the first
    batch by copying. The optimizer's step changes predictor and network. Then, once in `update_frequency`
    steps, the predictor is computed. Its initial value, which is random there, is given here.
    """
    config = DirectPredConfig(
        backbone_config=RESNET, projection_size=4, projection_hidden_size=16, momentum=0.8, momentum_end=0.8,
        **fields,
    )  # fmt: skip
    model = build(DirectPredForPreTraining, config)
    online, target = (Network(model.backbone, model.projector) for _ in "ot")
    rho, frequency = fields.get("correlation_momentum", 0.3), fields.get("update_frequency", 1)
    correlation, predictor = None, torch.eye(4).double()
    batches = [*batches, batches[0].flip(0), batches[1].flip(1)]
    losses, weights = [], []
    for step, batch in enumerate(batches):
        losses += train_one(model, batch, step)
        weights.append(model.predictor.weight.detach().clone())
    for step, (batch, got, used) in enumerate(zip(batches, losses, weights, strict=True)):
        projections = [online(batch[:, view]) for view in range(2)]
        outer = [torch.outer(row, row) for row in torch.cat(projections).detach()]
        matrix = sum(outer) / len(outer)
        correlation = matrix if correlation is None else rho * correlation + (1 - rho) * matrix
        predictor = predictor.clone().requires_grad_()
        loss = 0.0
        for seen, aimed in ((0, 1), (1, 0)):
            with torch.no_grad():
                targets = target(batch[:, aimed])
            for row, wanted in zip(projections[seen], targets, strict=True):
                prediction = predictor @ row
                loss = loss + (2 - 2 * prediction @ wanted / prediction.norm() / wanted.norm()) / BATCH
        assert got == pytest.approx(loss.item(), rel=1e-9)
        (slope,) = torch.autograd.grad(loss, predictor, retain_graph=True)
        predictor = predictor.detach()
        if frequency > 1 and fields.get("learn_between_updates", True):
            torch.testing.assert_close(used, predictor - RATE * slope, rtol=1e-7, atol=1e-9)
            predictor = predictor - RATE * slope
        descend(online, loss)
        if step % frequency == 0:
            predictor = predictor_of(correlation, 0.1)
        follow(target, online, 0.8)
    torch.testing.assert_close(model.predictor.correlation, correlation, rtol=1e-9, atol=1e-11)
    assert_same_weights(model.teacher_backbone, target.parts[0])


@pytest.mark.parametrize(
    ("fields", "power", "normalized"),
    [
        ({"exponent": 1.0, "normalize_eigenvalues": True}, 1.0, True),
        ({"normalize_eigenvalues": False}, 0.5, False),
        ({"epsilon": 0.0}, 0.5, True),
    ],
)
def test_eigenvalues_of_the_predictor(fields, power, normalized):
    """Eigenvalues are normalized as the config says. Normalized ones are at least 1e-4."""
    config = DirectPredConfig(backbone_config=RESNET, projection_size=3, projection_hidden_size=8, **fields)
    model = build(DirectPredForPreTraining, config)
    model.predictor.correlation.copy_(torch.diag(torch.tensor([4.0, 0.25, 0.0])))
    model.before_step(RunProgress(1, STEPS, STEPS))
    scale, least = (4.0, 1e-4) if normalized else (1.0, 0.0)
    expected = [max(least, (v / scale) ** power + fields.get("epsilon", 0.1)) for v in (4.0, 0.25, 0.0)]
    torch.testing.assert_close(model.predictor.weight.diag().tolist(), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("frequency", [1, 2])
def test_a_checkpoint_of_a_constant_predictor_loads_into_a_learned_one(frequency, tmp_path):
    fields = {"backbone_config": RESNET, "projection_size": 4, "projection_hidden_size": 16}
    old = DirectPredForPreTraining(DirectPredConfig(**fields, update_frequency=frequency))
    assert isinstance(old.predictor.weight, nn.Parameter) == (frequency == 2)
    torch.nn.init.normal_(old.predictor.weight)
    old.save_pretrained(tmp_path)
    new, info = DirectPredForPreTraining.from_pretrained(
        tmp_path, config=DirectPredConfig(**fields, update_frequency=3 - frequency), output_loading_info=True
    )
    assert not any(info.values())
    assert torch.equal(new.predictor.weight, old.predictor.weight)


def test_swav_with_a_queue(batches):
    """The queue holds the batch before, and is used from the step on when it is full."""
    config = SwAVConfig(
        backbone_config=RESNET, prototypes=5, projection_size=4, projection_hidden_size=16, queue_size=BATCH,
        queue_start_epoch=0.0, prototype_freeze_steps=0,
    )  # fmt: skip
    model = build(SwAVForPreTraining, config)
    network = Network(model.backbone, model.projector)
    prototypes = model.prototypes.weight.detach().clone().requires_grad_()
    queues = [None, None]
    losses = train(model, batches)
    for batch, got in zip(batches, losses, strict=True):
        with torch.no_grad():
            prototypes /= prototypes.norm(dim=1, keepdim=True)
        # all views in one batch, as the authors' code has it
        both = normalize(network(batch.flatten(0, 1)), dim=1).unflatten(0, (BATCH, 2))
        scores = [both[:, view] @ prototypes.T for view in range(2)]
        loss = 0.0
        for assigned, predicting in ((0, 1), (1, 0)):
            known = scores[assigned].detach()
            if queues[assigned] is not None:
                known = torch.cat([known, queues[assigned] @ prototypes.detach().T])
            shares = slow_sinkhorn(known, 0.05, 3)[:BATCH]
            for share, row in zip(shares, scores[predicting], strict=True):
                loss = loss - (share * (row / 0.1).log_softmax(0)).sum() / BATCH / 2
        assert got == pytest.approx(loss.item(), rel=1e-7)
        gradient = torch.autograd.grad(loss, prototypes, retain_graph=True)[0]
        descend(network, loss)
        with torch.no_grad():
            prototypes -= RATE * gradient
        queues = [both[:, view].detach() for view in range(2)]
    for queue, expected in zip(model.queues, queues, strict=True):
        torch.testing.assert_close(queue.rows, expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(model.prototypes.weight, prototypes, rtol=1e-7, atol=1e-9)


def slow_sinkhorn(scores, epsilon, iterations):
    """Algorithm 1 of the paper's appendix: K x B, rows then columns."""
    shares = (scores / epsilon).exp().T
    shares = shares / shares.sum()
    prototypes, batch = shares.shape
    for _ in range(iterations):
        shares = shares / shares.sum(1, keepdim=True) / prototypes
        shares = shares / shares.sum(0, keepdim=True) / batch
    return (shares * batch).T


def slow_kmeans(rows, clusters, iterations, seed):
    """Centroids, and the cluster of each row; a cluster without rows takes the row farthest from its own."""
    generator = torch.Generator().manual_seed(seed)
    centroids = [rows[i] for i in torch.randperm(len(rows), generator=generator)[:clusters]]
    for turn in range(iterations + 1):
        found = [max(range(clusters), key=lambda k, row=row: row @ centroids[k]) for row in rows]
        if turn == iterations:
            return torch.stack(centroids), found
        farthest = sorted(range(len(rows)), key=lambda i: rows[i] @ centroids[found[i]])
        for k in range(clusters):
            members = [row for row, mine in zip(rows, found, strict=True) if mine == k]
            total = sum(members) if members else rows[farthest.pop(0)]
            centroids[k] = total / total.norm()


def test_deepcluster_v2():
    """Two passes over 14 images in batches of 6: in the first pass images 3 and 8 are in no batch."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(14, 2, 3, 16, 16, generator=generator, dtype=torch.float64)
    passes = [
        [[0, 1, 2, 4, 5, 6], [7, 9, 10, 11, 12, 13]],
        [[13, 1, 3, 5, 7, 9], [12, 0, 2, 4, 6, 8]],
    ]
    config = DeepClusterV2Config(
        backbone_config=RESNET, prototypes=[3, 4, 2], projection_size=4, projection_hidden_size=16,
        kmeans_iterations=3, num_samples=14,
    )  # fmt: skip
    model = build(DeepClusterV2ForPreTraining, config)
    network = Network(model.backbone, model.projector)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], RATE)

    def project(index):  # all views in one batch, as the authors' code has it
        return normalize(network(images[index].flatten(0, 1)), dim=1).unflatten(0, (len(index), 2))

    memory = {}
    for index in map(list, passes[0]):
        model.fill_memory({"pixel_values": images[index], "sample_index": torch.tensor(index)})
        memory |= dict(zip(index, project(index).detach(), strict=True))
    step = 0
    for batches in passes:
        known = sorted(memory)
        heads = []
        for number, count in enumerate(config.prototypes):
            rows = torch.stack([memory[i][number % 2] for i in known])
            centroids, found = slow_kmeans(rows, count, 3, seed=step * 3 + number)
            heads.append((centroids, dict(zip(known, found, strict=True))))
        for index in map(list, batches):
            progress = RunProgress(step, 4, steps_per_epoch=2)
            if step % 2 == 0:
                model.before_epoch(progress)
            model.before_step(progress)
            got = model(pixel_values=images[index], sample_index=torch.tensor(index)).loss
            got.backward()
            optimizer.step()
            optimizer.zero_grad()
            rows = project(index)
            loss = 0.0
            for centroids, clusters in heads:
                entropies = [
                    -(row @ centroids.T / 0.1).log_softmax(0)[clusters[i]]
                    for i, views in zip(index, rows, strict=True)
                    if i in clusters
                    for row in views
                ]
                loss = loss + sum(entropies) / len(entropies) / len(heads)
            assert got.item() == pytest.approx(loss.item(), rel=1e-7)
            descend(network, loss)
            memory |= dict(zip(index, rows.detach(), strict=True))
            step += 1
        for head, expected, (centroids, clusters) in zip(model.heads, model.bank.labels, heads, strict=True):
            torch.testing.assert_close(head.weight, centroids, rtol=1e-7, atol=1e-9)
            assert expected.tolist() == [clusters.get(i, -100) for i in range(14)]
    torch.testing.assert_close(
        model.bank.rows, torch.stack([memory[i] for i in range(14)], dim=1), rtol=1e-7, atol=1e-9
    )
    assert len({tuple(row) for row in model.bank.labels.tolist()}) == 3


def test_the_momentum_of_a_model_that_starts_from_an_encoder_is_the_configs(tmp_path):
    config = BYOLConfig(backbone_config=RESNET, projection_size=5, projection_hidden_size=16, momentum=0.8)
    BYOLForPreTraining(config).backbone.save_pretrained(tmp_path)
    loaded = BYOLForPreTraining.from_pretrained(tmp_path, config=config)
    assert loaded.momentum.item() == pytest.approx(0.8)
