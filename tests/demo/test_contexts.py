import random

import pytest

from demo.contexts import COLUMN_WORDS, GROUNDS, ROW_WORDS, facts, inventory, notes, raster
from demo.scenes import GRID, Scene, scene_at
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


def test_facts_cover_every_noun_of_the_scene_and_some_absent_ones():
    for index, scene in enumerate(SCENES):
        told = dict(facts(scene, random.Random(index)))
        for kind in scene.kinds:
            assert told.pop(kind.noun).startswith(f"{kind.colour} {kind.size} ")
        assert set(told.values()) == {"none"}


def test_a_raster_tells_the_content_of_each_cell_and_nothing_else():
    for index, scene in enumerate(SCENES):
        cells = raster(scene, random.Random(index), share=1.0, seen_only=True)
        assert len(cells) == GRID * GRID
        things = {
            place.row * GRID + place.column: {kind.noun, kind.colour, kind.size}
            for kind in scene.kinds
            for place in kind.places
        }
        for number, cell in enumerate(cells):
            ground = {GROUNDS.get(scene.background, scene.background)}
            assert set(cell) == things.get(number, ground)


def test_a_raster_in_full_also_tells_places_and_numbers():
    for index, scene in enumerate(SCENES):
        cells = raster(scene, random.Random(index), share=1.0, seen_only=False)
        for kind in scene.kinds:
            for place in kind.places:
                cell = cells[place.row * GRID + place.column]
                told = {NUMBERS[kind.count], ROW_WORDS[place.row], COLUMN_WORDS[place.column]}
                assert told <= set(cell)


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
