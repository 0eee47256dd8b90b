import random
from types import SimpleNamespace

import numpy as np
import pytest

from eval.scoring.conditions import Noise, make_conditions, other_images
from eval.scoring.evaluated_models import EvaluatedModel
from eval.scoring.score_names import CONDITIONS
from workspace.errors import StageError

STORE = SimpleNamespace(image_ids=np.arange(100, 140), root="data/features")


@pytest.mark.parametrize("count", [2, 3, 4, 5, 39, 40])
def test_every_image_gets_another_one_of_the_set_and_none_twice(count):
    image_ids = random.Random(count).sample(range(100, 140), count)
    others = other_images(image_ids, STORE)
    assert others.keys() == set(others.values()) == set(image_ids)
    assert all(own != other for own, other in others.items())


def test_the_pairing_depends_on_the_set_alone():
    image_ids = [131, 101, 120, 107, 139]
    wanted = other_images(image_ids, STORE)
    assert other_images(image_ids[::-1] + image_ids, STORE) == wanted
    assert other_images(tuple(sorted(image_ids)), STORE) == wanted


@pytest.mark.parametrize("image_id", [100, 117, 139])
def test_a_single_image_gets_another_one_of_the_store(image_id):
    other = other_images([image_id, image_id], STORE)[image_id]
    assert other != image_id
    assert other in STORE.image_ids


def test_a_store_of_one_image_has_no_wrong_image_control(make_store):
    store = make_store([7])
    with pytest.raises(StageError, match="holds one image"):
        other_images([7, 7], store)


def test_no_images_have_no_others():
    assert other_images([], STORE) == {}


def test_the_four_conditions_differ_in_one_thing_each(store):
    model = EvaluatedModel("x", "model", "untrained", None, store, 3, "x")
    seen, blind, noise, untrained = make_conditions(model, [139, 100, 139])
    assert tuple(condition.name for condition in (seen, blind, noise, untrained)) == CONDITIONS
    assert (seen.model, seen.features, seen.image_ids) == ("model", store, [139, 100, 139])
    assert (blind.model, blind.features, blind.image_ids) == ("model", store, [100, 139, 100])
    assert (noise.model, noise.image_ids) == ("model", [139, 100, 139])
    assert isinstance(noise.features, Noise)
    assert (untrained.model, untrained.features) == ("untrained", store)
    assert untrained.image_ids == [139, 100, 139]


def test_noise_is_as_large_as_the_features_channel_by_channel(store):
    noise = Noise(store, 0).gather(np.arange(10**4)).astype(np.float32)
    features = store.gather(store.image_ids).astype(np.float32)
    assert noise.mean((0, 1)) == pytest.approx(features.mean((0, 1)), abs=0.05)
    assert noise.std((0, 1)) == pytest.approx(features.std((0, 1)), rel=0.05)


def test_noise_belongs_to_its_id_and_to_the_seed(store):
    noise = Noise(store, 0)
    ids = np.array([139, -7, 100, 2**62])
    whole = noise.gather(ids)
    assert whole.shape == (4, store.spec.patches, store.spec.width)
    assert whole.dtype == np.float16
    assert np.array_equal(noise.gather(ids[::-1])[::-1], whole)
    assert np.array_equal(Noise(store, 0).gather(ids), whole)
    assert not np.array_equal(Noise(store, 1).gather(ids), whole)
    assert len({row.tobytes() for row in whole}) == 4
    into = np.empty_like(whole)
    assert noise.gather(ids, into) is into
    assert np.array_equal(into, whole)


def test_noise_tells_nothing_of_the_image(store):
    noise = Noise(store, 0).gather(store.image_ids).astype(np.float32)
    features = store.gather(store.image_ids).astype(np.float32)
    correlation = np.corrcoef(noise.ravel(), features.ravel())[0, 1]
    assert abs(correlation) < 0.1
