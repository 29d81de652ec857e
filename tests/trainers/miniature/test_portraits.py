import random
from dataclasses import replace

import numpy as np
import pytest

from trainers.data.identity import IdentityConfig
from trainers.miniature.faces import Album
from trainers.miniature.people import SKINS
from trainers.miniature.pictures import plain
from trainers.miniature.portraits import TRIGGER, crowd, photo, save_people
from trainers.miniature.world import SIZE, words


@pytest.fixture
def portraits():
    return [photo(person, random.Random(place)) for place, person in enumerate(crowd(20, seed=1))]


def test_photos_of_somebody_keep_who_it_is_and_change_the_rest():
    person = crowd(1, seed=2)[0]
    rng = random.Random(0)
    taken = [photo(person, rng) for _ in range(20)]
    assert len({(p.person.skin, p.person.eyes, p.person.width, p.person.hair, p.person.hair_style) for p in taken}) == 1
    assert len({p.person.shirt for p in taken}) > 3
    assert len({p.background for p in taken}) > 3
    assert {p.person.glasses for p in taken} == {True, False}
    assert len({p.placement for p in taken}) == 20


def test_a_background_never_hides_hair_or_shirt(portraits):
    assert all(p.background not in (p.person.hair, p.person.shirt) for p in portraits)


def test_the_mask_is_the_face_and_the_box_its_bounds(portraits):
    for portrait in portraits:
        rows, columns = np.nonzero(np.asarray(portrait.face_mask()) > 127)
        found = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        assert np.abs(np.subtract(found, portrait.box)).max() <= 1
        assert min(portrait.box) >= 0
        assert max(portrait.box) <= SIZE


def test_most_of_what_the_mask_covers_has_the_colour_of_the_skin(portraits):
    for portrait in portraits:
        bare = replace(portrait, person=replace(portrait.person, glasses=False))
        inside = np.asarray(bare.draw())[np.asarray(bare.face_mask()) == 255].astype(int)
        same = np.abs(inside - SKINS[portrait.person.skin]).max(1) < 30
        assert same.mean() > 0.5


def test_captions_say_what_varies_in_known_words(portraits):
    for portrait in portraits:
        said = portrait.caption(TRIGGER).split()
        assert said[:3] == ["a", "person", TRIGGER]
        assert {*said} - {TRIGGER} <= set(words())
        assert portrait.person.shirt in said
        assert "hair" not in said


def test_people_of_a_group_have_the_same_hair_and_are_not_the_same():
    people = crowd(12, seed=3, alike=4)
    for start in range(0, 12, 4):
        assert len({(p.hair, p.hair_style) for p in people[start : start + 4]}) == 1
    assert len(set(people)) == 12


def test_saved_people_are_identity_data(tmp_path):
    save_people(tmp_path, crowd(3, seed=0), photos=2, seed=0)
    config = IdentityConfig(path=tmp_path, resolution=SIZE, mirror=False)
    config.check()
    config.check_captions(TRIGGER)
    examples = config.split().train
    assert {example.identity for example in examples} == {"p00", "p01", "p02"}
    assert len(examples) == 6
    assert (tmp_path / "masks" / "p02" / "01.png").is_file()


def test_an_album_has_whole_groups_and_pictures_of_nobody():
    album = Album.draw(5, 2, 0, plain(8, 0))
    assert len(album.people) == 8
    assert all(len(images) == 2 for images in album.images)
    assert album.others
