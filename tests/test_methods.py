# SPDX-License-Identifier: Apache-2.0
"""What holds for every method, read from METHODS and each method's smoke recipe. A new method needs no new
line here.
"""

import copy
import inspect
from functools import cache
from itertools import product

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from messages import mentions
from priming import prime
from tiers import in_tiers
from transformers import AutoConfig, AutoModelForPreTraining

from hf_ssl.data import open_source, train_loader
from hf_ssl.errors import UserError
from hf_ssl.methods import METHODS
from hf_ssl.modeling.memory import Queue
from hf_ssl.modeling.outputs import RunProgress, SSLOutput
from hf_ssl.modeling.parallel_encoders import ParallelEncoders
from hf_ssl.recipe import load_recipe
from hf_ssl.resources import resource
from hf_ssl.run import build_model

TRANSFORMER = "hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 4, patch_size: 8"
BACKBONES = {
    "own": [],  # the smoke recipe's, a ResNet where the method trains one
    "vit": [f"backbone={{model_type: vit, intermediate_size: 32, {TRANSFORMER}}}"],
    "dinov2": [f"backbone={{model_type: dinov2, {TRANSFORMER}}}"],
    "convnextv2": [
        "backbone={model_type: convnextv2, hidden_sizes: [8, 16], depths: [1, 1], num_stages: 2, "
        "patch_size: 2}"
    ],
}


# The default tests use every method with its own encoder, one method with all encoders, and CMC with encoders
# that do not fold into one. The other pairs run with -m slow.
PAIRS = in_tiers(
    product(METHODS, BACKBONES),
    [*product(METHODS, ["own"]), *product(["simclr"], BACKBONES), ("cmc", "convnextv2")],
    as_one=True,
)


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@cache
def made(method, backbone):
    """Return the recipe, its model and a batch of 8 images of the trainer; None for impossible pairs."""
    chosen, overrides = load_recipe(f"smoke/{method}"), BACKBONES[backbone]
    known = chosen.model_class.backbone_types
    if overrides and known is not None and backbone not in known:
        with pytest.raises(UserError, match=mentions("backbone.model_type", backbone)):
            load_recipe(f"smoke/{method}", overrides)
        return None
    recipe = load_recipe(f"smoke/{method}", overrides) if overrides else chosen
    model = build_model(recipe, seed=0)
    loader = train_loader(open_source(recipe.data), recipe.views, config=recipe.data, seed=0, batch_size=8)
    return recipe, model, next(iter(loader)).inputs("cpu", model.sample_masks)


@pytest.fixture(params=PAIRS)
def parts(request):
    pair = request.param
    found = made(*pair)
    if found is None:
        pytest.skip(f"{pair[0]} does not train {pair[1]}")
    return found


@pytest.fixture
def recipe(parts):
    return parts[0]


@pytest.fixture
def model(parts):
    """Return a copy for each test."""
    return copy.deepcopy(parts[1])


@pytest.fixture
def batch(parts, model):
    prime(model, parts[2])
    return parts[2]


def test_its_pictures_have_captions(recipe, model, batch):
    """The card shows only pictures with a caption."""
    assert model.eval().pictures(batch).keys() == METHODS[recipe.method["name"]].captions.keys()


def test_every_trainable_parameter_has_a_finite_gradient(model, batch):
    output = model.train()(**batch)
    assert isinstance(output, SSLOutput)
    assert output.loss.ndim == 0 and output.loss.isfinite()
    output.loss.backward()
    without = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]
    assert without == []
    # an attention's key bias drops out of the softmax, so its gradient is zero in truth
    still = [
        n
        for n, p in model.named_parameters()
        if p.requires_grad and not p.grad.any() and "k_proj.bias" not in n and "key.bias" not in n
    ]
    assert [name for name in still if not name.endswith(("grn.weight", "grn.bias"))] == []


def test_output_names_its_terms_and_embeddings(model, batch):
    output = model.train()(**batch)
    assert output.terms
    for name, term in output.terms.items():
        assert term.ndim == 0 and not term.requires_grad, name
    assert output.embeddings.shape[0] == len(batch["pixel_values"])
    assert output.embeddings.ndim == 3


def test_objective_is_pure_and_forward_is_embed_then_objective(model, batch):
    model.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        embeddings = model.embed(batch)
        assert all(len(value) == len(batch["pixel_values"]) for value in embeddings.values())
        once, again, whole = (
            model.objective(embeddings).loss,
            model.objective(embeddings).loss,
            model(**batch).loss,
        )
    assert torch.equal(once, again) and torch.equal(once, whole)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), f"{name} changed outside of training"


def test_forward_takes_no_surprises(model):
    kinds = {parameter.kind for parameter in inspect.signature(model.forward).parameters.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert model.accepts_loss_kwargs is False


def test_initial_weights_depend_on_the_seed_alone(recipe, model):
    again, other = build_model(recipe, seed=0), build_model(recipe, seed=1)
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert any(not torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())


def test_saved_and_loaded_through_the_auto_class_it_is_the_same(model, recipe, batch, tmp_path):
    model.train()(**batch)  # moves statistics, so that buffers are not all as built
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not any(info.values()), info
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == trainable
    # The test uses float64, because torch may choose kernels with other rounding for loaded tensors.
    batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    with torch.no_grad():
        losses = [each.eval().double()(**batch).loss for each in (model, loaded)]
    assert losses[0].dtype == torch.float64
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=1e-14)
    assert AutoConfig.from_pretrained(tmp_path).to_dict()["views"] == recipe.views.to_dict()


def test_teachers_start_as_their_students_and_stay_frozen(model, tmp_path):
    model.save_pretrained(tmp_path)
    for each in (model, AutoModelForPreTraining.from_pretrained(tmp_path)):
        for student, teacher in each.student_teacher:
            followed = each.get_submodule(teacher).state_dict()
            for name, value in each.get_submodule(student).state_dict().items():
                assert torch.equal(followed[name], value), f"{teacher}.{name}"
            assert not any(p.requires_grad for p in each.get_submodule(teacher).parameters())


def test_bfloat16_autocast(model, batch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.train()(**batch).loss
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()


def test_hooks_run_without_touching_the_gradient(model, batch):
    progress = RunProgress(step=0, total_steps=10, steps_per_epoch=5)
    model.train()
    model.before_epoch(progress)
    model.before_step(progress)
    model(**batch).loss.backward()
    model.after_backward(progress)
    model.after_step(RunProgress(step=1, total_steps=10, steps_per_epoch=5))
    assert any(p.grad is not None for p in model.parameters())


def test_it_is_in_the_table_with_a_card_section_and_a_smoke_recipe(method):
    row = METHODS[method]
    assert "arXiv:" in row.paper
    section = resource("model_cards", "methods", f"{method}.md").read_text()
    for label in ("**What it is.**", "**When to choose it.**", "**What it costs.**", "**Citation.**"):
        assert label in section, label
    assert resource("recipes", "smoke", f"{method}.yaml").exists()


def test_its_config_checks_types(method):
    """`@strict` rejects a value of a wrong type; without it, the value would be used."""
    config = METHODS[method].config_class()
    with pytest.raises(StrictDataclassFieldValidationError):
        config(views="none")


def test_its_exported_encoder_is_native(model):
    encoder = model.exported_encoder
    for part in encoder.parts if isinstance(encoder, ParallelEncoders) else [encoder]:
        assert type(part).__module__.startswith("transformers.models.")


def test_its_exported_encoder_stores_the_published_feature(model):
    stored = model.exported_encoder.config.to_dict().get("published_feature", "auto")
    assert stored == model.published_feature


def test_a_memory_bank_needs_row_numbers(method):
    """Rows of a stream have no number."""
    if not load_recipe(f"smoke/{method}").model_class.needs_sample_index:
        assert load_recipe(f"smoke/{method}", ["data.streaming=true"]).data.streaming
        return
    with pytest.raises(
        UserError, match=mentions("data.streaming", "data.streaming=false", "MoCo", "in-batch negatives")
    ):
        load_recipe(f"smoke/{method}", ["data.streaming=true"])


def test_a_memory_of_all_images_has_a_place_for_each(method):
    recipe = load_recipe(f"smoke/{method}")
    if recipe.model_class.needs_sample_index:
        model = build_model(recipe, seed=0)
        assert model.config.num_samples == open_source(recipe.data).num_rows
        with pytest.raises(UserError, match=mentions("num_samples", 5, model.config.num_samples)):
            model.check_source(streaming=False, num_rows=5)


@pytest.mark.parametrize(
    ("method", "override", "valid"),
    [
        ("swav", "epsilon=0.0", "above 0"),
        ("swav", "sinkhorn_iterations=0", "at least 1"),
        ("swav", "prototypes=1", "at least 2"),
        ("swav", "queue_size=-1", "at least 0"),
        ("dino", "output_size=1", "at least 2"),
        ("dino", "projection_layers=0", "at least 1"),
        ("dino", "center_momentum=1.5", "from 0 to 1"),
        ("dino", "drop_path_rate=1.0", "less than 1"),
        ("ijepa", "predictor_hidden_size=15", "a multiple of 4"),
        ("ijepa", "predictor_depth=0", "at least 1"),
        ("ijepa", "target_blocks=0", "at least 1"),
        ("ijepa", "context_more_than=-1", "at least 0"),
        ("deepcluster_v2", "prototypes=[8, 1]", "at least 2"),
        ("deepcluster_v2", "prototypes=[]", "at least 2"),
        ("deepcluster_v2", "kmeans_iterations=0", "at least 1"),
        ("directpred", "exponent=0.0", "above 0"),
        ("directpred", "epsilon=-0.1", "at least 0"),
        ("directpred", "correlation_momentum=1.5", "0 to 1"),
        ("dino", "center_momentum=-0.1", "0 to 1"),
        ("simclr", "projection_layers=0", "at least 1"),
        ("simclr", "projection_size=0", "at least 1"),
        ("simclr", "projection_hidden_size=-1", "at least 1"),
        ("cpc", "projection_size=0", "at least 1"),
        ("dino", "bottleneck_size=0", "at least 1"),
        ("directpred", "update_frequency=0", "at least 1"),
        ("byol", "predictor_layers=-1", "at least 0"),
        ("simsiam", "predictor_layers=-1", "at least 0"),
        ("ijepa", "distance=l1", "squared_l2"),
        ("moco", "queue_size=0", "at least 1"),
        ("moco", "batch_norm_splits=0", "at least 1"),
        ("pirl", "pretext=colors", "jigsaw_rotation"),
        ("pirl", "loss=nce", "vissl"),
        ("pirl", "head=mlp", "vissl_mlp"),
        ("pirl", "pretext_weight=1.5", "from 0 to 1"),
        ("pirl", "patch_size=0", "at least 1"),
        ("pirl", "negatives=0", "at least 1"),
        ("pirl", "bank_momentum=1.0", "less than 1"),
        ("pirl", "bank_start=zero", "uniform"),
        ("pirl", "bank_precision=int8", "float16"),
    ],
)
def test_the_message_about_a_wrong_setting_names_one_key(method: str, override: str, valid: str) -> None:
    key, _, value = override.partition("=")
    with pytest.raises(UserError, match=mentions(f"method.{key}", valid, value)) as error:
        load_recipe(f"smoke/{method}", [f"method.{override}"])
    assert str(error.value).count("method.") == 1


@pytest.mark.parametrize("method", METHODS)
def test_loading_an_encoder_initializes_every_buffer(method: str) -> None:
    """transformers creates what a checkpoint lacks on the meta device, and then calls `_init_weights`."""
    recipe = load_recipe(f"smoke/{method}")
    config = recipe.config()
    if recipe.model_class.needs_sample_index:
        config.num_samples = 64
    fresh = recipe.model_class(config)
    with torch.device("meta"):
        loaded = recipe.model_class(config)
    loaded.to_empty(device="cpu")
    for buffer in loaded.buffers():
        buffer.fill_(7)
    loaded.init_weights()
    for name, buffer in fresh.named_buffers():
        owner, _, last = name.rpartition(".")
        if isinstance(fresh.get_submodule(owner), Queue) and last == "rows":  # random unit vectors
            norms = loaded.get_buffer(name).norm(dim=-1)
            torch.testing.assert_close(norms, torch.ones_like(norms))
        else:
            torch.testing.assert_close(loaded.get_buffer(name), buffer, msg=name)
