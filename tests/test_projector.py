# SPDX-License-Identifier: Apache-2.0
"""`--layer projector` measures what the projector of a run computes from the features of its encoder."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from messages import mentions
from torch.nn.functional import normalize

from hf_ssl import run
from hf_ssl.building import build_model
from hf_ssl.data import DataConfig, labeled_images
from hf_ssl.errors import UserError
from hf_ssl.evaluation import EvaluationConfig, evaluate_features, extract_features, load_encoder
from hf_ssl.evaluation.feature_cache import encoder_fingerprint
from hf_ssl.hub.export import load_method_model
from hf_ssl.methods import METHODS
from hf_ssl.projector import ProjectedEncoder, load_projected_encoder, projector_settings
from hf_ssl.recipe import load_recipe

WITHOUT = {"cpc", "mae", "ijepa"}


def new_model(method: str) -> torch.nn.Module:
    model = build_model(load_recipe(f"smoke/{method}"), seed=0).eval()
    with torch.no_grad():  # teachers differ from their students, and BatchNorm from its start
        for number, value in enumerate(model.state_dict().values()):
            if value.is_floating_point():
                value += 0.01 * torch.rand(value.shape, generator=torch.Generator().manual_seed(number))
    return model


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_projector_or_says_that_it_has_none(method: str) -> None:
    model = new_model(method)
    if method in WITHOUT:
        with pytest.raises(UserError, match=mentions("--layer projector", "--layer encoder")):
            ProjectedEncoder(model)
        return
    recipe = load_recipe(f"smoke/{method}")
    images = torch.rand(3, 3, recipe.views.final_size, recipe.views.final_size)
    with torch.inference_mode():
        z = ProjectedEncoder(model)(images).pooler_output
        inputs = {"pixel_values": images[:, None]}
        keys = {"sample_index": torch.arange(3), "draw_seeds": torch.arange(3)}
        if method == "dino":  # the teacher is published
            torch.testing.assert_close(normalize(z), model.embed(inputs)["teacher"][:, 0])
        elif method == "cmc":
            own = model.embed(inputs | keys)["projections"]
            torch.testing.assert_close(normalize(z.unflatten(1, own.shape[1:]), dim=-1), own)
        elif method == "pirl":
            torch.testing.assert_close(normalize(z), model.embed_images(inputs | keys)["projections"])
        else:
            torch.testing.assert_close(z, model.project_views(images[:, None])[:, 0])


def test_features_of_the_projector_have_their_own_place_in_the_cache() -> None:
    model = ProjectedEncoder(new_model("simclr"))
    before = encoder_fingerprint(model)
    with torch.no_grad():
        next(model.projectors.parameters()).add_(1)
    assert None not in (before, encoder_fingerprint(model)) and before != encoder_fingerprint(model)


def test_evaluate_measures_both(finished_run: Path, capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    data = DataConfig(path="digits")
    config = EvaluationConfig(
        protocols=["knn", "quality"],
        max_train_images=80,
        max_test_images=40,
        precision="float32",
        baselines=False,
    )
    # `quality` augments with the encoder, so it is not measured for the projector.
    results = run.evaluate(str(finished_run), data, config, tmp_path, layer="projector")
    assert list(results) == ["encoder", "projector"] and "projector" in capsys.readouterr().out
    model = load_method_model(finished_run / "pretraining").eval()
    _, processor = load_encoder(str(finished_run))
    splits = [labeled_images(data, split, max_images=count) for split, count in (("train", 80), ("test", 40))]
    rows = []
    for images in splits:
        h = extract_features(model.backbone, processor, images.iter_batches(40))
        with torch.inference_mode():
            rows += [model.projector(h), images.labels]
    expected = evaluate_features({"protocols": ["knn"]}, *rows)
    found = results["projector"]
    assert [each["value"] for each in found["protocols"]] == [each["value"] for each in expected["protocols"]]
    assert found["feature_size"] == rows[0].shape[1]
    assert found["statistics"] == pytest.approx(expected["statistics"], rel=1e-3)
    assert "quality" in results["encoder"] and "quality" not in found


def test_mistakes_are_one_sentence(tmp_path: Path, finished_run: Path) -> None:
    with pytest.raises(UserError, match=mentions("--layer projector", "pretraining/", tmp_path)):
        load_projected_encoder(str(tmp_path))
    with pytest.raises(UserError, match=mentions("--layer projector", "fine_tune")):
        projector_settings(EvaluationConfig(protocols=["fine_tune"]))
    kept = projector_settings(EvaluationConfig(protocols=["knn", "fine_tune"], pooling="cls"))
    assert kept == replace(EvaluationConfig(), protocols=["knn"], patch_grid=[])
    with pytest.raises(UserError, match="--layer"):
        run.evaluate(str(finished_run), DataConfig(path="digits"), EvaluationConfig(), layer="last")
