import random

import pytest

from demo.contexts import COLUMN_WORDS, ROW_WORDS, inventory, notes, raster
from demo.scenes import NOUNS, Scene, scene_at
from demo.twins import near_twin
from demo.words import NUMBERS, noun_of

SCENES = [scene_at(1, "test", index) for index in range(100)]


def without_texture(scene):
    return Scene(background=scene.background, kinds=scene.kinds, texture=0)


@pytest.mark.parametrize("write", [notes, inventory])
def test_a_text_in_full_tells_every_fact(write):
    for index, scene in enumerate(SCENES):
        text = write(scene, random.Random(index)).lower()
        assert scene.background in text
        for kind in scene.kinds:
            assert f"{kind.size} {kind.colour} {kind.noun}" in text
        assert all(noun in text for noun in map(noun_of, scene.kinds))


@pytest.mark.parametrize("side", [6, 7])
def test_a_raster_names_each_thing_where_it_is_and_nothing_else(side):
    for index, scene in enumerate(SCENES):
        cells = raster(scene, random.Random(index), side, share=0.7)
        assert len(cells) == side * side
        assert all(1 <= len(cell) <= 6 for cell in cells)
        assert {word for cell in cells for word in cell} & set(NOUNS) <= {
            kind.noun for kind in scene.kinds
        }
        for kind in scene.kinds:
            for place in kind.places:
                cell = cells[int(place.y * side) * side + int(place.x * side)]
                about = {kind.noun, kind.colour, kind.size, NUMBERS[kind.count]}
                about |= {ROW_WORDS[place.row], COLUMN_WORDS[place.column]}
                assert set(cell) <= about


def test_a_near_twin_differs_but_not_in_everything():
    for index, scene in enumerate(SCENES):
        twin = near_twin(scene, random.Random(index))
        assert without_texture(twin) != without_texture(scene)
        same_background = twin.background == scene.background
        assert same_background or twin.kinds == scene.kinds
        assert abs(twin.num_things - scene.num_things) <= 1


def test_things_of_a_scene_never_share_a_cell():
    for scene in SCENES:
        cells = [(place.row, place.column) for kind in scene.kinds for place in kind.places]
        assert len(cells) == len(set(cells)) == scene.num_things
